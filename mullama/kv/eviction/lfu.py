"""Least frequently used."""

from __future__ import annotations

from typing import ClassVar

from mullama.kv.eviction.base import Eviction
from mullama.kv.eviction.policy import Entry

_EVER_NS = float(1 << 63)  # no clock gets there, so the tie-break stays below one hit


class Lfu(Eviction):
    """What has served the fewest prompts goes first; of equals, what has served none for the longest time.

    Counts are never aged: what was popular once stays until all else has been as popular. ``cost`` forgets.
    """

    name: ClassVar[str] = "lfu"
    SOURCE: ClassVar[str] = "Aho, Denning and Ullman, Principles of optimal page replacement, JACM 1971"

    def score(self, entry: Entry, now_ns: int) -> float:
        # NOTE: a float holds hits and time together to some microseconds at few hits, milliseconds at thousands.
        return entry.hits + entry.used_ns / _EVER_NS
