"""llama.cpp's AMX code (vendor/patches, ``*-amx-*``) with tiles in software: any x86 with AVX-512 tests it.

The code is compiled here by the system's compiler, as the build compiles it, and linked with the libraries of the
build. Where the processor has AMX, the same is tested with its own tiles.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mullama.installation.instructions import library_folder

ROOT = Path(__file__).resolve().parents[2]
GGML = ROOT / "vendor" / "llama.cpp" / "ggml"
PROGRAM = Path(__file__).with_name("amx_products.cpp")
SOURCES = (GGML / "src/ggml-cpu/amx/mmq.cpp", GGML / "src/ggml-cpu/amx/amx.cpp", PROGRAM)
LIBRARIES = library_folder()

TYPES = ["f16", "q4_0", "q4_1", "q8_0", "q4_K", "q5_K", "q6_K", "iq4_xs"]
NEEDED = {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
FLAGS = ["-std=gnu++17", "-O3", "-w", "-pthread", *(f"-m{name.replace('_', '')}" for name in sorted(NEEDED))]
TILES = {
    "emulated": ["-DGGML_AMX_EMULATED", "-D__AMX_TILE__", "-D__AMX_INT8__"],
    "real": ["-mamx-tile", "-mamx-int8"],
}


def _processor() -> set[str]:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _compiler() -> str:
    missing = NEEDED - _processor()
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}, or is no x86 under Linux")
    named = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    found = next((path for name in named if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no C++ compiler was found")
    return found


def _built(compiler: str, tiles: str) -> Path:
    """The program, kept outside the checkout by what it is made of."""
    # With plugins there is one library an instruction set; its plain products are compared with, so any that runs here.
    cpu = next(iter([*LIBRARIES.glob("libggml-cpu.so"), *LIBRARIES.glob("libggml-cpu-haswell.so")]), None)
    base = LIBRARIES / "libggml-base.so"
    assert cpu is not None and base.exists(), f"no libraries of ggml in {LIBRARIES}"
    folders = [f"-I{GGML / part}" for part in ("include", "src", "src/ggml-cpu")]
    flags = [*FLAGS, *TILES[tiles]]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\0".join([version, *flags]).encode())
    headers = [path for part in ("include/*.h", "src/*.h", "src/ggml-cpu/**/*.h") for path in sorted(GGML.glob(part))]
    for path in (*SOURCES, *headers):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"mullama-amx-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / digest.hexdigest()[:24]
    if not program.exists():
        # The libraries are those of the build that is tested: LD_LIBRARY_PATH names them when the program runs.
        made = Path(tempfile.mkdtemp(dir=folder)) / "program"
        command = [compiler, *flags, *folders, *map(str, SOURCES), "-o", str(made), str(cpu), str(base), "-ldl"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode and "unrecognized command-line option" in result.stderr:
            pytest.skip(f"{compiler} knows no AVX-512 VNNI or AMX: {result.stderr.splitlines()[0]}")
        assert result.returncode == 0, result.stderr[-4000:]
        made.replace(program)
        made.parent.rmdir()
    return program


@pytest.fixture(scope="module", params=sorted(TILES))
def run(request: pytest.FixtureRequest) -> Callable[..., str]:
    """``run(mode, …)``: what the program says, with rubbish in the memory that is given to it."""
    if request.param == "real" and not {"amx_tile", "amx_int8"} <= _processor():
        pytest.skip("this processor has no AMX")
    program = _built(_compiler(), request.param)

    def call(*arguments: str) -> str:
        environment = {**os.environ, "MALLOC_PERTURB_": "165", "LD_LIBRARY_PATH": str(LIBRARIES)}
        done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, f"status {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    return call


@pytest.mark.parametrize("kind", TYPES)
def test_products_are_right_and_equal_to_themselves(run: Callable[..., str], kind: str) -> None:
    """1 to 64 columns, one to five blocks of values, batches, matrices in three dimensions, views: close to the plain
    products, and equal to the bit with 1 to 3 threads and for each column by itself."""
    assert run("products", kind).startswith(f"{kind}: ")


def test_the_configuration_arrives_whole(run: Callable[..., str]) -> None:
    """Its stores were optimized away: the compiler took it for 8 bytes."""
    assert run("configuration") == "the configuration is whole\n"


def test_tiles_used_by_another_library(run: Callable[..., str]) -> None:
    assert run("shared") == "tiles are configured for each product\n"


@pytest.mark.parametrize("run", ["emulated"], indirect=True)
def test_threads_without_tiles_compute_the_same(run: Callable[..., str]) -> None:
    assert run("denied") == "threads without tiles compute the same\n"


def test_weights_are_loaded_where_no_more_threads_start(run: Callable[..., str]) -> None:
    """The process ended."""
    assert run("full") == "weights are packed without further threads\n"


def test_what_it_cannot_compute_is_refused(run: Callable[..., str]) -> None:
    assert run("refused") == "what cannot be computed is refused\n"
