"""How many cores other processes keep busy: what a measurement on a shared machine has to say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from mullama.machine.cores import own_cores

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
LOUD = 0.25  # cores: neighbours that take so much are worth a word


class Neighbours:
    """``busy()``: cores' worth of time that others took since the last call, on average; 0 where it is not known.

    What runs at a low priority counts not at all, because it yields; neither do this process and its children that have
    ended.
    """

    def __init__(
        self,
        stat: Path = Path("/proc/stat"),
        *,
        clock: Callable[[], float] = time.monotonic,
        own: Callable[[], float] | None = None,
        cores: Collection[int] | None = None,
    ) -> None:
        """``cores``: those that are looked at; None: this process's own. Neighbours on others are nothing to it."""
        self._stat = stat
        self._clock = clock
        self._own = own or _own_seconds
        self._cores = {f"cpu{core}" for core in (own_cores().affinity if cores is None else cores)}
        self._last = self._now()

    def busy(self) -> float:
        before, self._last = self._last, self._now()
        if before is None or self._last is None:
            return 0.0
        seconds, total, own = (now - then for now, then in zip(self._last, before, strict=True))
        return max(total - own, 0.0) / seconds if seconds > 0 else 0.0

    def _now(self) -> tuple[float, float, float] | None:
        """The clock, seconds that all processes computed, and this one."""
        try:
            rows = [line.split() for line in self._stat.read_text(encoding="ascii").splitlines()]
            # user nice system idle iowait irq softirq …, in ticks
            ticks = sum(int(row[at]) for row in rows if row and row[0] in self._cores for at in (1, 3, 6, 7))
        except (OSError, ValueError, IndexError):  # not Linux, or not for us to see
            return None
        return self._clock(), ticks / _TICKS, self._own()


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
