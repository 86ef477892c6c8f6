"""Priorities that take the slot and its KV cells away from a less urgent sequence."""

from __future__ import annotations

from typing import ClassVar

from mullama.plugins.parameters import Param
from mullama.scheduling.base import EngineState, Plan, SeqView
from mullama.scheduling.batching import METHOD
from mullama.scheduling.priority import EVER_NS, Priority


class Preemptive(Priority):
    """Like ``priority``, and a more urgent request takes the slot of the least urgent, then newest, running one.

    Only a strictly lower ``priority`` takes a slot, and only where ageing has not put the victim ahead: what was taken
    is therefore never taken back, and nothing starves.
    """

    name: ClassVar[str] = "preemptive"
    SOURCE: ClassVar[str] = "preemption by swap or recompute: Kwon et al., PagedAttention (vLLM), SOSP 2023"
    PARAMS: ClassVar[tuple[Param, ...]] = (
        *Priority.PARAMS,
        METHOD,
        Param("min_run_ms", 20.0, "a sequence keeps its slot this long before it is taken", minimum=0, maximum=1e6),
        Param("max_preemptions", 16, "preempted this often, it keeps its slot to the end; 0: no limit", minimum=0),
    )
    preempts = True

    min_run_ms: float
    max_preemptions: int

    def victims(self, running: list[SeqView], state: EngineState) -> list[SeqView]:
        since = state.now_ns - int(self.min_run_ms * 1e6)
        limit = self.max_preemptions or 1 << 62
        found = [
            (seq.priority, seq.arrival_ns, seq.id, seq)
            for seq in running
            if seq.state_ns <= since and seq.preemptions < limit
        ]
        return [entry[-1] for entry in sorted(found)]

    def yields(self, victim: SeqView, seq: SeqView) -> bool:
        if victim.priority <= seq.priority:
            return False
        # PERF: the comparison of their ranks, written out.
        lead = self.lag_ns(victim.priority) - self.lag_ns(seq.priority) if self._ageing_ns else EVER_NS
        return seq.arrival_ns - victim.arrival_ns < lead

    def blocked(self, plan: Plan, seq: SeqView, running: list[SeqView], state: EngineState) -> None:
        """Come back when the next running sequence may be taken."""
        hold = int(self.min_run_ms * 1e6)
        limit = self.max_preemptions or 1 << 62
        soon = [
            one.state_ns + hold
            for one in running
            if one.state_ns + hold > state.now_ns and one.preemptions < limit and self.yields(one, seq)
        ]
        plan.until_ns = min(soon, default=0)
