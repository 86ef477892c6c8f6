"""Work that must do no harm: in a process of its own, which may crash, hang or be killed; in a thread that steps back.

A process is for what llama.cpp cannot be trusted with (a new file) and what cannot be stopped (quantising).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Devices are hidden: a child works on the CPU, and a driver wants more address space than its limit allows.
_NO_DEVICES = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "GGML_VK_VISIBLE_DEVICES": ""}
_PARENT = "MULLAMA_CHILD_OF"
_PR_SET_PDEATHSIG = 1


def start(module: str, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE ARGUMENTS``; stdout and stderr are pipes, stdin is closed.

    ``variables`` are added to its environment.

    It is in a session of its own, so that Ctrl-C at the terminal reaches it only through its parent.
    """
    added = {**_NO_DEVICES, "GGML_NO_BACKTRACE": "1", "PYTHONFAULTHANDLER": "", _PARENT: str(os.getpid())}
    return subprocess.Popen(
        # -P: the current folder is no place to import from.
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **added, **(variables or {})},
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill it and wait for its end. Never raises."""
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def become_child(niceness: int) -> None:
    """Called first in a child: a low priority, no core dumps, and its end when its parent ends. Never raises."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(niceness)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.environ.get(_PARENT) not in (None, str(os.getppid())):  # it ended before the call
            os._exit(1)


def step_back(nice: int) -> None:
    """Run this thread at a lower priority from now on, so that it takes no core from running decodes.

    On Linux a thread cannot raise it again; elsewhere nothing happens, because priorities belong to processes there.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def yield_to_other_sessions(niceness: int) -> None:
    """Let this child's session, which is its alone (``start``), have a low priority among sessions. Never raises.

    Where Linux shares the cores among sessions first (autogroups), the priority of a process counts within its own one
    only: beside a server that was started elsewhere, a child of the lowest priority still gets half of the cores.
    """
    if sys.platform == "linux" and os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(niceness))


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
