"""What is cheap to compute again for the memory it takes goes first: GreedyDual-Size with frequency."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, ClassVar

from mullama.kv.eviction.base import Eviction
from mullama.kv.eviction.policy import Entry
from mullama.plugins.parameters import Param

_HISTORY = 4096  # steps of the inflation that are remembered; twice as many at most


class Cost(Eviction):
    """What costs least to compute again for its bytes and its hits goes first; what was not used lately ages.

    A stretch is worth ``(1 + hits) * cost / bytes`` on top of the inflation L as it was when the stretch was last used,
    and L rises to the score of what goes. So whatever is not used falls behind what is, at the pace of the evictions.

    The cost is what was measured (``entry.cost_ns``). Where nothing was, a token costs ``token_us`` and its share of
    attention to the tokens before it: ``attention`` times as much again for every 1,000 of them.
    """

    name: ClassVar[str] = "cost"
    SOURCE: ClassVar[str] = (
        "GreedyDual-Size: Cao and Irani, Cost-aware WWW proxy caching algorithms, USITS 1997; with frequency: "
        "Cherkasova, HP Labs report HPL-98-69, 1998"
    )
    PARAMS: ClassVar[tuple[Param, ...]] = (
        Param("token_us", 1000.0, "what computing a token costs where it was not measured, in µs", 0.001, 1e9),
        Param("attention", 0.1, "by how much that grows with every 1,000 tokens before it", 0.0, 1000.0),
    )
    token_us: float
    attention: float

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self._now_ns = 0
        self._inflation = 0.0
        # L as a function of time. A trunk is asked for late, when it becomes a leaf; without the history it would then
        # look as if it had just been used.
        self._since: list[int] = []
        self._levels: list[float] = []

    def score(self, entry: Entry, now_ns: int) -> float:
        self._now_ns = max(self._now_ns, now_ns)
        worth = (1 + entry.hits) * self._cost_ns(entry) / max(entry.n_bytes, 1)
        return self._level_at(entry.used_ns) + worth

    def evicted(self, entry: Entry, score: float) -> None:
        if score <= self._inflation:
            return
        self._inflation = score
        if self._since and self._since[-1] == self._now_ns:
            self._levels[-1] = score
            return
        self._since.append(self._now_ns)
        self._levels.append(score)
        if len(self._since) >= 2 * _HISTORY:
            del self._since[:_HISTORY], self._levels[:_HISTORY]

    def _cost_ns(self, entry: Entry) -> float:
        if entry.cost_ns > 0:
            return entry.cost_ns
        before = (entry.start + entry.end - 1) / 2  # tokens before one of its own, on average
        return entry.n_tokens * self.token_us * 1000 * (1 + self.attention * before / 1000)

    def _level_at(self, time_ns: int) -> float:
        """The inflation at a time; 0 before what is remembered, or before anything went."""
        at = bisect_right(self._since, time_ns)
        return self._levels[at - 1] if at else 0.0
