"""How threads step back: work that can wait must not take a core from running decodes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading


def step_back(nice: int) -> None:
    """Run this thread at a lower priority from now on. On Linux a thread cannot raise it again; elsewhere nothing
    happens, because priorities belong to processes there."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
