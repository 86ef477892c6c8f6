"""The table of a sequence's life."""

from __future__ import annotations

import itertools

import pytest

from mullama.engine.requests import lifecycle
from mullama.types import SeqState

LEGAL = {
    ("waiting", "prefill"), ("waiting", "done"),
    ("prefill", "decode"), ("prefill", "preempted"), ("prefill", "done"),
    ("decode", "preempted"), ("decode", "done"),
    ("preempted", "prefill"), ("preempted", "decode"), ("preempted", "done"),
}  # fmt: skip


def test_the_table_has_a_row_for_every_state() -> None:
    assert set(lifecycle.TRANSITIONS) == set(SeqState)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(SeqState, SeqState)))
def test_every_edge(old: SeqState, new: SeqState) -> None:
    if (str(old), str(new)) in LEGAL:
        assert lifecycle.check(old, new) is new
    else:
        with pytest.raises(lifecycle.IllegalTransition, match=f"{old} -> {new}"):
            lifecycle.check(old, new)


def test_everything_can_end_and_the_end_is_final() -> None:
    for state in SeqState:
        if state is not SeqState.DONE:
            assert SeqState.DONE in lifecycle.TRANSITIONS[state]
    assert lifecycle.TRANSITIONS[SeqState.DONE] == frozenset()


def test_every_state_is_reachable() -> None:
    reached = {SeqState.WAITING}
    while more := {new for old in reached for new in lifecycle.TRANSITIONS[old]} - reached:
        reached |= more
    assert reached == set(SeqState)
