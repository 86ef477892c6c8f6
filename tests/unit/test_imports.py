"""What must import without compiled code: a tool that reads pages, a policy under test, the types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mullama"
#: What computes, and is made of the compiled core; nothing else needs it to be imported.
NEED_CORE = {"mullama.api", "mullama.engine.engine", "mullama.engine.requests.intake"}
NEED_CORE |= {"mullama.engine.embedding.embedding_engine"}
NEED_CORE_FOLDERS = ("mullama._core", "mullama.engine.weights")


def pure_modules() -> list[str]:
    files = [file.relative_to(PACKAGE.parent).with_suffix("") for file in PACKAGE.rglob("*.py")]
    names = sorted(".".join(file.parts).removesuffix(".__init__") for file in files)
    return [name for name in names if name not in NEED_CORE and not name.startswith(NEED_CORE_FOLDERS)]


HIDING = Path(__file__).parents[1] / "without_core"


def run(code: str, folder: Path, *, hide: bool = False) -> subprocess.CompletedProcess[str]:
    """``hide``: the compiled core."""
    path = os.pathsep.join(filter(None, [str(HIDING) if hide else "", os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def test_what_decides_and_what_speaks_imports_without_the_core(tmp_path: Path) -> None:
    """Every room but the engine's own: web, serving, kv, scheduling, simulation, models."""
    names = [name for name in pure_modules() if not name.endswith("__main__")]
    assert len(names) > 200
    imports = "\n".join(f"import {name}" for name in names)
    done = run(f"import sys\n{imports}\nassert 'mullama._core' not in sys.modules", tmp_path, hide=True)
    assert done.returncode == 0, done.stderr


def test_the_core_is_hidden(tmp_path: Path) -> None:
    done = run("import mullama._core", tmp_path, hide=True)
    assert "nothing is compiled here" in done.stderr


def test_import_mullama_is_lazy(tmp_path: Path) -> None:
    heavy = ("mullama._core", "numpy", "asyncio", "falcon")
    code = f"import sys, mullama\nassert not set({heavy!r}) & set(sys.modules)"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_names_of_the_package_without_the_core(tmp_path: Path) -> None:
    """Only ``Engine`` needs compiled code."""
    code = """
import mullama
assert mullama.SamplingParams().top_k == 40
for name in mullama.__all__:
    if name != "Engine":
        getattr(mullama, name)
"""
    done = run(code, tmp_path, hide=True)
    assert done.returncode == 0, done.stderr
    done = run("import mullama\nmullama.Engine", tmp_path, hide=True)
    assert "nothing is compiled here" in done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    import mullama

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mullama.nonsense  # type: ignore[attr-defined]


def test_abi_stands_alone(tmp_path: Path) -> None:
    """A copy of the one file works with no mullama in sight."""
    import mullama.abi

    assert mullama.abi.__file__
    (tmp_path / "abi.py").write_text(Path(mullama.abi.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    code = "import sys; sys.path.insert(0, '.'); import abi; assert 'mullama' not in sys.modules; abi.runtime_dir()"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
