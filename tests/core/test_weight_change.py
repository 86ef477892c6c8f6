"""A change of weights as a machine with states: its table, and what its hook does at a step boundary."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from mullama.engine.weights import change
from mullama.engine.weights.change import TRANSITIONS, ChangeState, IllegalChange, WeightChange
from mullama.engine.weights.in_charge import Weights
from mullama.errors import EngineDead, ModelBusy, ModelLoadError
from mullama.types import KvMode

ENDS = {ChangeState.IN_CHARGE, ChangeState.KEPT, ChangeState.LOST}


class Change(WeightChange):
    """Warm after ``n_warm`` slices; ``error`` is raised by the exchange, which then leaves it in ``ends_in``."""

    mode = "fake"

    def __init__(self, kv: KvMode = KvMode.CARRY, n_warm: int = 2, error: Exception | None = None) -> None:
        self.n_vacated = 0
        parts: Any = SimpleNamespace(weights=Weights(), seqs=SimpleNamespace(vacate_all=self.vacate))
        super().__init__(parts, "x.gguf", "x", kv)
        self.parts = parts
        self.n_warm = n_warm
        self.error = error
        self.ends_in = ChangeState.KEPT
        self.n_abandoned = 0
        self._begin()

    def vacate(self) -> int:
        self.n_vacated += 1
        return 3

    def _prepare(self) -> None: ...

    def _enter(self) -> None:
        self.move(ChangeState.WARMING)

    def _warm(self, until_ns: int) -> bool:
        self.n_warm -= 1
        return self.n_warm <= 0

    def _exchange(self, recomputed: int) -> tuple[int, int]:
        if self.error is not None:
            if self.ends_in is not ChangeState.KEPT:
                self.move(ChangeState.UNLOADED)
                self.move(self.ends_in)
            raise self.error
        self.move(ChangeState.IN_CHARGE)
        return 3 - recomputed, 100

    def _abandon(self) -> None:
        self.n_abandoned += 1

    def _clean_up(self) -> None: ...


def test_every_state_is_reached_and_the_ends_are_final() -> None:
    reached = {ChangeState.LOADING}
    while more := {new for old in reached for new in TRANSITIONS[old]} - reached:
        reached |= more
    assert reached == set(TRANSITIONS) == set(ChangeState)
    assert {state for state, following in TRANSITIONS.items() if not following} == ENDS
    assert all(ChangeState.KEPT in TRANSITIONS[state] for state in set(ChangeState) - ENDS), "before, all can be undone"


@pytest.mark.parametrize(("old", "new"), list(itertools.product(ChangeState, ChangeState)))
def test_every_edge(old: ChangeState, new: ChangeState) -> None:
    one = Change()
    one.state = old
    if new in TRANSITIONS[old]:
        one.move(new)
        assert one.state is new
    else:
        with pytest.raises(IllegalChange, match=f"{old} -> {new}"):
            one.move(new)


@pytest.mark.parametrize("kv", [KvMode.CARRY, KvMode.RECOMPUTE])
def test_it_takes_over_at_a_quiet_boundary_after_the_one_that_warmed(kv: KvMode, monkeypatch: Any) -> None:
    monkeypatch.setattr(change, "MAX_POSTPONED_S", 3600.0)
    one = Change(kv)
    assert one.parts.weights.change is one
    states = []
    for quiet in (True, True, False, False):
        assert one.at_boundary(busy=True, quiet=quiet), "the plan holds"
        states.append(one.state)
    assert states == [ChangeState.WARMING, ChangeState.READY, ChangeState.READY, ChangeState.READY]
    assert one.at_boundary(busy=True, quiet=True) is (kv is KvMode.CARRY), "empty slots are no part of any plan"
    assert (one.state, one.n_vacated) == (ChangeState.IN_CHARGE, int(kv is KvMode.RECOMPUTE))
    found = one._moved.result(timeout=0)
    assert (found.moved, found.recomputed, found.n_bytes) == ((3, 0, 100) if kv is KvMode.CARRY else (0, 3, 100))
    assert one.parts.weights.change is None


def test_who_is_never_quiet_does_not_put_it_off_for_ever(monkeypatch: Any) -> None:
    monkeypatch.setattr(change, "MAX_POSTPONED_S", 0.0)
    one = Change(n_warm=1)
    one.at_boundary(busy=True, quiet=False)
    one.at_boundary(busy=True, quiet=False)
    assert one.state is ChangeState.IN_CHARGE


def test_where_nothing_runs_one_boundary_is_enough() -> None:
    one = Change(n_warm=1)
    one.at_boundary(busy=False, quiet=True)
    assert one.state is ChangeState.IN_CHARGE


@pytest.mark.parametrize("kv", [KvMode.CARRY, KvMode.RECOMPUTE])
def test_what_fails_leaves_the_old_weights(kv: KvMode) -> None:
    one = Change(kv, n_warm=1, error=ModelLoadError("no such luck"))
    assert one.at_boundary(busy=False, quiet=True) is (kv is KvMode.CARRY)
    assert (one.state, one.n_abandoned, one.parts.weights.change) == (ChangeState.KEPT, 1, None)
    with pytest.raises(ModelLoadError, match="no such luck"):
        one._moved.result(timeout=0)


def test_without_any_weights_the_engine_ends() -> None:
    one = Change(n_warm=1, error=EngineDead("neither"))
    one.ends_in = ChangeState.LOST
    with pytest.raises(EngineDead, match="neither"):
        one.at_boundary(busy=False, quiet=True)
    assert (one.state, one.n_abandoned) == (ChangeState.LOST, 0)
    with pytest.raises(EngineDead, match="neither"):
        one._moved.result(timeout=0)


def test_an_engine_that_ends_abandons_it() -> None:
    one = Change()
    one.abort(EngineDead("it stopped"))
    assert (one.state, one.n_abandoned, one.parts.weights.change) == (ChangeState.KEPT, 1, None)
    with pytest.raises(EngineDead, match="stopped"):
        one._moved.result(timeout=0)


def test_one_change_at_a_time() -> None:
    weights = Weights()
    with weights.held():
        assert weights.is_changing
        with pytest.raises(ModelBusy, match="being changed now"), weights.held():
            pass
    assert not weights.is_changing
    compared = threading.Event()
    with weights.comparing:
        thread = threading.Thread(target=lambda: (weights.close(), compared.set()))
        thread.start()
        assert not compared.wait(0.05), "who compares is waited for"
    thread.join()
    assert compared.is_set()
