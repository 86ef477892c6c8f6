"""Builds on processors that are not at hand, emulated by qemu: right answers, or one line; never a signal.

The installed build is tried as it is. ``MULLAMA_LONG=1`` compiles the portable ones and tries them as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mullama.installation import instructions

from .support import clean_env

ROOT = Path(__file__).resolve().parents[2]
QEMU = shutil.which("qemu-x86_64")
PROCESSORS = ("Nehalem", "Haswell", "Skylake-Server")
#: Options of a build, and which of the processors it is for.
BUILDS = {
    "avx2": (["GGML_NATIVE=OFF"], ("Haswell", "Skylake-Server")),
    "sse4.2": (
        ["GGML_NATIVE=OFF", *(f"GGML_{name}=OFF" for name in ("AVX", "AVX2", "FMA", "F16C", "BMI2"))],
        PROCESSORS,
    ),
}
LONG = pytest.mark.skipif(not os.environ.get("MULLAMA_LONG"), reason="compiles everything; set MULLAMA_LONG=1")
pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 (qemu-user) is not installed")

CARRIED = (
    "import json; from mullama.installation import instructions; print(json.dumps(sorted(instructions.carried())))"
)
ANSWERS = """
import json, sys
from mullama import Engine
from mullama.config import ServeConfig
model, threads, mode = sys.argv[1:]
config = ServeConfig(ctx_size=256, parallel=4, threads=int(threads), threads_fixed=True,
                     deterministic=mode == "reference")
with Engine.load(model, config=config) as engine:
    prompts = ["The capital of France is", "1 2 3 4 5", "Once upon a time there was"]
    print(json.dumps([engine.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True) for prompt in prompts]))
"""
MAIN = "import sys; from mullama.cli.main import main; sys.exit(main())"


def python(processor: str | None, code: str, *args: str, install: Path | None = None) -> list[str]:
    """A command line; ``install``: a folder with another build, instead of the installed one."""
    emulator = [QEMU or "", "-cpu", processor] if processor else []
    return [*emulator, sys.executable, *(["-S"] if install else []), "-c", code, *args]


def run(command: Sequence[str], install: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = clean_env()
    if install is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(install), sysconfig.get_paths()["purelib"]])
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, stdin=subprocess.DEVNULL)
    assert done.returncode >= 0, f"ended by signal {-done.returncode}: {done.stderr}"
    return done


def ours(text: str) -> str:
    """stderr without what the emulator says of features that it lacks."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("qemu-x86_64: warning"))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_installed_build(processor: str, smollm2: Path) -> None:
    carried = frozenset(json.loads(run(python(processor, CARRIED)).stdout))
    assert "avx512f" not in carried  # the processor is emulated, not the one below
    missing = instructions.missing(instructions.build_record()["instructions"], carried)
    if not missing:
        check_answers(processor, str(smollm2), None)
        return
    for args in (["serve", "--model", str(smollm2)], ["doctor", "--model", str(smollm2)]):
        done = run(python(processor, MAIN, *args))
        assert done.returncode == 1
        (line,) = ours(done.stderr).splitlines()
        assert line == f"error: {instructions.unfit(missing)}"


def test_a_python_program_gets_an_error_that_it_can_catch() -> None:
    code = "import sys\ntry:\n    from mullama import Engine\nexcept Exception as e:\n    print(type(e).__name__)"
    carried = frozenset(json.loads(run(python("Nehalem", CARRIED)).stdout))
    missing = instructions.missing(instructions.build_record()["instructions"], carried)
    assert run(python("Nehalem", code)).stdout == ("MachineUnfit\n" if missing else "")


def check_answers(processor: str, model: str, install: Path | None) -> None:
    """Greedy texts under the emulator are those of the reference computations."""
    assert answers(processor, model, "usual", install) == answers(None, model, "reference", install)


def answers(processor: str | None, model: str, mode: str, install: Path | None) -> list[str]:
    done = run(python(processor, ANSWERS, model, "2", mode, install=install), install)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    assert all(len(text) >= 10 for text in found)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with mullama, built with the options of that name; ``MULLAMA_BUILDS``: where they are built already."""
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            ready = os.environ.get("MULLAMA_BUILDS")
            made[name] = Path(ready) / name if ready else compile_for(name, tmp_path_factory.mktemp(name))
        return made[name]

    return build


def compile_for(name: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip"]
    options = [part for option in BUILDS[name][0] for part in ("-C", f"cmake.define.{option}")]
    wheel = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*wheel, "-C", f"build-dir={folder / 'build'}", *options], check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "installed"), str(file)], check=True)
    return folder / "installed"


@LONG
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(BUILDS))
@pytest.mark.parametrize("processor", PROCESSORS)
def test_portable_builds(
    name: str, processor: str, built: Callable[[str], Path], tiny_model: Callable[..., Path], smollm2: Path
) -> None:
    install = built(name)
    if processor in BUILDS[name][1]:
        check_answers(processor, str(smollm2), install)
        for arch in ("llama", "gemma3", "lfm2", "mamba"):  # random weights: nearly equal logits are common
            for mode in ("usual", "reference"):
                model = str(tiny_model(arch))
                assert answers(processor, model, mode, install) == answers(None, model, mode, install), (arch, mode)
        return
    done = run(python(processor, MAIN, "serve", install=install), install)
    assert done.returncode == 1
    (line,) = ours(done.stderr).splitlines()
    assert line.startswith("error: this build of mullama uses instructions")
    assert "AVX2" in line
