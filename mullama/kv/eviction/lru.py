"""Least recently used."""

from __future__ import annotations

from typing import ClassVar

from mullama.kv.eviction.base import Eviction
from mullama.kv.eviction.policy import Entry


class Lru(Eviction):
    """What has served no prompt for the longest time goes first."""

    name: ClassVar[str] = "lru"
    SOURCE: ClassVar[str] = "Mattson et al., Evaluation techniques for storage hierarchies, IBM Systems Journal 1970"

    def score(self, entry: Entry, now_ns: int) -> float:
        return float(entry.used_ns)
