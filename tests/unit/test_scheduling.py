"""The fcfs policy against a simulated engine, and the check of plans."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.errors import PluginError
from mullama.scheduling import POLICIES, EngineState, Fcfs, Plan, SeqView, check_plan
from mullama.types import SeqState


def seq(id: int, state: SeqState = SeqState.WAITING, left: int = 10, **more: int) -> SeqView:  # noqa: A002
    return SeqView(id, state, prompt_tokens=10, prefill_left=left, max_tokens=5, arrival_ns=id, **more)


def state(free_slots: int = 4, max_prefill: int = 512) -> EngineState:
    return EngineState(now_ns=0, step=0, free_slots=free_slots, max_prefill=max_prefill)


def planned(policy: Fcfs, now: EngineState, *seqs: SeqView) -> dict[int, int]:
    for one in seqs:
        policy.add(one)
    plan = policy.plan(now)
    check_plan(plan, {one.id: one for one in seqs}, now)
    return plan.tokens


def test_the_policy_is_found_by_its_name() -> None:
    assert POLICIES["fcfs"] is Fcfs
    assert all(name == policy.name for name, policy in POLICIES.items())


def test_nothing_to_do() -> None:
    assert planned(Fcfs(), state()) == {}


def test_decode_comes_first_and_needs_no_budget() -> None:
    tokens = planned(Fcfs(4), state(), seq(1), seq(2, SeqState.DECODE, 0), seq(3, SeqState.DECODE, 0))
    assert list(tokens.items()) == [(2, 1), (3, 1), (1, 4)]


def test_what_is_left_of_the_budget_goes_to_the_next() -> None:
    assert planned(Fcfs(15), state(), seq(1, SeqState.PREFILL, 10), seq(2), seq(3)) == {1: 10, 2: 5}


def test_the_engines_own_limit_holds() -> None:
    assert planned(Fcfs(512), state(max_prefill=7), seq(1)) == {1: 7}


def test_nobody_overtakes() -> None:
    assert planned(Fcfs(), state(free_slots=1), seq(1), seq(2, left=1)) == {1: 10}
    assert planned(Fcfs(), state(free_slots=0), seq(1), seq(2, left=1)) == {}


def test_without_a_free_slot_started_prompts_go_on() -> None:
    assert planned(Fcfs(), state(free_slots=0), seq(1, SeqState.PREFILL, 3), seq(2)) == {1: 3}


def test_remove_forgets_and_is_harmless_twice() -> None:
    policy = Fcfs()
    policy.add(seq(1))
    policy.remove(1)
    policy.remove(1)
    assert policy.plan(state()).tokens == {}


def test_parameters_are_shown_and_checked() -> None:
    assert Fcfs(7).params() == {"prefill_budget": 7}
    with pytest.raises(ValueError, match="prefill_budget"):
        Fcfs(0)


@pytest.mark.parametrize(
    ("tokens", "known", "reason"),
    [
        ({9: 1}, [seq(1)], "does not exist"),
        ({1: 2}, [seq(1, SeqState.DECODE)], "one token a step"),
        ({1: 0}, [seq(1, SeqState.DECODE)], "one token a step"),
        ({1: 11}, [seq(1)], "10 prompt tokens left"),
        ({1: 0}, [seq(1, SeqState.PREFILL)], "10 prompt tokens left"),
        ({1: -1}, [seq(1, SeqState.PREFILL)], "10 prompt tokens left"),
        ({1: 1}, [seq(1, SeqState.DONE)], "cannot compute"),
        ({1: 1}, [seq(1, SeqState.PREEMPTED)], "cannot compute"),
        ({1: 1}, [seq(1, SeqState.MIGRATING)], "cannot compute"),
        ({1: 1, 2: 1, 3: 1}, [seq(1), seq(2), seq(3)], "2 slots are free"),
        ({1: 10, 2: 10}, [seq(1), seq(2)], "16 are allowed"),
    ],
)
def test_nonsense_is_named(tokens: dict[int, int], known: list[SeqView], reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        check_plan(Plan(tokens), {one.id: one for one in known}, state(free_slots=2, max_prefill=16))


@dataclass
class Arrival:
    at: int
    prompt: int
    output: int


arrivals = st.lists(
    st.builds(Arrival, st.integers(0, 30), st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=12
)


@settings(max_examples=60)
@given(arrivals, st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))
def test_everybody_is_served_in_order(work: list[Arrival], n_slots: int, budget: int, max_prefill: int) -> None:
    """A whole life of an engine: every plan can be carried out, all finish, and prompts start in order of arrival."""
    work.sort(key=lambda one: one.at)
    policy = Fcfs(budget)
    live: dict[int, SeqView] = {}
    started: list[int] = []
    todo = list(enumerate(work))
    for step in range(2000):
        while todo and todo[0][1].at <= step:
            number, one = todo.pop(0)
            live[number] = SeqView(number, SeqState.WAITING, one.prompt, one.prompt, one.output, arrival_ns=one.at)
            policy.add(live[number])
        if not live and not todo:
            break
        running = [s for s in live.values() if s.state is not SeqState.WAITING]
        now = EngineState(step, step, n_slots - len(running), max_prefill)
        plan = policy.plan(now)
        check_plan(plan, live, now)
        assert bool(plan.tokens) == bool(live), "with work to do there is a plan that does some"
        decoding = {s.id for s in running if s.state is SeqState.DECODE}
        assert decoding <= set(plan.tokens), "nobody who decodes is left out"
        for number, n in plan.tokens.items():
            view = live[number]
            if view.state is SeqState.WAITING:
                started.append(number)
                view.state = SeqState.PREFILL
            if view.state is SeqState.PREFILL:
                view.prefill_left -= n
                if view.prefill_left == 0:
                    view.state = SeqState.DECODE
                    view.generated = 1
            else:
                view.generated += 1
            if view.generated >= view.max_tokens:
                policy.remove(number)
                del live[number]
    assert not live and not todo, "somebody starved"
    assert started == sorted(started)
