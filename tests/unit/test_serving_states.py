"""The states of a served model: the table, the moves, and what clients are told."""

from __future__ import annotations

import pytest

from mullama.serving.states import TRANSITIONS, IllegalMove, ModelState, Served


def test_every_state_is_reached_and_left() -> None:
    assert set(TRANSITIONS) == set(ModelState)
    reached, border = {ModelState.UNLOADED}, [ModelState.UNLOADED]
    while border:
        for state in TRANSITIONS[border.pop()] - reached:
            reached.add(state)
            border.append(state)
    assert reached == set(ModelState)
    assert all(TRANSITIONS.values())


@pytest.mark.parametrize("old", ModelState)
@pytest.mark.parametrize("new", ModelState)
def test_a_move_that_is_not_in_the_table_raises(old: ModelState, new: ModelState) -> None:
    served = Served("a", "ref", -1.0, state=old)
    if new is old or new in TRANSITIONS[old]:
        served.move(new)
        assert served.state is new
    else:
        with pytest.raises(IllegalMove, match=f"a: {old} -> {new}"):
            served.move(new)
        assert served.state is old


def test_clients_are_told_of_six_states() -> None:
    told = {state: state.shown for state in ModelState}
    assert set(told.values()) == {"unloaded", "loading", "ready", "unloading", "asleep", "failed"}
    own = {state: shown for state, shown in told.items() if state != shown}
    assert own == {"yielding": "unloading", "falling_asleep": "unloading", "waking": "loading"}
