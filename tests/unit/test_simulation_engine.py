"""The simulated engine: closed forms, what holds for any workload and policy, and the rules of the real engine."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation_support import MS, costs, plain, workload

from mullama.errors import ConfigError, PluginError
from mullama.scheduling import EngineState, Fcfs, Plan, SeqView, registry
from mullama.simulation import Override, SimConfig, simulate
from mullama.types import Preempt, SeqState
from mullama.workload.base import Client, Outcome, TraceRequest, Workload
from mullama.workload.spec import parse_workload

POLICIES = tuple(registry.BUILTINS)


def make(name: str) -> Any:
    return registry.create(name, {"preempt": True, "preempt_ratio": 1} if name == "srpt" else {})


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "out"), [(1, 1), (100, 1), (100, 40), (512, 7)])
def test_one_request_alone(prompt: int, out: int) -> None:
    """Its prompt, then one step a token."""
    (outcome,) = simulate(workload((2.0, prompt, out)), Fcfs(), plain()).outcomes
    expected = [2.0 + (prompt * MS + i * 10 * MS) / 1e9 for i in range(out)]
    assert outcome.token_s == pytest.approx(expected, abs=1e-9)
    assert outcome.finished_s == outcome.token_s[-1]


def test_every_cost_is_where_it_belongs() -> None:
    model = plain(
        wake_ns=1, admit_ns=10, plan_ns=100, rebuild_ns=1_000, step_ns=10_000, greedy_ns=100_000, token_ns=1_000_000,
        deliver_ns=10_000_000, output_ns=100,
    )  # fmt: skip
    found = simulate(workload((0.0, 600, 3)), Fcfs(), model, SimConfig(n_batch=512))
    (outcome,) = found.outcomes
    # The first chunk saves its logits and gives no token.
    ttft = 1 + 10 + 2 * 100 + 2 * 1_000 + 2 * 10_000 + 600 * MS - 100 + 1_100_000
    # Then a plan, a graph for single tokens, and two steps.
    second = ttft + 100 + 1_000 + 10_000 + 10 * MS + 1_100_000
    third = second + 10_000 + 10 * MS + 1_100_000
    assert [round(at * 1e9) - 10_000_000 for at in outcome.token_s] == [ttft, second, third]
    counters = found.counters
    assert (counters.steps, counters.plans, counters.ubatches, counters.rebuilds) == (4, 3, 4, 3)
    assert counters.total_ns == third
    assert counters.busy_ns == third - 1


def test_sampled_tokens_cost_more() -> None:
    model = plain(greedy_ns=1 * MS, sampled_ns=3 * MS)
    greedy, sampled = (simulate(workload((0, 8, 5)), Fcfs(), model, SimConfig(sampled=s)) for s in (False, True))
    assert sampled.counters.total_ns - greedy.counters.total_ns == 5 * 2 * MS


def test_a_chunk_delays_the_others_by_one_chunk() -> None:
    found = simulate(workload((0.0, 10, 30), (0.055, 300, 1)), Fcfs(prefill_budget=100), plain())
    first, second = found.outcomes
    gaps = [round((b - a) * 1e3) for a, b in itertools.pairwise(first.token_s)]
    # It came in the step that ends at 60 ms; three steps carry 100 tokens of it each.
    assert gaps == [10] * 5 + [110] * 3 + [10] * 21
    assert second.token_s[0] == pytest.approx(0.060 + 0.330)


def test_arrivals_wait_for_the_end_of_the_step() -> None:
    found = simulate(workload((0.0, 10, 20), (0.0501, 5, 1)), Fcfs(), plain())
    assert found.outcomes[1].token_s[0] == pytest.approx(0.060 + 0.015)


@pytest.mark.parametrize(("params", "tokens"), [({"quantum_tokens": 5}, 6), ({"quantum_ms": 70.0}, 8)])
def test_until_ns_and_repeat_are_kept(params: dict[str, float], tokens: int) -> None:
    """round_robin asks for a plan when the quantum of a running sequence is over; it begins with the first token."""
    policy = registry.create("round_robin", {"quantum_tokens": 0, **params})
    found = simulate(workload((0.0, 10, 12), (0.0, 10, 12)), policy, plain(), SimConfig(n_slots=1))
    for outcome in found.outcomes:
        gaps = [b - a for a, b in itertools.pairwise(outcome.token_s)]
        assert outcome.preemptions == 1
        assert gaps.index(max(gaps)) + 1 == tokens


# -- what always holds ----------------------------------------------------------------------------------------------

REQUESTS = st.builds(
    TraceRequest,
    at_s=st.integers(0, 3 * 10**9).map(lambda ns: ns / 1e9),  # of two within one nanosecond neither comes first
    prompt_tokens=st.integers(1, 400),
    output_tokens=st.integers(1, 80),
    priority=st.integers(0, 3),
    user=st.sampled_from([None, "a", "b"]),
    slo_ms=st.sampled_from([None, 300.0]),
    blocks=st.lists(st.integers(0, 2), max_size=4).map(tuple),
    block_tokens=st.just(32),
)


def a_workload(requests: list[TraceRequest], n_clients: int) -> Workload:
    """The first ones belong to clients."""
    closed, opened = requests[: 2 * n_clients], requests[2 * n_clients :]
    clients = tuple(Client(tuple(closed[i::n_clients]), think_s=0.05) for i in range(n_clients))
    return Workload(requests=tuple(sorted(opened, key=lambda request: request.at_s)), clients=clients)


def check(outcomes: list[Outcome], played: Workload) -> None:
    """Every request got its tokens, in time."""
    assert [outcome.index for outcome in outcomes] == list(range(len(played.all_requests())))
    for outcome, request in zip(outcomes, played.all_requests(), strict=True):
        assert outcome.error is None
        assert len(outcome.token_s) == request.output_tokens
        assert dataclasses.replace(outcome.request, at_s=request.at_s) == request
        assert outcome.request.at_s < outcome.token_s[0]
        assert list(outcome.token_s) == sorted(outcome.token_s)
        assert len(set(outcome.token_s)) == len(outcome.token_s)
        assert 0 <= outcome.cached_tokens < request.prompt_tokens


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=14),
    n_clients=st.integers(0, 3),
    n_slots=st.integers(1, 5),
    kv_tokens=st.sampled_from([0, 520, 800]),
    swap_tokens=st.sampled_from([0, 300, 1 << 62]),
    host_tokens=st.sampled_from([0, 200, 1 << 16]),
)
def test_nothing_is_lost(
    name: str,
    requests: list[TraceRequest],
    n_clients: int,
    n_slots: int,
    kv_tokens: int,
    swap_tokens: int,
    host_tokens: int,
) -> None:
    """Any workload, policy and pressure: all requests end with their tokens, and one step at a time gives the same."""
    played = a_workload(requests, n_clients)
    config = SimConfig(
        n_slots=n_slots, n_ctx=512, n_batch=256, kv_tokens=kv_tokens, swap_tokens=swap_tokens, host_tokens=host_tokens
    )
    found = simulate(played, make(name), costs(), config)
    check(found.outcomes, played)
    counters = found.counters
    assert counters.plans <= counters.steps + 20 * len(requests)
    assert counters.busy_ns <= counters.total_ns
    assert counters.preemptions == sum(outcome.preemptions for outcome in found.outcomes)
    assert simulate(played, make(name), costs(), dataclasses.replace(config, batch_steps=False)) == found


@pytest.mark.parametrize("name", POLICIES)
def test_a_long_trace_step_by_step(name: str) -> None:
    """The same with contexts beyond the pads, gaps in the slots, and hours of load."""
    played = parse_workload("bursty:rate=4,n=150,prompt=lognormal(200,1,max=1500),out=lognormal(60,1,max=600)", 3)
    config = SimConfig(n_slots=6, n_ctx=2304)
    found = simulate(played, make(name), costs(), config)
    check(found.outcomes, played)
    assert simulate(played, make(name), costs(), config) == found, "deterministic"
    assert simulate(played, make(name), costs(), dataclasses.replace(config, batch_steps=False)) == found
    assert found.counters.steps > 3 * found.counters.plans, "steady decoding asks for no plan"


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=20), n_slots=st.integers(1, 4))
def test_fcfs_is_in_order(requests: list[TraceRequest], n_slots: int) -> None:
    played = a_workload([dataclasses.replace(request, blocks=()) for request in requests], 0)
    outcomes = simulate(played, Fcfs(), costs(), SimConfig(n_slots=n_slots, n_ctx=512)).outcomes
    firsts = [outcome.token_s[0] for outcome in outcomes]
    assert firsts == sorted(firsts)
    assert all(outcome.preemptions == 0 for outcome in outcomes)


def test_who_waits_for_a_prefix_holds_nobody_up() -> None:
    """The second waits while the first computes what both begin with; the third goes on meanwhile."""
    shared = (0, 1, 2, 3)
    played = Workload((blocks(*shared, prompt=130), blocks(*shared, prompt=131), blocks(9, prompt=40)))
    first, second, third = simulate(played, Fcfs(), costs(), SimConfig(n_slots=4, n_ctx=512)).outcomes
    assert second.cached_tokens == 128 and third.cached_tokens == 0
    assert first.token_s[0] <= third.token_s[0] < second.token_s[0]


@settings(max_examples=30, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=2, max_size=10))
def test_a_faster_machine_is_not_slower(requests: list[TraceRequest]) -> None:
    """All costs halved: the last answer is not later (fcfs, everything at once)."""
    played = Workload(requests=tuple(dataclasses.replace(r, at_s=0.0, blocks=()) for r in requests))
    slow = simulate(played, Fcfs(), plain(), SimConfig(n_ctx=512)).counters.total_ns
    fast = simulate(played, Fcfs(), plain(5 * MS, MS / 2), SimConfig(n_ctx=512)).counters.total_ns
    assert fast * 2 == pytest.approx(slow, rel=1e-6)


# -- prefixes, slots, pressure ----------------------------------------------------------------------------------------


def blocks(*ids: int, prompt: int, at_s: float = 0.0) -> TraceRequest:
    return TraceRequest(at_s, prompt, 2, blocks=ids, block_tokens=32)


def cached(*requests: TraceRequest, n_slots: int = 4, **more: Any) -> list[int]:
    return [o.cached_tokens for o in simulate(Workload(requests), Fcfs(), plain(), SimConfig(n_slots, **more)).outcomes]


def test_a_retained_prefix_is_found() -> None:
    first = blocks(1, 2, 3, prompt=100)
    assert cached(first, blocks(1, 2, 4, prompt=120, at_s=9)) == [0, 64]
    assert cached(first, blocks(7, 2, 3, prompt=120, at_s=9)) == [0, 0]
    assert cached(first, blocks(1, prompt=20, at_s=9)) == [0, 19], "one token is always computed"
    assert cached(first, blocks(1, 2, 3, prompt=300, at_s=9)) == [0, 96]
    assert cached(blocks(1, 2, prompt=40), blocks(1, 2, prompt=64, at_s=9)) == [0, 40], "a block that was cut"
    assert cached(TraceRequest(0, 50, 2), TraceRequest(9, 50, 2)) == [0, 0]


def test_a_prefix_that_is_being_computed_is_waited_for_and_copied() -> None:
    """Two at once: it is computed once, unless there is hardly anything to gain."""
    assert cached(blocks(1, prompt=40), blocks(1, prompt=40)) == [0, 32]
    short = TraceRequest(0.0, 40, 2, blocks=(1,), block_tokens=31)
    assert cached(short, short) == [0, 0]
    # The first one runs on while the second takes its prefix from it.
    found = simulate(
        Workload((TraceRequest(0.0, 100, 50, blocks=(1, 2), block_tokens=50), blocks(1, prompt=9, at_s=0.3))),
        Fcfs(), plain(),
    )  # fmt: skip
    assert [outcome.cached_tokens for outcome in found.outcomes] == [0, 8]
    assert found.outcomes[1].finished_s < found.outcomes[0].finished_s


def test_what_a_slot_gives_up_waits_in_host_memory() -> None:
    """Two slots and three prompts: the first is restored, as far as host memory goes, at what restoring costs."""
    one, two, three = (blocks(i, prompt=40, at_s=9.0 * i) for i in (1, 2, 3))
    again = blocks(1, prompt=40, at_s=36.0)
    assert cached(one, two, three, again, n_slots=2) == [0, 0, 0, 32]
    assert cached(one, two, three, again, n_slots=2, host_tokens=0) == [0, 0, 0, 0]
    assert cached(one, two, three, again, n_slots=2, host_tokens=33) == [0, 0, 0, 32]
    assert cached(one, two, three, again, n_slots=2, host_tokens=31) == [0, 0, 0, 0], "a piece has 32 tokens"
    costly = plain(save_token_ns=1 * MS // 4, restore_token_ns=1 * MS // 2)
    played = Workload((one, two, three, again))
    found = simulate(played, Fcfs(), costly, SimConfig(2)).outcomes[3]
    assert found.cached_tokens == 32
    # The second prompt's 41 tokens are saved, the third's 41 change places, 32 of its own are restored, 8 computed.
    assert found.token_s[0] - 36 == pytest.approx(0.041 / 4 + 0.041 * 3 / 4 + 0.032 / 2 + 0.008)


def test_the_longest_match_wins_and_the_oldest_prefix_goes() -> None:
    a, b = blocks(1, prompt=60), blocks(1, 2, prompt=100, at_s=9)
    assert cached(a, b, blocks(1, 2, 5, prompt=96, at_s=18)) == [0, 32, 64]
    # Two slots: the third prompt pushes out the first, and the second is still there.
    one, two, three = (blocks(i, prompt=40, at_s=9.0 * i) for i in (1, 2, 3))
    again = [blocks(i, prompt=40, at_s=9.0 * (4 + n)) for n, i in enumerate((2, 1))]
    assert cached(one, two, three, *again, n_slots=2, host_tokens=0) == [0, 0, 0, 32, 0]


def test_a_found_prefix_is_not_computed() -> None:
    first, second = blocks(1, 2, 3, prompt=96), blocks(1, 2, 3, prompt=100, at_s=9)
    found = simulate(Workload((first, second)), Fcfs(), plain())
    assert found.outcomes[1].token_s[0] - 9 == pytest.approx(0.004)


def test_overrides() -> None:
    known = {0: Override(cached_tokens=90), 1: Override(cached_tokens=500), 2: Override(max_tokens=77)}
    seen: list[int] = []

    class Seeing(Fcfs):
        def add(self, seq: SeqView) -> None:
            seen.append(seq.max_tokens)
            super().add(seq)

    found = simulate(workload((0, 100, 3), (1, 100, 3), (2, 100, 3)), Seeing(), plain(), overrides=known)
    assert [outcome.cached_tokens for outcome in found.outcomes] == [90, 99, 0]
    assert [len(outcome.token_s) for outcome in found.outcomes] == [3, 3, 3]
    assert seen == [3, 3, 77]


def test_a_gap_is_closed_when_that_is_cheaper() -> None:
    """The first of three sequences ends early; the last takes its slot, if its KV is quick to move."""
    played = workload((0.0, 10, 5), (0.0, 10, 60), (0.0, 10, 60))
    quick = simulate(played, Fcfs(), plain(save_token_ns=1), SimConfig(n_slots=3))
    slow = simulate(played, Fcfs(), plain(save_token_ns=1e9), SimConfig(n_slots=3))
    assert quick.counters.moves == 1
    assert slow.counters.moves == 0
    # Slots 1 and 2 are one range all the same; slots 0 and 2 would be two.
    middle = workload((0.0, 10, 60), (0.0, 10, 5), (0.0, 10, 60))
    apart = simulate(middle, Fcfs(), plain(save_token_ns=1e9), SimConfig(n_slots=3))
    assert apart.counters.ubatches > slow.counters.ubatches + 50
    assert apart.counters.total_ns > slow.counters.total_ns + 50 * 10 * MS


class Once(Fcfs):
    """Preempts the first sequence once, when it has 5 tokens, and brings it back 100 ms later."""

    def __init__(self, how: Preempt) -> None:
        super().__init__()
        self.how = how
        self.back_ns = 0

    def plan(self, state: EngineState) -> Plan:
        seq = next(iter(self._seqs.values()))
        if seq.state is SeqState.DECODE and seq.preemptions == 0:
            if seq.generated < 5:
                return Plan({seq.id: 1}, repeat=5 - seq.generated)
            self.back_ns = state.now_ns + 100 * MS
            return Plan(preempt={seq.id: self.how}, until_ns=self.back_ns)
        if state.now_ns < self.back_ns:
            return Plan(until_ns=self.back_ns)
        return super().plan(state)


def preempted(how: Preempt, **config: Any) -> tuple[Outcome, Any]:
    model = plain(save_token_ns=1 * MS // 10, restore_token_ns=2 * MS // 10)
    found = simulate(workload((0.0, 100, 10)), Once(how), model, SimConfig(n_slots=2, **config))
    return found.outcomes[0], found.counters


def test_swapped_kv_comes_back() -> None:
    outcome, counters = preempted(Preempt.SWAP)
    gap = outcome.token_s[5] - outcome.token_s[4]
    # 104 tokens to the host, the rest of 100 ms, back, and the step.
    assert gap == pytest.approx(0.100 + 104 * 0.2e-3 + 0.010, abs=1e-6)
    assert (counters.preemptions, counters.swapped_tokens, counters.recomputed_tokens) == (1, 208, 0)
    assert outcome.preemptions == 1


def test_a_slot_that_nobody_took_still_has_the_kv() -> None:
    outcome, counters = preempted(Preempt.RECOMPUTE)
    assert outcome.token_s[5] - outcome.token_s[4] == pytest.approx(0.100 + 0.010, abs=1e-6)
    assert counters.recomputed_tokens == 0


def test_auto_takes_the_cheaper_way() -> None:
    assert preempted(Preempt.AUTO)[1].swapped_tokens == 208  # 0.3 ms a token against 1 ms
    assert preempted(Preempt.AUTO, swap_tokens=50)[1].swapped_tokens == 0
    assert preempted(Preempt.SWAP, swap_tokens=50)[1].swapped_tokens == 0


def test_kv_that_was_given_up_is_computed_again() -> None:
    """Preempted for urgent requests that take all slots, prompt and answer have to be computed once more."""
    urgent = [TraceRequest(0.15, 50, 20, priority=0) for _ in range(2)]
    played = Workload((TraceRequest(0.0, 100, 30, priority=9), *urgent))
    policy = registry.create("preemptive", {"method": "recompute"})
    found = simulate(played, policy, plain(), SimConfig(n_slots=2, n_ctx=256, host_tokens=0))
    assert found.counters.preemptions == 1
    before = sum(at <= 0.16 for at in found.outcomes[0].token_s)
    assert found.counters.recomputed_tokens in range(100 + before - 2, 100 + before + 1)


def test_kv_pressure_preempts_and_nobody_fails() -> None:
    played = workload(*[(0.0, 100, 150)] * 4)
    found = simulate(played, Fcfs(), plain(), SimConfig(n_slots=4, n_ctx=256, kv_tokens=600))
    check(found.outcomes, played)
    assert found.counters.preemptions > 0
    roomy = simulate(played, Fcfs(), plain(), SimConfig(n_slots=4, n_ctx=256))
    assert roomy.counters.preemptions == 0
    assert roomy.counters.total_ns < found.counters.total_ns


# -- clients ---------------------------------------------------------------------------------------------------------


def test_clients_wait_for_their_answers() -> None:
    request = TraceRequest(0.0, 10, 5)
    played = Workload(clients=(Client((request,) * 3, think_s=0.2),))
    outcomes = simulate(played, Fcfs(), plain(deliver_ns=1 * MS)).outcomes
    each = 0.010 + 4 * 0.010 + 0.001
    assert [o.request.at_s for o in outcomes] == pytest.approx([0.0, each + 0.2, 2 * (each + 0.2)])
    assert outcomes[2].finished_s == pytest.approx(3 * each + 0.4)


def test_clients_stop() -> None:
    request = TraceRequest(0.0, 10, 5)
    long, short = Client((request,) * 100), Client((request,) * 3)
    found = simulate(Workload(clients=(long, short), stop_s=1.0), Fcfs(), plain())
    assert found.exhausted == 1
    sent = [o.request.at_s for o in found.outcomes if o.index < 100]
    assert sent[-1] < 1.0
    assert found.outcomes[len(sent) - 1].finished_s >= 1.0
    assert [o.index for o in found.outcomes[-3:]] == [100, 101, 102]


# -- errors ----------------------------------------------------------------------------------------------------------


class Broken(Fcfs):
    name = "broken"

    def __init__(self, plan: Any) -> None:
        super().__init__()
        self.answer = plan

    def plan(self, state: EngineState) -> Plan:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ZeroDivisionError("x"), "ZeroDivisionError"),
        (None, "returned NoneType"),
        (Plan({77: 1}), "sequence 77, which does not exist"),
        (Plan(), "the plan is empty while 1 sequence wants to compute"),
        (Plan({1: 600}), "has 100 prompt tokens left"),
    ],
)
def test_a_broken_policy_is_named(answer: Any, reason: str) -> None:
    with pytest.raises(PluginError, match=rf"'broken' broke its contract: .*{reason}"):
        simulate(workload((0.0, 100, 5)), Broken(answer), plain())


def test_a_policy_that_only_waits() -> None:
    class Lazy(Broken):
        def plan(self, state: EngineState) -> Plan:
            return Plan(until_ns=state.now_ns + 100 * MS)

    with pytest.raises(PluginError, match="no progress for 1 s"):
        simulate(workload((0.0, 100, 5)), Lazy(None), plain())


def test_a_request_that_never_fits() -> None:
    with pytest.raises(ConfigError, match="request 1 of the workload needs 300 tokens, one may use 256"):
        simulate(workload((0.0, 10, 5), (0.0, 200, 100)), Fcfs(), plain(), SimConfig(n_ctx=256))
    with pytest.raises(ConfigError, match="one may use 100"):
        simulate(workload((0.0, 100, 5)), Fcfs(), plain(), SimConfig(kv_tokens=100))
    with pytest.raises(ConfigError, match="at least 1"):
        SimConfig(n_slots=0)


def test_thousands_of_requests_a_second() -> None:
    """A tenth of what an idle machine does, so that a busy one passes."""
    rng = random.Random(1)
    played = workload(*sorted((rng.random() * 500, rng.randint(20, 300), rng.randint(10, 100)) for _ in range(1000)))
    start = time.process_time()
    simulate(played, Fcfs(), costs())
    assert time.process_time() - start < 1.0
