"""Strict priorities with ageing."""

from __future__ import annotations

from typing import ClassVar

from mullama.plugins.parameters import Param
from mullama.scheduling.base import SeqView
from mullama.scheduling.batching import COMMON, Batching

AGEING = Param(
    "ageing_s",
    10.0,
    "waiting this many seconds makes a request as urgent as one of the next lower number; 0: never",
    minimum=0,
    maximum=1e6,
)
MAX_LEAD = Param(
    "max_lead_s",
    300.0,
    "with ageing, no priority counts for more than so many seconds of waiting; 0: no limit",
    minimum=0,
    maximum=1e6,
)
EVER_NS = 1 << 62


class Priority(Batching):
    """The most urgent first (lowest ``priority``), with ageing so that nothing starves.

    It decides who is admitted and whose prompt is computed next; a running sequence is never stopped. Everybody ages
    at the same pace, so the order of two requests never changes: one that is ``k`` less urgent goes first if it came
    more than ``k * ageing_s`` earlier. No difference counts for more than twice ``max_lead_s``: whatever priorities
    others claim, nobody waits behind one who came later than that.
    """

    name: ClassVar[str] = "priority"
    SOURCE: ClassVar[str] = (
        "ageing: Jackson, Some problems in queueing with dynamic priorities, Naval Research Logistics Quarterly, 1960"
    )
    PARAMS: ClassVar[tuple[Param, ...]] = (*COMMON, AGEING, MAX_LEAD)

    ageing_s: float
    max_lead_s: float

    def _configured(self) -> None:
        super()._configured()
        self._ageing_ns = int(self.ageing_s * 1e9)
        self._most_ns = int(self.max_lead_s * 1e9) or EVER_NS

    def lag_ns(self, priority: int) -> int:
        """What a priority counts in waiting time: so much later than it came a request seems to have come."""
        return max(-self._most_ns, min(priority * self._ageing_ns, self._most_ns))

    def rank(self, seq: SeqView) -> tuple[float, ...]:
        if self._ageing_ns:
            return self.lag_ns(seq.priority) + seq.arrival_ns, seq.arrival_ns, seq.id
        return seq.priority, seq.arrival_ns, seq.id
