"""Builds llama.cpp's own tools from the pinned source, with the flags that mullama itself is built with.

The source is the one its makers published, without our patches: that is what people run instead of mullama. One is
applied where there is AMX, because llama.cpp ends with an illegal instruction there in a build by older compilers.

The web UI of llama-server is neither built nor downloaded: with ``LLAMA_BUILD_UI=OFF`` and
``LLAMA_USE_PREBUILT_UI=OFF`` its build step embeds an empty table and touches no network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from bench.common import ROOT, progress

SOURCE = ROOT / "build" / "peers-source"
BUILD = ROOT / "build" / "peers"
TARGETS = ("llama-bench", "llama-batched-bench", "llama-server", "llama-quantize")

DEFINES = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "GGML_OPENMP": "OFF",
    "GGML_RPC": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    # fixed, so that a commit of this repository does not rebuild llama.cpp
    "LLAMA_BUILD_NUMBER": "0",
}

#: What llama.cpp does not run without, by an instruction set in /proc/cpuinfo.
NEEDED_PATCHES = {"amx_tile": "0014-amx-configuration.patch"}


class BuildFailed(RuntimeError):
    """CMake or the compiler failed, or a tool is missing; the message says what to do."""


@dataclass(frozen=True)
class Tools:
    """The built programs."""

    bench: Path
    batched_bench: Path
    server: Path
    quantize: Path

    @classmethod
    def at(cls, build: Path = BUILD) -> Tools:
        """Raises BuildFailed when one is missing."""
        paths = [build / "bin" / (name + (".exe" if os.name == "nt" else "")) for name in TARGETS]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise BuildFailed(f"{', '.join(missing)} not built yet; run without --no-build")
        return cls(*paths)


def upstream_commit() -> str:
    lock = ROOT / "vendor" / "llama.lock.toml"
    return str(tomllib.loads(lock.read_text(encoding="utf-8"))["upstream_commit"])


def needed_patches(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Names in vendor/patches of what llama.cpp does not run without on this processor."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return []
    return [patch for flag, patch in NEEDED_PATCHES.items() if flag in words]


def configure_command(build: Path = BUILD) -> list[str]:
    defines = DEFINES | {"LLAMA_BUILD_COMMIT": upstream_commit()}
    if ccache := shutil.which("ccache"):
        # paths relative to the checkout, as mullama's own build has them, so that both share what is compiled
        launcher = ["cmake", "-E", "env", f"CCACHE_BASEDIR={ROOT}", "CCACHE_NOHASHDIR=true", ccache]
        defines |= {"GGML_CCACHE": "OFF"}
        defines |= {f"CMAKE_{language}_COMPILER_LAUNCHER": ";".join(launcher) for language in ("C", "CXX")}
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    return ["cmake", "-S", str(SOURCE), "-B", str(build), *generator, *(f"-D{k}={v}" for k, v in defines.items())]


def build_tools(build: Path = BUILD) -> Tools:
    """Fetch the source if it is missing, configure and build. Minutes the first time; ccache is used when present.

    Raises BuildFailed.
    """
    if shutil.which("cmake") is None:
        raise BuildFailed("cmake was not found: install it (Debian: apt install cmake ninja-build)")
    # returns at once when the folder matches the lock file
    fetch = [sys.executable, str(ROOT / "vendor" / "fetch.py"), "--pristine", "--into", str(SOURCE)]
    fetch += [f"--with={patch}" for patch in needed_patches()]
    _run(fetch, "fetching llama.cpp")
    _forget_another_source(build / "CMakeCache.txt")
    _run(configure_command(build), "configuring llama.cpp's tools")
    jobs = str(os.cpu_count() or 1)
    _run(["cmake", "--build", str(build), "--target", *TARGETS, "--parallel", jobs], "building", show_steps=True)
    return Tools.at(build)


def _forget_another_source(cache: Path) -> None:
    """CMake refuses a build folder that was made for another source folder, such as a checkout that moved."""
    if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={SOURCE.as_posix()}\n" not in cache.read_text("utf-8"):
        cache.unlink()


_STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)\]|%\])")  # Ninja's "[12/225]", Make's "[ 12%]"


def step_of(line: str) -> tuple[int, int] | None:
    """``(done, of)`` from a line of Ninja or Make, or None."""
    found = _STEP.match(line)
    return (int(found[1]), int(found[2] or 100)) if found else None


def _run(command: list[str], what: str, *, show_steps: bool = False) -> None:
    progress(what)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
    )
    lines: list[str] = []
    shown = 0
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            step = step_of(line) if show_steps else None
            if step is not None and step[0] * 20 // step[1] > shown:
                shown = step[0] * 20 // step[1]
                progress(f"{what}: {step[0]} of {step[1]}")
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.wait() != 0:
        raise BuildFailed(f"{what} failed ({command[0]} exited with {process.returncode}):\n{''.join(lines[-30:])}")
