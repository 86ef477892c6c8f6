"""Who comes next: fcfs, priority, srpt, deadline, fair, and the mechanics they share."""

from __future__ import annotations

from typing import Any

import pytest
from policy_support import MS, Job, TinyEngine, made, moment, planned, replanned, seq

from mullama.errors import InvalidRequest, PluginError
from mullama.scheduling import Costs
from mullama.scheduling.fair import Fair
from mullama.types import SeqState

WAITING, PREFILL, DECODE, PREEMPTED = SeqState.WAITING, SeqState.PREFILL, SeqState.DECODE, SeqState.PREEMPTED
ALL = ["fcfs", "round_robin", "priority", "preemptive", "fair", "srpt", "deadline"]


def order(name: str, params: dict[str, Any], *seqs: Any, now_ns: int = 1000 * MS, **more: Any) -> list[int]:
    """The sequences in the order in which a policy admits them."""
    plan = planned(made(name, **params), moment(len(seqs), now_ns, **more), *seqs)
    return list(plan.tokens)


# -- the mechanics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_nothing_to_do(name: str) -> None:
    plan = planned(made(name), moment())
    assert (plan.tokens, plan.preempt, plan.repeat, plan.until_ns) == ({}, {}, 0, 0)


@pytest.mark.parametrize("name", ALL)
def test_decode_comes_first_and_needs_no_budget(name: str) -> None:
    waiting, one, two = seq(1), seq(2, DECODE, generated=3), seq(3, DECODE, generated=1)
    plan = planned(made(name, prefill_budget=4), moment(), waiting, one, two)
    assert list(plan.tokens.items()) == [(2, 1), (3, 1), (1, 4)]


@pytest.mark.parametrize("name", ALL)
def test_every_state_is_handled(name: str) -> None:
    """Sequences as another policy may hand them over; those that have ended are left alone."""
    seqs = [
        seq(1, DECODE, generated=4), seq(2, PREFILL, 3), seq(3), seq(4, PREEMPTED, 0, generated=2, cells=12),
        seq(5, PREEMPTED, 7, generated=0), seq(6, SeqState.DONE, 0),
    ]  # fmt: skip
    plan = planned(made(name), moment(), *seqs)
    assert plan.tokens == {1: 1, 2: 3, 3: 10, 4: 1, 5: 7}


@pytest.mark.parametrize("name", ALL)
def test_limits(name: str) -> None:
    def tokens(params: dict[str, Any], state: Any) -> dict[int, int]:
        return planned(made(name, **params), state, seq(1, PREFILL), seq(2), seq(3), seq(4)).tokens

    assert tokens({"chunk": 4}, moment()) == {1: 4, 2: 4, 3: 4, 4: 4}
    assert tokens({"max_running": 3}, moment()) == {1: 10, 2: 10, 3: 10}
    assert tokens({"max_running": 1}, moment()) == {1: 10}
    assert tokens({"prefill_budget": 15}, moment()) == {1: 10, 2: 5}
    assert tokens({}, moment(max_prefill=25)) == {1: 10, 2: 10, 3: 5}
    assert tokens({}, moment(free_slots=2)) == {1: 10, 2: 10, 3: 10}
    assert tokens({}, moment(free_slots=0)) == {1: 10}


@pytest.mark.parametrize("name", ALL)
def test_a_lower_limit_stops_nobody_who_runs(name: str) -> None:
    policy = made(name)
    seqs = [seq(i, DECODE, generated=1) for i in (1, 2, 3)]
    policy.configure(max_running=1)
    assert planned(policy, moment(free_slots=1), *seqs, seq(4)).tokens.keys() == {1, 2, 3}


@pytest.mark.parametrize("name", ALL)
def test_an_admission_needs_cells(name: str) -> None:
    """Its own, and those that the running ones grow into; whoever has the machine alone is always let in."""
    running, waiting = seq(1, DECODE, generated=1, cells=11), seq(2, left=10)
    enough = 33 + 10 + 33  # the running one's next steps, the prompt, and its next steps
    policy = made(name)
    assert planned(policy, moment(free_cells=enough - 1), running, waiting).tokens == {1: 1}
    assert replanned(policy, moment(free_cells=enough), running, waiting).tokens == {1: 1, 2: 10}
    assert planned(made(name), moment(free_cells=3), seq(1)).tokens == {1: 10}


def test_each_admission_takes_its_cells() -> None:
    each = 10 + 33
    seqs = [seq(1), seq(2), seq(3)]
    assert planned(made("fcfs"), moment(free_cells=2 * each), *seqs).tokens == {1: 10, 2: 10}
    assert planned(made("fcfs"), moment(free_cells=2 * each - 1), *seqs).tokens == {1: 10}


def test_nobody_overtakes_one_that_does_not_fit() -> None:
    seqs = [seq(1, DECODE, generated=1), seq(2, left=500, prompt_tokens=500), seq(3)]
    assert planned(made("fcfs"), moment(free_cells=400), *seqs).tokens == {1: 1}


def test_a_sequence_about_to_end_needs_few_cells() -> None:
    running = seq(1, DECODE, generated=48, max_tokens=50)
    assert 2 in planned(made("fcfs"), moment(free_cells=2 + 10 + 33), running, seq(2)).tokens


@pytest.mark.parametrize("name", ALL)
def test_remove_forgets_and_is_harmless_twice(name: str) -> None:
    policy = made(name)
    policy.add(seq(1))
    policy.remove(1)
    policy.remove(1)
    policy.remove(99)
    assert policy.plan(moment()).tokens == {}


# -- fcfs --------------------------------------------------------------------------------------------------------


def test_fcfs_goes_by_arrival_whatever_the_order_of_add() -> None:
    assert order("fcfs", {}, seq(3), seq(1), seq(2)) == [1, 2, 3]
    assert order("fcfs", {}, seq(1, arrival_ns=9), seq(2, arrival_ns=8), seq(3, arrival_ns=8)) == [2, 3, 1]


def test_fcfs_resumes_before_it_admits() -> None:
    preempted = [seq(7, PREEMPTED, 0, generated=1), seq(5, PREEMPTED, 30, generated=20)]
    assert order("fcfs", {}, seq(1), *preempted, seq(2)) == [5, 7, 1, 2]


def test_a_resumed_sequence_needs_no_prompt_budget() -> None:
    """The budget is spent on a prompt under way; a sequence with its KV saved goes on beside it."""
    policy = made("fcfs", prefill_budget=4)
    assert planned(policy, moment(), seq(1, PREFILL), seq(2, PREEMPTED, 0, generated=3)).tokens == {1: 4, 2: 1}


# -- priority ----------------------------------------------------------------------------------------------------


def test_the_lowest_number_goes_first_and_arrival_breaks_ties() -> None:
    seqs = [seq(1, priority=1), seq(2, priority=0), seq(3, priority=-5), seq(4, priority=0)]
    assert order("priority", {}, *seqs) == [3, 2, 4, 1]
    assert order("priority", {"ageing_s": 0}, *seqs) == [3, 2, 4, 1]


def test_prompts_under_way_are_computed_by_priority_too() -> None:
    seqs = [seq(1, PREFILL, 10, priority=3), seq(2, PREFILL, 10, priority=1), seq(3, priority=2)]
    plan = planned(made("priority", prefill_budget=25), moment(), *seqs)
    assert list(plan.tokens.items()) == [(2, 10), (3, 10), (1, 5)]


def test_ageing_is_worth_one_priority_each_time() -> None:
    second = 1000 * MS
    old, new = seq(1, priority=2, arrival_ns=0), seq(2, priority=0, arrival_ns=9 * second)
    assert order("priority", {"ageing_s": 5}, old, new) == [2, 1]  # 9 s earlier, 2 x 5 s would be needed
    assert order("priority", {"ageing_s": 4}, old, new) == [1, 2]
    assert order("priority", {"ageing_s": 0}, old, new) == [2, 1]


def test_a_preempted_sequence_keeps_its_place_in_its_class() -> None:
    seqs = [seq(1, priority=1), seq(2, PREEMPTED, 0, generated=1, priority=1), seq(3, priority=1), seq(4, priority=0)]
    assert order("priority", {}, *seqs) == [4, 1, 2, 3]


def test_ageing_can_be_changed_while_requests_wait() -> None:
    policy = made("priority", ageing_s=0, max_running=1)
    seqs = [seq(1, priority=1, arrival_ns=0), seq(2, priority=0, arrival_ns=2000 * MS)]
    assert list(planned(policy, moment(), *seqs).tokens) == [2]
    policy.configure(ageing_s=1)
    assert list(replanned(policy, moment(), *seqs).tokens) == [1]


# -- srpt --------------------------------------------------------------------------------------------------------


def test_srpt_by_the_limit() -> None:
    seqs = [seq(1, max_tokens=300), seq(2, max_tokens=20), seq(3, PREEMPTED, 0, generated=290, max_tokens=300)]
    assert order("srpt", {"predictor": "max_tokens"}, *seqs) == [3, 2, 1]


def test_srpt_counts_the_prompt_by_its_cost() -> None:
    seqs = [seq(1, left=1000, prompt_tokens=1000, max_tokens=10), seq(2, max_tokens=60)]
    cheap = Costs(prefill_token_ns=10_000, decode_step_ns=10_000_000)
    dear = Costs(prefill_token_ns=1_000_000, decode_step_ns=10_000_000)
    by_limit = {"predictor": "max_tokens", "prefill_budget": 4096}
    assert order("srpt", by_limit, *seqs, costs=cheap, max_prefill=4096) == [1, 2]
    assert order("srpt", by_limit, *seqs, costs=dear, max_prefill=4096) == [2, 1]


def test_srpt_counts_what_bringing_back_costs() -> None:
    seqs = [seq(1, PREEMPTED, 0, generated=10, max_tokens=20, cells=400), seq(2, max_tokens=11)]
    for swap, expected in ((10_000, [1, 2]), (100_000, [2, 1])):
        costs = Costs(prefill_token_ns=100_000, decode_step_ns=10_000_000, swap_token_ns=swap)
        assert order("srpt", {"predictor": "max_tokens"}, *seqs, costs=costs) == expected


def test_no_prediction_is_beyond_the_limit(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    def predict(self, seq):\n        return 10**6 - seq.id\n")
    seqs = [seq(1, max_tokens=30), seq(2, max_tokens=500)]
    assert order("srpt", {"predictor": f"{file}:Mine"}, *seqs) == [1, 2]


def test_the_mean_is_learned_per_user() -> None:
    policy = made("srpt")
    for seq_id, user, tokens in ((1, "long", 90), (2, "long", 110), (3, "short", 10)):
        one = seq(seq_id, user=user, max_tokens=500)
        policy.add(one)
        one.state, one.prefill_left, one.generated = DECODE, 0, tokens
        policy.remove(seq_id)
    seqs = [seq(4, user="long", max_tokens=500), seq(5, user="new", max_tokens=500), seq(6, user="short")]
    assert list(planned(policy, moment(), *seqs).tokens) == [6, 5, 4]  # 10, 70 on average, 100


def test_a_request_without_an_answer_teaches_nothing() -> None:
    policy = made("srpt")
    policy.add(seq(1, user="a"))
    policy.remove(1)
    assert list(planned(policy, moment(), seq(2, user="a", max_tokens=30), seq(3, max_tokens=20)).tokens) == [3, 2]


def test_whoever_outlives_the_prediction_is_expected_to_go_on() -> None:
    """A forgotten elephant is not taken for a mouse."""
    policy = made("srpt")
    policy.add(seq(1))
    policy._seqs[1].generated = 10
    policy.remove(1)  # the mean is 10 now
    elephant = seq(2, PREEMPTED, 0, max_tokens=500)
    policy.add(elephant)
    elephant.generated = 200
    mouse = seq(3, max_tokens=500)
    policy.add(mouse)
    assert list(replanned(policy, moment(), elephant, mouse).tokens) == [3, 2]


def test_a_predictor_of_ones_own(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Reverse:\n    def predict(self, seq):\n        return 1000 - seq.id\n")
    seqs = [seq(i, max_tokens=5000) for i in (1, 2, 3)]
    assert order("srpt", {"predictor": f"{file}:Reverse"}, *seqs) == [3, 2, 1]


@pytest.mark.parametrize(
    ("body", "error", "reason"),
    [
        ("class Other: pass", InvalidRequest, "its classes are Other"),
        ("class Mine: pass", PluginError, "no method predict"),
        ("class Mine:\n    def __init__(self, x): pass\n    def predict(self, seq): pass", PluginError, "cannot make"),
    ],
)
def test_a_wrong_predictor_is_named(tmp_path: Any, body: str, error: type[Exception], reason: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(body)
    policy = made("srpt")
    with pytest.raises(error, match=reason):
        policy.configure(predictor=f"{file}:Mine", preempt=True)
    assert policy.params()["predictor"] == "mean" and policy.params()["preempt"] is False


def test_unknown_predictors_and_wrong_answers(tmp_path: Any) -> None:
    with pytest.raises(InvalidRequest, match="no predictor 'median'; there are max_tokens, mean"):
        made("srpt", predictor="median")
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    def predict(self, seq): return float('nan')")
    with pytest.raises(PluginError, match="says nan"):
        made("srpt", predictor=f"{file}:Mine").add(seq(1))


def test_shortest_first_shortens_the_mean() -> None:
    """What the policy is for: with known lengths the mean time to the end is less than first come, first served."""

    def mean(policy: Any) -> float:
        engine = TinyEngine(policy, n_slots=2)
        engine.run(2000, [Job(0, 5, 60 if i % 2 == 0 else 5) for i in range(20)])
        return sum(one.end or 10**6 for one in engine.served.values()) / len(engine.served)

    assert mean(made("srpt", predictor="max_tokens")) < 0.7 * mean(made("fcfs"))


# -- deadline ----------------------------------------------------------------------------------------------------


def test_the_earliest_deadline_first() -> None:
    seqs = [seq(1, slo_ms=900.0), seq(2, slo_ms=100.0), seq(3)]
    assert order("deadline", {"default_slo_ms": 500}, *seqs, now_ns=4 * MS) == [2, 3, 1]


def test_what_is_lost_comes_behind_in_order_of_arrival() -> None:
    seqs = [seq(1, slo_ms=60.0), seq(2, slo_ms=30.0), seq(3, slo_ms=500.0), seq(4, slo_ms=400.0)]
    assert order("deadline", {}, *seqs, now_ns=100 * MS) == [4, 3, 1, 2]


def test_a_prompt_that_takes_too_long_is_lost_already() -> None:
    seqs = [seq(1, left=100, prompt_tokens=100, slo_ms=100.0), seq(2, slo_ms=500.0)]
    assert order("deadline", {}, *seqs, now_ns=50 * MS) == [1, 2]
    assert order("deadline", {}, *seqs, now_ns=50 * MS, costs=Costs(prefill_token_ns=MS)) == [2, 1]


def test_very_late_comes_first() -> None:
    seqs = [seq(1, slo_ms=10.0), seq(2, slo_ms=900.0, arrival_ns=2900 * MS)]
    assert order("deadline", {"max_late_s": 5}, *seqs, now_ns=3000 * MS) == [2, 1]
    assert order("deadline", {"max_late_s": 2}, *seqs, now_ns=3000 * MS) == [1, 2]


def test_a_sequence_that_has_had_its_first_token_keeps_its_place() -> None:
    seqs = [seq(1, PREEMPTED, 0, slo_ms=10.0, generated=5), seq(2, slo_ms=2000.0)]
    assert order("deadline", {}, *seqs, now_ns=1000 * MS) == [1, 2]


# -- fair --------------------------------------------------------------------------------------------------------


def test_tenants_take_turns() -> None:
    seqs = [seq(i, user="flood") for i in range(1, 5)] + [seq(5, user="quiet"), seq(6, user="quiet")]
    assert order("fair", {}, *seqs) == [1, 5, 2, 6, 3, 4]


def test_what_is_let_in_counts_at_once() -> None:
    long = [seq(i, left=100, prompt_tokens=100, user="long") for i in (1, 2)]
    assert order("fair", {}, *long, *(seq(i, user="short") for i in range(3, 8))) == [1, 3, 4, 5, 6, 7, 2]


def test_only_who_had_nothing_queued_is_lifted() -> None:
    policy = Fair()
    policy._served.update(busy=50.0, other=500.0)
    for i, user in ((1, "other"), (2, "busy"), (3, "busy")):
        policy.add(seq(i, user=user))
    assert policy._served == {"busy": 500.0, "other": 500.0}  # lifted by 2, when only "other" was queued
    policy._served["busy"] = 400.0
    policy.add(seq(4, user="busy"))
    policy.add(seq(5, user="new"))
    assert policy._served == {"busy": 400.0, "other": 500.0, "new": 400.0}


def prompts(served: dict[str | None, float], *seqs: Any) -> dict[int, int]:
    """What ``fair`` computes of these with a budget of 15 tokens, the counters being so."""
    policy = Fair(prefill_budget=15)
    for one in seqs:
        policy.add(one)
    policy._served.update(served)
    return policy.plan(moment()).tokens


def test_the_slot_of_a_prompt_does_not_count_against_it() -> None:
    flood = [seq(i, PREFILL, user="flood") for i in (1, 2)]
    assert prompts({"flood": 100, "quiet": 500}, *flood, seq(3, PREFILL, user="quiet")) == {3: 10, 1: 5}


def test_a_prompt_under_way_is_not_held_against_its_tenant() -> None:
    """It was charged whole when it left the queue; whoever had the turn then keeps it."""
    long = seq(1, PREFILL, 90, user="a", prompt_tokens=200)
    assert prompts({"a": 300, "b": 150}, long, seq(2, user="b")) == {1: 15}
    assert prompts({"a": 400, "b": 150}, long, seq(2, user="b")) == {2: 10, 1: 5}


def test_requests_without_a_user_are_one_tenant() -> None:
    assert order("fair", {}, seq(1), seq(2), seq(3), seq(4, user="a")) == [1, 4, 2, 3]


def test_service_is_charged_by_weight() -> None:
    policy = made("fair", weight_input=1, weight_output=2)
    a, b = seq(1, user="a", left=30, prompt_tokens=30), seq(2, user="b")
    planned(policy, moment(), a, b)
    for one, generated in ((a, 5), (b, 20)):
        one.state, one.prefill_left, one.generated = DECODE, 0, generated
    replanned(policy, moment(), a, b)
    assert policy._served == {"a": 30 + 2 * 5, "b": 10 + 2 * 20}
    a.generated = 6
    policy.remove(1)
    assert policy._served["a"] == 42
    waiting = [seq(3, user="b"), seq(4, user="a")]
    assert list(planned(policy, moment(), b, *waiting).tokens) == [2, 4, 3]


def test_a_tenant_without_a_slot_comes_before_one_with_several() -> None:
    policy = Fair(pause=False)
    policy._served.update(rich=900.0, poor=10.0)
    policy._last_user = "poor"
    for one in (seq(1, DECODE, generated=1, user="poor"), seq(2, user="poor"), seq(3, user="rich")):
        policy.add(one)
    assert list(policy.plan(moment(2)).tokens) == [1, 3, 2]


def test_nobody_saves_up_service_by_being_away() -> None:
    """A tenant that comes back starts level with those who queue, not with its old counter."""
    engine = TinyEngine(made("fair", preempt_after_tokens=0), n_slots=1)
    engine.run(1000, [Job(0, 1, 1, user="away"), *(Job(1, 10, 20, user="busy") for _ in range(10))][:6])
    work = [*(Job(engine.step, 10, 20, user="busy") for _ in range(6))]
    work += [Job(engine.step, 10, 20, user="away") for _ in range(6)]
    begin = len(engine.served)
    engine.run(1000, work)
    ends = sorted((engine.served[i].end or 0, engine.jobs[i].user) for i in range(begin + 1, begin + 13))
    first = [user for _, user in ends[:6]]
    assert first.count("away") in (3, 4)  # in turns from the beginning, no six in a row


def test_with_an_empty_queue_whoever_comes_starts_level_with_the_last() -> None:
    policy = Fair()
    one = seq(1, left=100, prompt_tokens=100, user="a")
    planned(policy, moment(), one)
    one.state, one.prefill_left, one.generated = DECODE, 0, 50
    replanned(policy, moment(), one)
    policy.remove(1)
    policy.add(seq(2, user="b"))
    assert policy._served == {"a": 200.0, "b": 200.0}


def test_what_is_served_between_two_plans_is_charged() -> None:
    policy = Fair()
    answered, cancelled = seq(1, user="a"), seq(2, user="b")
    planned(policy, moment(), answered, cancelled)
    answered.state, answered.generated = SeqState.DONE, 1
    policy.remove(1)
    policy.remove(2)
    assert policy._served == {"a": 12.0, "b": 0.0}


def test_a_handed_over_sequence_is_not_charged_for_its_past() -> None:
    policy = made("fair")
    planned(policy, moment(), seq(1, DECODE, generated=40, user="a"), seq(2, PREEMPTED, 0, generated=7, user="b"))
    assert policy._served == {"a": 0.0, "b": 0.0}


def test_tenants_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mullama.scheduling.fair.TENANTS_KEPT", 10)
    policy = made("fair")
    policy.add(seq(1, user="stays"))
    for i in range(2, 100):
        policy.add(seq(i, user=f"user {i}"))
        policy.remove(i)
    assert len(policy._served) <= 11
    assert "stays" in policy._served
    assert planned(policy, moment(), seq(1, user="stays")).tokens


def test_equal_shares_for_unequal_demand() -> None:
    """Two tenants who both always want more get the same service, whatever the number of their requests."""
    engine = TinyEngine(made("fair", preempt_after_tokens=0), n_slots=4)
    flood = [Job(0, 10, 30, user="flood") for _ in range(60)]
    engine.run(100, [*flood, *(Job(0, 10, 30, user="steady") for _ in range(10))])
    tokens = {"flood": 0, "steady": 0}
    for seq_id, served in engine.served.items():
        tokens[str(engine.jobs[seq_id].user)] += served.tokens
    assert 0.8 < tokens["flood"] / tokens["steady"] < 1.25
