"""Tests under sanitizers: ``make asan`` and ``make tsan`` call it with the Python of a build that has them.

    sanitized.py asan|tsan [-j N] [FILE…] [-- PYTEST OPTIONS]

Each file is a process of its own, so that a finding, which ends the process, hides nothing of the other files. A report
counts whoever wrote it, also a child whose end its test expects. Options of the environment (ASAN_OPTIONS, …) win.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

PROBE = "tests/core/test_core_probe.py::"
ATTENTION = "tests/core/test_exact_attention.py::"

#: Left out, with the reason: what a sanitizer changes is what they measure.
LEFT_OUT: dict[str, dict[str, str]] = {
    "asan": {
        PROBE + "test_a_hostile_template_is_refused[explodes]": "it is stopped by a limit on addresses",
        PROBE + "test_a_template_with_a_huge_result_is_refused": "it is stopped by a limit on addresses",
        PROBE + "test_too_little_memory_is_a_reason": "it sets a limit on addresses",
        ATTENTION + "test_equal_to_the_bit": "at -O1 gcc rounds S*ms + vs twice, here and in ggml alike",
        ATTENTION + "test_scores_that_grow_and_long_stretches_of_hidden_cells": "at -O1 gcc rounds S*ms + vs twice",
    },
    "tsan": {},
}

#: What each Python of the environment does at its start, children too: a sanitizer reserves terabytes of addresses, and
#: under a limit on them (the child that opens new files has one) no process would start.
UNLIMITED = (
    "import resource; resource.setrlimit = lambda kind, limits, real=resource.setrlimit, addresses=resource.RLIMIT_AS: "
    "None if kind == addresses else real(kind, limits)\n"
)

#: Where threads meet: the page and its readers, a full ring, the arbiter, and requests from other threads.
TSAN_FILES = [f"tests/core/test_{name}.py" for name in ("core_abi", "core_faults", "engine_sharing", "engine_requests")]


@dataclass(frozen=True)
class Sanitizer:
    """How one is brought into a Python that was built without it."""

    libraries: tuple[str, ...]  # to load before everything else
    options: dict[str, dict[str, object]]  # by variable of the environment
    prefix: tuple[str, ...] = ()


def sanitizer(name: str) -> Sanitizer:
    """The one of a build: ``asan`` has undefined behaviour with it."""
    if name == "tsan":
        options: dict[str, object] = {
            "suppressions": HERE / "tsan.supp",
            "ignore_noninstrumented_modules": 1,  # CPython and other extension modules
            "halt_on_error": 0,
            "history_size": 4,
        }
        return Sanitizer(("tsan", "stdc++"), {"TSAN_OPTIONS": options}, ("setarch", "-R"))
    address: dict[str, object] = {
        "detect_leaks": 0,  # CPython keeps what it made until its end
        "detect_stack_use_after_return": 1,
        "allocator_may_return_null": 1,  # as malloc does; tests ask for more than there is
        # Tests that crash a child want the signal. A crash of the tests themselves ends them all the same.
        "handle_segv": 0,
        "handle_sigbus": 0,
        "handle_sigfpe": 0,
        # What relies on zeroes shows, and what reads what it gave back.
        "malloc_fill_byte": 0xA5,
        "max_malloc_fill_size": 1 << 30,
        "free_fill_byte": 0x5A,
        "max_free_fill_size": 1 << 30,
    }
    undefined: dict[str, object] = {
        "suppressions": HERE / "ubsan.supp",
        "halt_on_error": 1,
        "print_stacktrace": 1,
    }
    return Sanitizer(("asan", "ubsan", "stdc++"), {"ASAN_OPTIONS": address, "UBSAN_OPTIONS": undefined})


def library(name: str) -> str:
    """Where the compiler has a shared library. Raises SystemExit."""
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "c++") if shutil.which(c)), "g++")
    command = [compiler, f"-print-file-name=lib{name}.so"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not path.is_absolute():
        raise SystemExit(f"{compiler} has no lib{name}.so; make asan and make tsan need gcc and its sanitizers")
    return str(path.resolve())


def environment(chosen: Sanitizer, reports: Path) -> dict[str, str]:
    found = {**os.environ, "LD_PRELOAD": " ".join(map(library, chosen.libraries))}
    for variable, options in chosen.options.items():
        given = {**options, "exitcode": 66, "log_path": reports / variable.partition("_")[0].lower()}
        text = ":".join(f"{name}={value}" for name, value in given.items())
        found[variable] = ":".join(filter(None, [text, os.environ.get(variable)]))
    found["PYTHONFAULTHANDLER"] = "1"
    return found


def run(name: str, file: str, chosen: Sanitizer, extra: list[str]) -> tuple[bool, str, str]:
    """Whether a file passes without a report, a line that says so, and what went wrong."""
    start = time.monotonic()
    left_out = [test for test in LEFT_OUT[name] if test.partition("::")[0] == file]
    command = [*chosen.prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=1800"]
    command += [file, *(f"--deselect={test}" for test in left_out), *extra]
    with tempfile.TemporaryDirectory(prefix="mullama-reports-") as folder:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(chosen, Path(folder)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        reports = [path.read_text(errors="replace") for path in sorted(Path(folder).iterdir())]
    output = done.stdout.decode(errors="replace")
    good = done.returncode in (0, 5) and not reports  # 5: all was left out
    last = output.strip().splitlines()[-1] if output.strip() else ""
    seconds = time.monotonic() - start
    state = "ok" if good else f"STATUS {done.returncode}, {len(reports)} reports"
    return good, f"{file}: {state}, {seconds:.0f} s, {last}", "" if good else "\n".join([output[-8000:], *reports])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["asan", "tsan"])
    parser.add_argument("-j", "--jobs", type=int, default=1, help="files at a time; some want a gigabyte or two")
    parser.add_argument("files", nargs="*")
    given = sys.argv[1:]
    extra = given[given.index("--") + 1 :] if "--" in given else []
    options = parser.parse_intermixed_args(given[: given.index("--")] if "--" in given else given)
    files = options.files or (
        TSAN_FILES
        if options.name == "tsan"
        else sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "core").glob("test_*.py"))
    )
    packages = Path(sysconfig.get_path("purelib"))
    if sys.prefix == sys.base_prefix:
        raise SystemExit("this changes the Python that runs it: start it by make asan or make tsan")
    (packages / "mullama-unlimited.pth").write_text(UNLIMITED)
    chosen = sanitizer(options.name)
    start, failed = time.monotonic(), []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(run, options.name, file, chosen, extra) for file in files]
        for one in concurrent.futures.as_completed(running):
            good, line, wrong = one.result()
            print(*filter(None, [wrong, line]), sep="\n", flush=True)
            if not good:
                failed.append(line)
    print(
        f"{len(files)} files in {(time.monotonic() - start) / 60:.1f} minutes, {len(failed)} failed", *failed, sep="\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
