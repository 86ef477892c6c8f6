"""The life of a sequence, as a table. Illegal moves raise.

    WAITING -> PREFILL -> DECODE -> DONE      and any state -> DONE (cancel, error)
    PREFILL, DECODE -> PREEMPTED -> PREFILL | DECODE        (KV saved to host, or dropped)

Other weights are no state of a sequence: they come between two steps, where nobody could see it. What goes on on its KV
stays what it is, for how long too (a policy's slices go by ``state_ns``); what is computed again was PREEMPTED.

docs/architecture.md draws it from TRANSITIONS (a test compares).
"""

from __future__ import annotations

from mullama.types import SeqState

S = SeqState

TRANSITIONS: dict[SeqState, frozenset[SeqState]] = {
    S.WAITING: frozenset({S.PREFILL, S.DONE}),
    S.PREFILL: frozenset({S.DECODE, S.PREEMPTED, S.DONE}),
    S.DECODE: frozenset({S.PREEMPTED, S.DONE}),
    S.PREEMPTED: frozenset({S.PREFILL, S.DECODE, S.DONE}),
    S.DONE: frozenset(),
}


class IllegalTransition(RuntimeError):
    """A bug in the engine: a sequence was moved along an edge that does not exist."""


def check(old: SeqState, new: SeqState) -> SeqState:
    """Return ``new`` if a sequence may go there from ``old``."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"{old} -> {new}")
    return new
