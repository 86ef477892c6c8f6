"""Earliest deadline first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from mullama.plugins.parameters import Param
from mullama.scheduling.base import EngineState, SeqView
from mullama.scheduling.batching import COMMON, Batching


class Deadline(Batching):
    """The earliest deadline of the first token first (arrival + ``slo_ms``), as long as it can still be met.

    Requests that can no longer meet theirs come behind, in order of arrival, so that one that is lost does not make
    the others late too. After ``max_late_s`` beyond its deadline a request comes before everybody: nothing starves.
    A sequence that has had its first token and lost its slot keeps its place.
    """

    name: ClassVar[str] = "deadline"
    SOURCE: ClassVar[str] = (
        "earliest deadline first: Liu and Layland, Scheduling algorithms for multiprogramming in a hard-real-time "
        "environment, Journal of the ACM, 1973"
    )
    PARAMS: ClassVar[tuple[Param, ...]] = (
        *COMMON,
        Param("default_slo_ms", 1000.0, "time to first token for requests without slo_ms", minimum=0, maximum=1e9),
        Param(
            "max_late_s", 10.0, "seconds after its deadline at which a request comes first of all", minimum=0,
            maximum=1e6,
        ),
    )  # fmt: skip

    default_slo_ms: float
    max_late_s: float

    def rank(self, seq: SeqView) -> tuple[float, ...]:
        slo_ms = self.default_slo_ms if seq.slo_ms is None else seq.slo_ms
        return seq.arrival_ns + int(slo_ms * 1e6), seq.arrival_ns, seq.id

    def order(self, todo: list[SeqView], running: list[SeqView], state: EngineState) -> Iterable[SeqView]:
        now, token_ns = state.now_ns, state.costs.prefill_token_ns
        max_late_ns = int(self.max_late_s * 1e9)
        overdue: list[SeqView] = []
        in_time: list[SeqView] = []
        late: list[SeqView] = []
        for seq in todo:
            slo_ms = self.default_slo_ms if seq.slo_ms is None else seq.slo_ms
            left_ns = seq.arrival_ns + int(slo_ms * 1e6) - now
            if seq.generated or left_ns >= seq.prefill_left * token_ns:
                in_time.append(seq)
            elif left_ns < -max_late_ns:
                overdue.append(seq)
            else:
                late.append(seq)
        overdue.sort(key=_arrival)
        late.sort(key=_arrival)
        return [*overdue, *in_time, *late]


def _arrival(seq: SeqView) -> tuple[int, int]:
    return seq.arrival_ns, seq.id
