"""Who loses its slot, when, and what becomes of it: preemptive, round_robin, fair, srpt."""

from __future__ import annotations

from typing import Any

import pytest
from policy_support import MS, Job, TinyEngine, made, moment, planned, replanned, seq

from mullama.scheduling.fair import Fair
from mullama.types import Preempt, SeqState

WAITING, PREFILL, DECODE, PREEMPTED = SeqState.WAITING, SeqState.PREFILL, SeqState.DECODE, SeqState.PREEMPTED


def running(seq_id: int, **more: Any) -> Any:
    return seq(seq_id, DECODE, **{"generated": 20, "cells": 30, **more})


# -- preemptive --------------------------------------------------------------------------------------------------


def test_the_least_urgent_then_newest_loses() -> None:
    seqs = [running(1, priority=3), running(2, priority=9), running(3, priority=9), seq(4, priority=0)]
    plan = planned(made("preemptive"), moment(0), *seqs)
    assert plan.preempt == {3: Preempt.AUTO}
    assert plan.tokens == {1: 1, 2: 1, 4: 10}


def test_an_equally_urgent_one_never_loses() -> None:
    old = seq(9, priority=1, arrival_ns=-(10**15))  # has aged a lot
    plan = planned(made("preemptive"), moment(0), running(1, priority=1), old)
    assert (plan.preempt, plan.tokens, plan.until_ns) == ({}, {1: 1}, 0)


def test_a_free_slot_is_taken_first() -> None:
    plan = planned(made("preemptive"), moment(1), running(1, priority=9), seq(2), seq(3, priority=1))
    assert plan.preempt == {1: Preempt.AUTO}
    assert plan.tokens == {2: 10, 3: 10}
    assert planned(made("preemptive"), moment(1), running(1, priority=9), seq(2)).preempt == {}


def test_what_has_aged_keeps_its_slot() -> None:
    second = 1000 * MS
    aged, urgent = running(1, priority=2, arrival_ns=0), seq(2, priority=0, arrival_ns=9 * second)
    now = {"free_slots": 0, "now_ns": 9 * second}
    assert planned(made("preemptive", ageing_s=5), moment(**now), aged, urgent).preempt == {1: Preempt.AUTO}
    assert planned(made("preemptive", ageing_s=4), moment(**now), aged, urgent).preempt == {}
    assert planned(made("preemptive", ageing_s=0), moment(**now), aged, urgent).preempt == {1: Preempt.AUTO}


def test_a_slot_is_kept_for_a_while_and_the_plan_says_until_when() -> None:
    victim = running(1, priority=9, state_ns=995 * MS)
    policy = made("preemptive", min_run_ms=20)
    plan = planned(policy, moment(0, 1000 * MS), victim, seq(2))
    assert (plan.preempt, plan.until_ns) == ({}, 1015 * MS)
    assert replanned(policy, moment(0, 1015 * MS), victim, policy._seqs[2]).preempt


def test_one_that_was_preempted_often_enough_stays() -> None:
    seqs = [running(1, priority=9, preemptions=2), running(2, priority=5), seq(3)]
    assert planned(made("preemptive", max_preemptions=2), moment(0), *seqs).preempt == {2: Preempt.AUTO}
    assert planned(made("preemptive", max_preemptions=3), moment(0), *seqs).preempt == {1: Preempt.AUTO}
    assert planned(made("preemptive", max_preemptions=0), moment(0), *seqs).preempt == {1: Preempt.AUTO}


@pytest.mark.parametrize("name", ["preemptive", "round_robin", "fair", "srpt"])
@pytest.mark.parametrize("method", list(Preempt))
def test_the_request_says_how_else_the_policy(name: str, method: Preempt) -> None:
    more = {"round_robin": {"quantum_tokens": 5}, "srpt": {"preempt": True, "predictor": "max_tokens"}}
    policy = made(name, method=str(method), **more.get(name, {}))
    seqs = [running(i, priority=9, user="a", max_tokens=500, generated=1) for i in (1, 2)]
    planned(policy, moment(0), *seqs)  # slices begin
    for one in seqs:
        one.generated = 30
    seqs[1].preempt = Preempt.RECOMPUTE
    urgent = [seq(3, user="b", max_tokens=10), seq(4, user="c", max_tokens=10)]
    plan = planned(policy, moment(0), *seqs, *urgent)
    assert plan.preempt.get(1, method) is method
    assert plan.preempt.get(2, Preempt.RECOMPUTE) is Preempt.RECOMPUTE
    assert plan.preempt


def test_without_budget_nobody_is_preempted_in_vain() -> None:
    policy = made("preemptive", prefill_budget=5)
    plan = planned(policy, moment(0), seq(1, PREFILL, priority=-1), running(2, priority=9), seq(3))
    assert (plan.tokens, plan.preempt) == ({1: 5, 2: 1}, {})


def test_cells_are_taken_too() -> None:
    """A slot is free, the cells are not: as many lose theirs as are needed, or nobody."""
    seqs = [running(1, priority=9, cells=100), running(2, priority=9, cells=100), running(3, priority=1, cells=100)]
    urgent = seq(4, left=120, prompt_tokens=120)
    tight = moment(1, free_cells=40)
    assert planned(made("preemptive"), tight, *seqs, urgent).preempt.keys() == {1, 2}
    assert planned(made("preemptive"), tight, *seqs, seq(4, left=900, prompt_tokens=900)).preempt == {}


def test_a_prompt_under_way_may_lose_its_slot() -> None:
    seqs = [seq(1, PREFILL, 300, priority=-2, prompt_tokens=300), seq(2, PREFILL, 100, priority=5), seq(3, left=150)]
    plan = planned(made("preemptive"), moment(0), *seqs)
    assert plan.preempt == {2: Preempt.AUTO}
    assert plan.tokens == {1: 300, 3: 150}


def test_an_urgent_request_does_not_wait_and_the_others_lose_little() -> None:
    """Batch requests on all slots and short urgent ones between them, as in the issue's experiment."""

    def ttft(policy: Any) -> tuple[float, int]:
        engine = TinyEngine(policy, n_slots=4)
        work = [Job(0, 60, 64, priority=10) for _ in range(24)]
        work += [Job(20 + 35 * i, 20, 8, priority=0) for i in range(8)]
        engine.run(3000, work)
        urgent = [i for i, job in engine.jobs.items() if job.priority == 0]
        waits = sorted((engine.served[i].first_token or 10**6) - engine.served[i].arrival for i in urgent)
        return waits[len(waits) // 2], engine.step

    preemptive, steps = ttft(made("preemptive"))
    by_priority, _ = ttft(made("priority"))
    fcfs, fcfs_steps = ttft(made("fcfs"))
    assert preemptive <= 0.25 * fcfs
    assert by_priority <= 0.5 * fcfs
    assert steps <= 1.1 * fcfs_steps


# -- round_robin ---------------------------------------------------------------------------------------------------


def test_whoever_has_used_up_its_quantum_goes_to_the_end() -> None:
    policy = made("round_robin", quantum_tokens=10)
    one, two, waiting = running(1, generated=1), running(2, generated=1, state_ns=5), seq(3)
    assert planned(policy, moment(0), one, two, waiting).repeat == 10
    one.generated, two.generated = 8, 4
    assert replanned(policy, moment(0), one, two, waiting).repeat == 3
    one.generated = 11
    plan = replanned(policy, moment(0), one, two, waiting)
    assert (plan.preempt, plan.tokens) == ({1: Preempt.AUTO}, {2: 1, 3: 10})


def test_without_anybody_waiting_the_quantum_means_nothing() -> None:
    policy = made("round_robin", quantum_tokens=1, quantum_ms=1)
    one = running(1, generated=1)
    planned(policy, moment(0), one)
    one.generated = 100
    plan = replanned(policy, moment(0), one)
    assert (plan.tokens, plan.preempt, plan.repeat, plan.until_ns) == ({1: 1}, {}, 0, 0)


def test_a_new_slice_is_a_new_quantum() -> None:
    policy = made("round_robin", quantum_tokens=10)
    one, waiting = running(1, generated=1), seq(2)
    planned(policy, moment(0), one, waiting)
    one.generated = 11
    one.state, one.state_ns = DECODE, 500 * MS  # it was away and is back
    assert replanned(policy, moment(0), one, waiting).repeat == 10
    one.generated = 20
    assert replanned(policy, moment(0), one, waiting).repeat == 1


def test_a_quantum_in_time() -> None:
    policy = made("round_robin", quantum_tokens=0, quantum_ms=50)
    one, waiting = running(1, generated=1, state_ns=1000 * MS), seq(2)
    plan = planned(policy, moment(0, 1010 * MS), one, waiting)
    assert (plan.preempt, plan.repeat, plan.until_ns) == ({}, 0, 1050 * MS)
    assert replanned(policy, moment(0, 1060 * MS), one, waiting).repeat == 1  # it has not had a token yet
    one.generated = 2
    assert replanned(policy, moment(0, 1060 * MS), one, waiting).preempt == {1: Preempt.AUTO}


def test_no_more_are_preempted_than_wait() -> None:
    policy = made("round_robin", quantum_tokens=1)
    seqs = [running(i, generated=1, state_ns=i) for i in range(1, 5)]
    waiting = seq(5)
    planned(policy, moment(0), *seqs, waiting)
    for one in seqs:
        one.generated = 9
    assert replanned(policy, moment(0), *seqs, waiting).preempt == {1: Preempt.AUTO}  # the longest at it


def test_turns_go_round() -> None:
    """Four long answers on one slot: each gets its slices in turn, and all end close together."""
    engine = TinyEngine(made("round_robin", quantum_tokens=5), n_slots=1)
    engine.run(1000, [Job(0, 4, 40) for _ in range(4)])
    ends = sorted(served.end or 10**6 for served in engine.served.values())
    assert ends[-1] - ends[0] <= 4 * 6
    first = [served.first_token or 10**6 for served in engine.served.values()]
    assert max(first) <= 4 * 7


def test_both_quanta_off_is_first_come_first_served() -> None:
    policy = made("round_robin", quantum_tokens=0)
    assert planned(policy, moment(0), running(1, generated=999), seq(2)).preempt == {}


# -- fair ----------------------------------------------------------------------------------------------------------


def flooded(policy: Any, *, progress: int, user: str = "quiet") -> Any:
    """Two slots held by one tenant, each for so many tokens, and a request of another."""
    seqs = [running(i, user="flood", generated=1) for i in (1, 2)]
    planned(policy, moment(0), *seqs)
    for one in seqs:
        one.generated = 1 + progress
    return planned(policy, moment(0), *seqs, seq(3, user=user))


def test_a_tenant_without_a_slot_takes_one_of_several() -> None:
    assert flooded(made("fair"), progress=16).preempt == {2: Preempt.AUTO}
    assert flooded(made("fair", preempt_after_tokens=0), progress=16).preempt == {}


def test_it_waits_until_the_first_has_run_long_enough() -> None:
    plan = flooded(made("fair", preempt_after_tokens=16), progress=10)
    assert (plan.preempt, plan.repeat) == ({}, 6)
    assert flooded(made("fair", preempt_after_tokens=16), progress=0).repeat == 16


def test_what_came_back_has_to_run_for_as_long_again() -> None:
    policy = made("fair", preempt_after_tokens=16)
    seqs = [running(i, user="flood", generated=1) for i in (1, 2)]
    planned(policy, moment(0), *seqs)
    for one in seqs:
        one.generated, one.state_ns = 40, 500 * MS
    assert planned(policy, moment(0), *seqs, seq(3, user="quiet")).repeat == 16


def test_only_one_request_of_a_tenant_takes_a_slot() -> None:
    policy = made("fair")
    seqs = [running(i, user="flood", generated=1) for i in (1, 2, 3)]
    planned(policy, moment(0), *seqs)
    for one in seqs:
        one.generated = 40
    plan = planned(policy, moment(0), *seqs, seq(4, user="quiet"), seq(5, user="quiet"))
    assert plan.preempt == {3: Preempt.AUTO}


def test_no_tenant_loses_its_last_slot_to_several() -> None:
    policy = made("fair")
    seqs = [running(i, user="flood", generated=1) for i in (1, 2)]
    planned(policy, moment(0), *seqs)
    for one in seqs:
        one.generated = 40
    plan = planned(policy, moment(0), *seqs, seq(3, user="a"), seq(4, user="b"))
    assert plan.preempt == {2: Preempt.AUTO}


def test_who_has_had_more_takes_nothing() -> None:
    policy = Fair()
    policy._served.update(greedy=10_000.0, flood=5.0)
    seqs = [running(i, user="flood", generated=40, state_ns=1) for i in (1, 2)]
    planned(policy, moment(0), *seqs)
    for one in seqs:
        one.generated = 80
    assert planned(policy, moment(0), *seqs, seq(3, user="greedy")).preempt == {}
    policy.remove(3)
    assert planned(policy, moment(0), *seqs, seq(4, user="quiet")).preempt == {2: Preempt.AUTO}


# -- fair: pauses --------------------------------------------------------------------------------------------------


def two_tenants(policy: Fair, *, served: float) -> Any:
    """One tenant decodes in two slots, another's prompt is computed; counters as given."""
    seqs = [running(i, user="flood") for i in (1, 2)] + [running(3, user="other"), seq(4, user="quiet")]
    policy._served.update(flood=100.0, quiet=served)
    return planned(policy, moment(1), *seqs).tokens


def test_a_crowd_pauses_while_the_prompt_of_a_lone_one_is_computed() -> None:
    assert two_tenants(Fair(), served=100.0) == {3: 1, 4: 10}
    assert two_tenants(Fair(pause=False), served=100.0) == {1: 1, 2: 1, 3: 1, 4: 10}
    assert two_tenants(Fair(), served=101.0) == {1: 1, 2: 1, 3: 1, 4: 10}


def test_without_a_prompt_nobody_pauses() -> None:
    seqs = [running(i, user="flood") for i in (1, 2)]
    back = seq(3, PREEMPTED, 0, generated=4, user="quiet")
    assert planned(made("fair"), moment(1), *seqs, back).tokens == {1: 1, 2: 1, 3: 1}


def test_a_stream_of_small_tenants_stops_nobody() -> None:
    """Each step somebody new has a prompt; the tenant with two slots goes on all the same."""
    engine = TinyEngine(made("fair"), n_slots=4)
    crowd = [engine.arrive(Job(0, 5, 40, user="crowd")) for _ in range(2)]
    engine.run(600, [Job(1 + i // 2, 20, 1, user=f"user {i}") for i in range(1000)])
    assert all((engine.served[i].end or 10**6) < 200 for i in crowd)


def test_the_last_slot_of_a_tenant_is_its_own() -> None:
    policy = made("fair")
    one, two = running(1, user="a", generated=1), running(2, user="b", generated=1)
    planned(policy, moment(0), one, two)
    one.generated = two.generated = 90
    assert planned(policy, moment(0), one, two, seq(3, user="c")).preempt == {}


def test_a_tenant_that_runs_takes_nothing() -> None:
    plan = flooded(made("fair"), progress=50, user="flood")
    assert (plan.preempt, plan.repeat) == ({}, 0)


def test_a_flood_does_not_keep_the_quiet_tenant_waiting() -> None:
    def waits(policy: Any, flood: int) -> list[int]:
        engine = TinyEngine(policy, n_slots=4)
        work = [Job(i // 4, 20, 200, user="flood") for i in range(flood)]
        work += [Job(30 + 40 * i, 20, 10, user="quiet") for i in range(10)]
        engine.run(5000, work)
        quiet = [i for i, job in engine.jobs.items() if job.user == "quiet"]
        return [(engine.served[i].first_token or 10**6) - engine.served[i].arrival for i in quiet]

    alone = waits(made("fair"), 0)
    assert max(waits(made("fair"), 40)) <= max(alone)
    assert max(waits(made("fcfs"), 40)) > 20 * max(alone)


# -- srpt ----------------------------------------------------------------------------------------------------------


def test_srpt_preempts_only_if_asked_and_worth_it() -> None:
    def preempted(short: int, **params: Any) -> bool:
        policy = made("srpt", predictor="max_tokens", **params)
        return bool(planned(policy, moment(0), running(1, max_tokens=120), seq(2, max_tokens=short)).preempt)

    assert not preempted(10)
    assert preempted(10, preempt=True)  # 100 left against 10 and a prompt
    assert not preempted(60, preempt=True)
    assert preempted(60, preempt=True, preempt_ratio=1.5)


def test_the_longest_loses() -> None:
    policy = made("srpt", predictor="max_tokens", preempt=True)
    seqs = [running(1, max_tokens=900), running(2, max_tokens=2000), running(3, max_tokens=100), seq(4, max_tokens=5)]
    assert planned(policy, moment(0), *seqs).preempt == {2: Preempt.AUTO}
