"""Cores that this process may use, and how many threads compute best on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mullama.machine import cgroups


@dataclass(frozen=True, slots=True)
class Cores:
    """``online``: cores of the machine. ``affinity``: those of this process; its CPU set is part of that.

    ``quota``: cores' worth of time that its control groups give it, None: no limit. ``cpuset`` as the system writes it.
    """

    online: int
    affinity: tuple[int, ...]
    quota: float | None
    cpuset: str | None

    @property
    def threads(self) -> int:
        """Threads that compute best: a core each, and no more of them than the quota can keep running."""
        return threads_for(len(self.affinity), self.quota)


def threads_for(n_cores: int, quota: float | None) -> int:
    """The count for so many cores under such a quota; see docs/machine.md for what was measured."""
    if quota is None or quota >= n_cores:
        return max(n_cores, 1)
    return max(int(quota), 1)


def own_cores(proc: Path = cgroups.PROC) -> Cores:
    """What this process may use now."""
    online = os.cpu_count() or 1
    try:
        affinity = tuple(sorted(os.sched_getaffinity(0)))
    except (AttributeError, OSError):  # not Linux
        affinity = tuple(range(online))
    return Cores(online, affinity, cgroups.cpu_quota(proc), cgroups.cpu_set(proc))


def usable_threads() -> int:
    """Threads that computing takes where nobody says another number."""
    return own_cores().threads
