"""The source distribution and the wheel: what is in them, and that they work where the checkout is not.

The build environment of an editable install (``make``) is used: nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from .support import clean_env

ROOT = Path(__file__).resolve().parents[2]
LONG = pytest.mark.skipif(not os.environ.get("MULLAMA_LONG"), reason="compiles everything; set MULLAMA_LONG=1")
BUILDABLE = pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None or not (ROOT / "vendor" / "llama.cpp").is_dir(),
    reason="needs the build requirements and the fetched llama.cpp, as `make` leaves them",
)
BINARY = {".so", ".a", ".o", ".dll", ".dylib", ".exe", ".pyc", ".gguf", ".safetensors", ".whl", ".gz", ".zip", ".png"}
pytestmark = BUILDABLE


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    call = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", call, str(folder)], cwd=ROOT, check=True, capture_output=True, timeout=240)
    [found] = folder.glob("mullama-*.tar.gz")
    return found


def test_what_the_source_distribution_holds(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {PurePosixPath(*PurePosixPath(member.name).parts[1:]) for member in archive if member.isfile()}
    texts = {str(name) for name in names}
    assert {
        "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md", "vendor/fetch.py",
        "vendor/llama.lock.toml", "vendor/llama.cpp/CMakeLists.txt", "vendor/llama.cpp/LICENSE",
        "vendor/llama.cpp/.mullama-fetched", "vendor/llama.cpp/include/llama.h", "vendor/llama.cpp/common/chat.cpp",
        "mullama/py.typed", "mullama/abi.h", "mullama/models/aliases.toml",
    } <= texts  # fmt: skip
    tracked = subprocess.run(["git", "ls-files", "mullama"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if tracked.returncode == 0:  # a checkout, not an unpacked distribution
        assert set(tracked.stdout.split()) == {text for text in texts if text.startswith("mullama/")}
    assert [name for name in names if name.suffix in BINARY] == []
    unwanted = ("build", "tests", "bench", ".ci", ".venv", ".git", "dist")
    assert [name for name in names if name.parts[0] in unwanted] == []
    parts = {name.parts[2] for name in names if name.parts[:2] == ("vendor", "llama.cpp")}
    assert not parts & {"tools", "scripts"}
    assert sdist.stat().st_size < 8_000_000


@LONG
def test_a_wheel_from_the_source_distribution_works_alone(
    sdist: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """Built where nothing can be downloaded, installed elsewhere; the source is gone when it runs."""
    source = tmp_path / "source"
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    [folder] = source.iterdir()
    nowhere = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    env = clean_env(**nowhere)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])  # ninja and cmake
    wheels = tmp_path / "wheels"
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(wheels), str(folder)]
    made = subprocess.run(build, env=env, capture_output=True, text=True, timeout=1500)
    assert made.returncode == 0, made.stderr[-3000:]
    shutil.rmtree(source)
    [wheel] = wheels.glob("mullama-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = [PurePosixPath(name) for name in archive.namelist()]
    assert [name for name in inside if name.suffix in (".pyx", ".cpp", ".a", ".gguf", ".o")] == []
    assert {name.parts[0] for name in inside} == {"mullama", wheel.name.split("-cp")[0] + ".dist-info"}

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
    python = venv / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], env=env, check=True, timeout=120)
    # The dependencies of this environment, behind the new one's own: their .pth files do not count there.
    [site] = (venv / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(python), *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    where = run("-c", "import mullama, mullama._core as c; print(mullama.__file__, c.model.__file__, sep='\\n')")
    assert where.returncode == 0, where.stderr
    assert all(Path(line).is_relative_to(venv) for line in where.stdout.split())
    said = run("-m", "mullama", "run", str(tiny_model()), "the sun is here", "--max-tokens", "8", "--temperature", "0")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
    program = [str(venv / "bin" / "mullama"), "version"]
    version = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert version.stdout.startswith("mullama"), version.stderr
