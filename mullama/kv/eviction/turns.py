"""Least recently used, with time for what goes on from much that was of use before."""

from __future__ import annotations

from typing import ClassVar

from mullama.kv.eviction.base import Eviction
from mullama.kv.eviction.policy import Entry
from mullama.plugins.parameters import Param


class Turns(Eviction):
    """What has served no prompt for the longest time goes first; a chat that went on before is given some minutes more.

    The share of a stretch's prompt that has served another prompt, times ``minutes``, is added to the time of its last
    use.
    """

    name: ClassVar[str] = "turns"
    SOURCE: ClassVar[str] = (
        "mullama's own; that what has returned will return is an idea of 2Q: Johnson and Shasha, VLDB 1994"
    )
    PARAMS: ClassVar[tuple[Param, ...]] = (
        Param("minutes", 5.0, "by how much longer a stretch stays that goes on from nothing new", 0.0, 100_000.0),
    )
    minutes: float

    def score(self, entry: Entry, now_ns: int) -> float:
        return entry.used_ns + 60e9 * self.minutes * entry.n_served / entry.end
