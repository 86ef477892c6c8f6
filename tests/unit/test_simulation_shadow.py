"""Shadow policies: what they would have done, that they disturb nothing, and what they predict."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_support import Job, TinyEngine
from simulation_support import MS, plain

from mullama.errors import PluginError
from mullama.scheduling import Costs, EngineState, Fcfs, Plan, SeqView, registry
from mullama.simulation import SimConfig
from mullama.simulation.differences import differences
from mullama.simulation.shadow_policy import KEPT, Finished, ShadowPolicy, copy_view
from mullama.types import Preempt, SeqState

STATE = EngineState(now_ns=1000, step=7, free_slots=2, max_prefill=512, n_slots=4)


def view(seq_id: int, state: SeqState = SeqState.WAITING, **more: Any) -> SeqView:
    left = 0 if state is SeqState.DECODE else 100
    return SeqView(seq_id, state, 100, left, 50, seq_id, **more)


def shadow_of(name: str, *views: SeqView, **params: Any) -> ShadowPolicy:
    shadow = ShadowPolicy(registry.create(name, params), name)
    for one in views:
        shadow.add(one)
    return shadow


# -- differences in words -------------------------------------------------------------------------------------------

VIEWS = {
    1: view(1, SeqState.DECODE),
    2: view(2, SeqState.DECODE),
    3: view(3, SeqState.PREFILL),
    4: view(4),
    5: view(5),
    6: view(6, SeqState.PREEMPTED),
}


@pytest.mark.parametrize(
    ("acted", "other", "expected"),
    [
        (Plan({1: 1}), Plan({1: 1}, repeat=9), []),
        (Plan({4: 100, 5: 60}), Plan({5: 60, 4: 100}), [("admit", "would admit 5, 4, not 4, 5, in this order")]),
        (Plan({4: 100}), Plan({5: 100}), [("admit", "would admit 5, not 4")]),
        (Plan(), Plan({6: 1}), [("admit", "would admit 6")]),
        (Plan({4: 9}), Plan(), [("admit", "would admit nobody, not 4")]),
        (Plan({1: 1, 2: 1}), Plan({1: 1}), [("decode", "would not let 2 decode")]),
        (Plan({1: 1}), Plan({2: 1}), [("decode", "would let 2 decode; not let 1 decode")]),
        (Plan({3: 64}), Plan({3: 32}), [("chunk", "would compute 32 tokens of 3, not 64")]),
        (Plan(), Plan({3: 32}), [("chunk", "would let 3 go on with the prompt")]),
        (
            Plan({1: 1, 2: 1}),
            Plan({2: 1, 4: 100}, preempt={1: Preempt.SWAP}),
            [("preempt", "would preempt 1"), ("admit", "would admit 4")],
        ),
        (Plan({}, preempt={1: Preempt.SWAP}), Plan({1: 1}), [("preempt", "would not preempt 1")]),
        (
            Plan({}, preempt={1: Preempt.SWAP}),
            Plan({}, preempt={1: Preempt.RECOMPUTE}),
            [("preempt", "would preempt 1 by recompute, not swap")],
        ),
        (Plan({99: 1}), Plan({}, preempt={98: Preempt.SWAP}), []),
    ],
)
def test_differences(acted: Plan, other: Plan, expected: list[tuple[str, str]]) -> None:
    assert differences(acted, other, VIEWS) == expected


def test_long_lists_are_cut() -> None:
    views = {i: view(i) for i in range(20)}
    ((_, text),) = differences(Plan(), Plan(dict.fromkeys(views, 1)), views)
    assert text == "would admit 0, 1, 2, 3, 4, 5, 14 more"


# -- observing ------------------------------------------------------------------------------------------------------


def test_it_tells_what_it_would_have_done() -> None:
    late, urgent = view(1, priority=5), view(2, priority=0)
    shadow = shadow_of("priority", late, urgent)
    shadow.observe(dataclasses.replace(STATE, free_slots=1), Plan({1: 100}))
    found = shadow.snapshot()
    assert (found["policy"], found["off"]) == ("priority", None)
    assert (found["observed"], found["differed"], found["kinds"]) == (1, 1, {"admit": 1})
    assert found["recent"] == [{"step": 7, "now_ns": 1000, "what": ["would admit 2, not 1"]}]
    assert found["params"]["prefill_budget"] == 512


def test_the_same_policy_never_differs() -> None:
    """fcfs as the shadow of fcfs, through arrivals, ends and cancels."""
    shadow = ShadowPolicy(Fcfs(), "fcfs")

    class Watched(Fcfs):
        def add(self, seq: SeqView) -> None:
            shadow.add(copy_view(seq))
            super().add(seq)

        def remove(self, seq_id: int) -> None:
            shadow.remove(seq_id)
            super().remove(seq_id)

        def plan(self, state: EngineState) -> Plan:
            plan = super().plan(state)
            shadow.observe(state, plan, [copy_view(seq) for seq in self._seqs.values()])
            return plan

    jobs = [Job(i // 2, 30 + 97 * i % 900, 1 + i % 9, cancel_after=7 if i % 5 == 4 else None) for i in range(40)]
    TinyEngine(Watched()).run(2000, jobs)
    found = shadow.snapshot()
    assert found["observed"] > 40
    assert (found["differed"], found["off"]) == (0, None)
    assert not shadow._views


@settings(max_examples=30, deadline=None)
@given(
    jobs=st.lists(
        st.builds(
            Job, at=st.integers(0, 30), prompt=st.integers(1, 700), output=st.integers(1, 20),
            priority=st.integers(0, 3), user=st.sampled_from(["a", "b"]), slo_ms=st.sampled_from([None, 50.0]),
        ),
        max_size=15,
    ),
    name=st.sampled_from(list(registry.BUILTINS)),
)  # fmt: skip
def test_the_engine_is_left_alone(jobs: list[Job], name: str) -> None:
    """Any policy in the shadow: the engine's views are as they were, its run is the same."""
    plain_run = TinyEngine(registry.create("preemptive"))
    plain_run.run(3000, jobs)
    shadow = shadow_of(name)

    class Engine(TinyEngine):
        def arrive(self, job: Job) -> int:
            seq_id = super().arrive(job)
            shadow.add(self.views[seq_id])
            return seq_id

        def _end(self, seq_id: int) -> None:
            shadow.remove(seq_id)
            super()._end(seq_id)

        def _ask(self) -> Plan:
            plan = super()._ask()
            before = copy.deepcopy(self.views)
            shadow.observe(self.state(), plan, self.views.values())
            assert self.views == before
            return plan

    watched = Engine(registry.create("preemptive"))
    watched.run(3000, jobs)
    assert watched.log == plain_run.log
    assert shadow.off is None
    assert shadow.snapshot()["observed"] == len(watched.log)


def test_only_the_last_differences_are_kept() -> None:
    shadow = shadow_of("fcfs", view(1))
    for step in range(KEPT + 20):
        shadow.observe(dataclasses.replace(STATE, step=step), Plan())
    recent = shadow.snapshot()["recent"]
    assert [one["step"] for one in recent] == list(range(20, KEPT + 20))
    assert shadow.snapshot()["differed"] == KEPT + 20


def test_views_are_followed() -> None:
    own = view(1)
    shadow = shadow_of("fcfs", own)
    own.state, own.prefill_left = SeqState.PREFILL, 40
    shadow.update([copy_view(own), view(77)])
    shadow.observe(STATE, Plan({1: 40}))
    assert shadow.snapshot()["differed"] == 0
    own.prefill_left = 10  # not told
    shadow.observe(STATE, Plan({1: 10}))
    assert shadow.snapshot()["kinds"] == {"chunk": 1}


class Bad(Fcfs):
    """Breaks at one method."""

    def __init__(self, where: str, answer: Any = None) -> None:
        super().__init__()
        self.where = where
        self.answer = answer
        self.calls = 0

    def add(self, seq: SeqView) -> None:
        super().add(seq)
        self._maybe("add")

    def remove(self, seq_id: int) -> None:
        super().remove(seq_id)
        self._maybe("remove")

    def plan(self, state: EngineState) -> Plan:
        self.calls += 1
        self._maybe("plan")
        return self.answer if self.answer is not None else super().plan(state)

    def params(self) -> Any:
        self._maybe("params")
        return super().params()

    def _maybe(self, what: str) -> None:
        if self.where == what:
            raise ZeroDivisionError("oops")


@pytest.mark.parametrize("where", ["add", "remove", "plan"])
def test_a_shadow_that_raises_is_switched_off(where: str) -> None:
    policy = Bad(where)
    shadow = ShadowPolicy(policy, "bad")
    for seq_id in (1, 2):
        shadow.add(view(seq_id))
    shadow.remove(1)
    calls = policy.calls
    shadow.observe(STATE, Plan())
    shadow.observe(STATE, Plan())
    shadow.remove(2)
    assert shadow.off is not None
    assert re.fullmatch(rf"{where}\(\) raised ZeroDivisionError: oops \(.*\.py, line \d+\)", shadow.off)
    assert policy.calls - calls == (1 if where == "plan" else 0), "not asked again"
    assert shadow.snapshot()["observed"] == 0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(17, "plan() returned int, not a Plan"), (Plan({5: 1}), "the plan names sequence 5, which does not exist")],
)
def test_a_shadow_that_returns_nonsense_is_switched_off(answer: Any, reason: str) -> None:
    shadow = ShadowPolicy(Bad("", answer), "bad")
    shadow.observe(STATE, Plan())
    assert shadow.off == reason


def test_params_that_raise_are_refused_before_it_runs() -> None:
    with pytest.raises(PluginError, match="cannot be shown: ZeroDivisionError: oops"):
        ShadowPolicy(Bad("params"), "bad")


# -- predicting -----------------------------------------------------------------------------------------------------

CONFIG = SimConfig(n_slots=1)


def window() -> list[Finished]:
    """A long request and, right behind it, nine short ones; arrivals not in order."""
    long = Finished(10**15, 400, 200, user="a", ttft_ms=400.0)
    short = [Finished(10**15 + i * MS, 20, 5, user="b", ttft_ms=2400.0 + i) for i in range(1, 10)]
    return [*short, long, dataclasses.replace(long, arrival_ns=10**15 + 20 * MS, ttft_ms=None)]


def test_active_and_shadow_side_by_side() -> None:
    shadow = shadow_of("srpt")
    found = shadow.predict(
        window(), Fcfs, lambda: registry.create("srpt", {"predictor": "max_tokens"}), plain(), CONFIG
    )
    assert found["requests"] == 11
    assert found["measured"]["p50"] == 2404.5
    # fcfs: 400 ms for its prompt and 199 more tokens, then the short ones one after the other, 60 ms each.
    assert found["active"]["p50"] == pytest.approx(400 + 1990 + 4 * 60 + 20 - 5, abs=1)
    assert found["shadow"]["p50"] == found["active"]["p50"], "short ones go first in both; the long one ran already"
    assert found["shadow"]["p99"] == found["active"]["p99"]
    assert shadow.snapshot()["ttft_ms"] == found


def test_the_shadow_has_its_own_order() -> None:
    requests = [Finished(10**15 + i, 20, tokens) for i, tokens in enumerate((1, 100, 5, 5, 5, 5))]
    srpt = lambda: registry.create("srpt", {"predictor": "max_tokens"})  # noqa: E731
    found = shadow_of("srpt").predict(requests, Fcfs, srpt, plain(), CONFIG)
    assert found["shadow"]["p50"] < 0.5 * found["active"]["p50"]
    assert found["measured"] == {"p50": None, "p90": None, "p99": None}


def test_cached_tokens_and_limits_are_kept() -> None:
    one = Finished(10**15, 100, 1, cached_tokens=60, max_tokens=77)
    seen: list[int] = []

    class Seeing(Fcfs):
        def add(self, seq: SeqView) -> None:
            seen.append(seq.max_tokens)
            super().add(seq)

    found = shadow_of("fcfs").predict([one], Seeing, Fcfs, plain(), CONFIG)
    assert found["active"]["p50"] == 40.0
    assert seen == [77]


def test_running_averages_will_do() -> None:
    costs = Costs(prefill_token_ns=1 * MS, decode_step_ns=10 * MS, swap_token_ns=100)
    found = shadow_of("fcfs").predict([Finished(10**15, 256, 3)], Fcfs, Fcfs, costs, CONFIG)
    assert found["active"]["p50"] == pytest.approx(256, abs=1)
    nothing = shadow_of("fcfs").predict([Finished(10**15, 256, 3)], Fcfs, Fcfs, Costs(), CONFIG)
    assert nothing["active"]["p50"] is None
    assert shadow_of("fcfs").predict([], Fcfs, Fcfs, costs, CONFIG)["requests"] == 0


def test_a_policy_that_cannot_be_simulated_is_no_error() -> None:
    found = shadow_of("fcfs").predict([Finished(10**15, 20, 3)], Fcfs, lambda: Bad("plan"), plain(), CONFIG)
    assert "plan() raised ZeroDivisionError" in found["shadow"]["error"]
    assert found["active"]["p50"] == 20.0
    too_long = shadow_of("fcfs").predict([Finished(10**15, 9000, 3)], Fcfs, Fcfs, plain(), CONFIG)
    assert "needs 9003 tokens" in too_long["active"]["error"]
