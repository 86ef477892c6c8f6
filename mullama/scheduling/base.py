"""What a scheduler sees and what it decides. Sans-I/O: no clock, thread, model or event loop.

A policy is asked for a plan only when something changed: an arrival, a finish, a cancelled request, a prefill chunk
done. Between those moments the core repeats the plan without calling Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from mullama.errors import PluginError
from mullama.types import SeqState


@dataclass(slots=True)
class SeqView:
    """One sequence as a policy sees it. The engine keeps it up to date; a policy only reads it."""

    id: int
    state: SeqState
    prompt_tokens: int
    prefill_left: int  # prompt tokens not yet in the KV cache (an upper bound while WAITING: a prefix may match)
    max_tokens: int
    arrival_ns: int
    generated: int = 0
    priority: int = 0
    user: str | None = None


@dataclass(slots=True, frozen=True)
class EngineState:
    """The moment a plan is asked for."""

    now_ns: int
    step: int
    free_slots: int  # sequences that may leave WAITING now
    max_prefill: int  # most prompt tokens one step may compute


@dataclass(slots=True)
class Plan:
    """``tokens``: for each sequence taking part, how many tokens this step: 1 to decode, or a prefill chunk.

    A WAITING sequence that is given tokens is admitted, in the order of the mapping. A plan with chunks holds for one
    step; one without is repeated ``repeat`` times (0: until something changes).
    """

    tokens: dict[int, int] = field(default_factory=dict)
    repeat: int = 0


class Scheduler(Protocol):
    """Decides who computes what. Called on the engine thread; must return within milliseconds."""

    name: ClassVar[str]

    def add(self, seq: SeqView) -> None:
        """A request arrived (state WAITING)."""

    def remove(self, seq_id: int) -> None:
        """It ended, whatever the reason."""

    def plan(self, state: EngineState) -> Plan:
        """Decide the next step."""

    def params(self) -> Mapping[str, Any]:
        """The policy's parameters and their values."""


def check_plan(plan: Plan, known: Mapping[int, SeqView], state: EngineState) -> None:
    """Raise PluginError, saying what is wrong, unless the engine can carry out ``plan``."""
    admitted = 0
    prefill = 0
    for seq_id, n in plan.tokens.items():
        seq = known.get(seq_id)
        if seq is None:
            raise PluginError(f"the plan names sequence {seq_id}, which does not exist")
        if seq.state is SeqState.DECODE:
            if n != 1:
                raise PluginError(f"sequence {seq_id} decodes: one token a step, the plan says {n}")
        elif seq.state in (SeqState.PREFILL, SeqState.WAITING):
            if not 1 <= n <= seq.prefill_left:
                raise PluginError(f"sequence {seq_id} has {seq.prefill_left} prompt tokens left, the plan says {n}")
            prefill += n
            admitted += seq.state is SeqState.WAITING
        else:
            raise PluginError(f"sequence {seq_id} is {seq.state} and cannot compute")
    if admitted > state.free_slots:
        raise PluginError(f"the plan admits {admitted} sequences, {state.free_slots} slots are free")
    if prefill > state.max_prefill:
        raise PluginError(f"the plan computes {prefill} prompt tokens, {state.max_prefill} are allowed")
