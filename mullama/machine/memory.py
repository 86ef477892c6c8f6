"""Memory of the machine and within the limits of control groups. Bytes."""

from __future__ import annotations

import os
from pathlib import Path

from mullama.machine import cgroups

MEMINFO = Path("/proc/meminfo")


def available_memory() -> int | None:
    """Memory that can be used without swapping, and within a container; None where the system does not say."""
    return min((left for left in (machine_left(), cgroups.memory_left()) if left is not None), default=None)


def total_memory() -> int | None:
    """Memory of the machine, whatever limits there are; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def machine_left() -> int | None:
    """Memory of the machine that can be used without swapping."""
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
