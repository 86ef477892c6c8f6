"""What must import without compiled code: a tool that reads pages, a policy under test, the types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mullama"

PURE = [
    "mullama",
    "mullama.abi",
    "mullama.config",
    "mullama.errors",
    "mullama.types",
    "mullama.scheduling",
    "mullama.scheduling.fcfs",
    "mullama.workload",
    "mullama.workload.spec",
    "mullama.workload.prompts",
    "mullama.workload.metrics",
    "mullama.compare.runner",
    "mullama.compare.plots",
    "mullama.compare.recording",
    *sorted(
        f"mullama.{file.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}"
        for file in (PACKAGE / "kv").rglob("*.py")
    ),
    "mullama.engine",
    "mullama.engine.client",
    "mullama.engine.requests.lifecycle",
    "mullama.engine.memory.sizing",
    "mullama.engine.requests.generation",
    "mullama.engine.requests.reader",
    "mullama.engine.planning.report",
    "mullama.serving",
    "mullama.serving.model_eviction",
    "mullama.serving.manager",
    "mullama.serving.states",
    "mullama.serving.hot_swap",
]


HIDING = Path(__file__).parents[1] / "without_core"


def run(code: str, folder: Path, *, hide: bool = False) -> subprocess.CompletedProcess[str]:
    """``hide``: the compiled core."""
    path = os.pathsep.join(filter(None, [str(HIDING) if hide else "", os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def test_pure_modules_import_without_the_core(tmp_path: Path) -> None:
    imports = "\n".join(f"import {name}" for name in PURE)
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
