"""First come, first served, with continuous batching and chunked prefill: decode first, then the oldest prompts.

Chunked prefill with decodes kept running is Sarathi-Serve's rule (Agrawal et al., OSDI 2024): every step decodes all
running sequences, and what is left of the token budget goes to prompts in order of arrival, so that a long prompt
delays others by one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mullama.scheduling.base import EngineState, Plan, SeqView
from mullama.types import SeqState


class Fcfs:
    """``prefill_budget``: most prompt tokens a step (the engine's own limit holds as well)."""

    name: ClassVar[str] = "fcfs"

    def __init__(self, prefill_budget: int = 512) -> None:
        if prefill_budget < 1:
            raise ValueError("prefill_budget must be at least 1")
        self.prefill_budget = prefill_budget
        self._seqs: dict[int, SeqView] = {}  # in order of arrival

    def add(self, seq: SeqView) -> None:
        self._seqs[seq.id] = seq

    def remove(self, seq_id: int) -> None:
        self._seqs.pop(seq_id, None)

    def plan(self, state: EngineState) -> Plan:
        plan = Plan()
        budget = min(self.prefill_budget, state.max_prefill)
        free_slots = state.free_slots
        for seq in self._seqs.values():
            if seq.state is SeqState.DECODE:
                plan.tokens[seq.id] = 1
        for seq in self._seqs.values():
            if budget == 0:
                break
            if seq.state is SeqState.WAITING:
                if free_slots == 0:
                    break  # strictly in order: nobody overtakes
                free_slots -= 1
            elif seq.state is not SeqState.PREFILL:
                continue
            chunk = min(seq.prefill_left, budget)
            plan.tokens[seq.id] = chunk
            budget -= chunk
        return plan

    def params(self) -> Mapping[str, Any]:
        return {"prefill_budget": self.prefill_budget}
