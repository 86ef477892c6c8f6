"""First in, first out."""

from __future__ import annotations

from typing import ClassVar

from mullama.kv.eviction.base import Eviction
from mullama.kv.eviction.policy import Entry


class Fifo(Eviction):
    """What was stored first goes first, however often it has served since."""

    name: ClassVar[str] = "fifo"
    SOURCE: ClassVar[str] = (
        "Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 1966"
    )

    def score(self, entry: Entry, now_ns: int) -> float:
        return float(entry.created_ns)
