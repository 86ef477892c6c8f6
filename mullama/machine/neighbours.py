"""How many cores other processes keep busy: what a measurement on a shared machine has to say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

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
    ) -> None:
        self._stat = stat
        self._clock = clock
        self._own = own or _own_seconds
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
            head = self._stat.read_text(encoding="ascii").split("\n", 1)[0].split()
            user, _nice, system, _idle, _wait, irq, softirq = map(int, head[1:8])
        except (OSError, ValueError):  # not Linux, or not for us to see
            return None
        return self._clock(), (user + system + irq + softirq) / _TICKS, self._own()


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
