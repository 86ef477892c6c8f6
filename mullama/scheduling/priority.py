"""Strict priorities with ageing."""

from __future__ import annotations

from typing import ClassVar

from mullama.scheduling.base import SeqView
from mullama.scheduling.batching import COMMON, Batching
from mullama.scheduling.params import Param

AGEING = Param(
    "ageing_s",
    10.0,
    "waiting this many seconds makes a request as urgent as one of the next lower number; 0: never",
    minimum=0,
    maximum=1e6,
)


class Priority(Batching):
    """The most urgent first (lowest ``priority``), with ageing so that nothing starves.

    It decides who is admitted and whose prompt is computed next; a running sequence is never stopped. Everybody ages
    at the same pace, so the order of two requests never changes: one that is ``k`` less urgent goes first if it came
    more than ``k * ageing_s`` earlier.
    """

    name: ClassVar[str] = "priority"
    SOURCE: ClassVar[str] = (
        "ageing: Jackson, Some problems in queueing with dynamic priorities, Naval Research Logistics Quarterly, 1960"
    )
    PARAMS: ClassVar[tuple[Param, ...]] = (*COMMON, AGEING)

    ageing_s: float

    def _configured(self) -> None:
        super()._configured()
        self._ageing_ns = int(self.ageing_s * 1e9)

    def rank(self, seq: SeqView) -> tuple[float, ...]:
        if self._ageing_ns:
            return seq.priority * self._ageing_ns + seq.arrival_ns, seq.arrival_ns, seq.id
        return seq.priority, seq.arrival_ns, seq.id
