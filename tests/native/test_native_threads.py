"""The headers that threads share, driven by a C++ program (threads.cpp) under gcc's or clang's sanitizers.

A finding ends the program with another status than 0, and so does a value that is not what was written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("threads.cpp")
LLAMA = ROOT / "vendor" / "llama.cpp"
CORE = ROOT / "mullama" / "_core"
FOLDERS = [CORE / "output", CORE / "compute", CORE / "model", LLAMA / "include", LLAMA / "ggml" / "include"]
# -Wno-tsan: gcc says that ThreadSanitizer knows no fences. All that is read beside one is atomic, so it need not.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Wno-tsan", "-pthread"]
SANITIZERS = {"thread": ["-fsanitize=thread"], "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]}
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66:detect_stack_use_after_return=1:max_malloc_fill_size=1048576",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
}
SUBJECTS = ["ring", "page", "arbiter", "governor", "deadline", "log"]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture(scope="module")
def compiler() -> str:
    named = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    found = next((path for name in named if name and (path := shutil.which(name))), None)
    if sys.platform != "linux" or found is None:
        pytest.skip("no C++ compiler, or no Linux")
    if not (LLAMA / "include" / "llama.h").is_file():
        pytest.skip("the headers of llama.cpp were not fetched")
    return found


@pytest.fixture(scope="module", params=sorted(SANITIZERS))
def sanitizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def program(compiler: str, sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs it, without the subject."""
    folder = tmp_path_factory.mktemp("native")
    (folder / "empty.cpp").write_text("int main() { return 0; }\n")
    flags = SANITIZERS[sanitizer]
    empty = str(folder / "empty")
    probe = _run([compiler, *flags, "-pthread", f"{empty}.cpp", "-o", empty])
    if probe.returncode:
        pytest.skip(f"{compiler} cannot make programs with {flags[0]}: {probe.stderr.strip()[-200:]}")
    # ThreadSanitizer wants addresses where it expects them, and some kernels choose among more places than it knows.
    # Containers may forbid to have that switched off.
    ways = [["setarch", "-R"], []] if shutil.which("setarch") else [[]]
    way = next((way for way in ways if _run([*way, empty]).returncode == 0), None)
    if way is None:
        pytest.skip(f"programs with {flags[0]} do not run here: {_run([empty]).stderr.strip()[-200:]}")
    made = str(folder / "threads")
    includes = [f"-I{path}" for path in FOLDERS]
    built = _run([compiler, *FLAGS, *flags, *includes, str(PROGRAM), "-o", made])
    assert built.returncode == 0, built.stderr[-4000:]
    return [*way, made]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_threads_find_what_was_written(program: list[str], subject: str) -> None:
    done = _run([*program, subject])
    assert (done.returncode, done.stderr) == (0, ""), f"{done.stdout}{done.stderr}"[-6000:]


def test_the_sanitizers_are_at_work(program: list[str], sanitizer: str) -> None:
    """Else the others prove nothing: these runs are wrong, and must be refused for what is wrong with them."""
    faults = {
        "thread": {"race": "data race"},
        "address": {"overrun": "heap-buffer-overflow", "overflow": "signed integer overflow"},
    }
    for fault, name in faults[sanitizer].items():
        done = _run([*program, fault])
        assert done.returncode != 0 and name in done.stderr, f"{fault}: {done.returncode} {done.stderr}"
