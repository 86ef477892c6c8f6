"""Policies on the real engine: swapped live, preempting, under KV pressure, and broken in every way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from core_support import greedy

from mullama.engine.engine import Engine
from mullama.errors import InvalidRequest
from mullama.scheduling import EngineState, Fcfs, Plan, SeqView, registry
from mullama.types import FinishReason, Preempt, Request

POLICIES = list(registry.BUILTINS)


def request(name: str, prompt: str, n: int, **more: Any) -> Request:
    return Request(name, list(prompt.encode()), greedy(n), **more)


def run_all(engine: Engine, requests: list[Request]) -> list[Any]:
    """All at the same step; returns the generations, read to their end, with their ``text``."""
    gate = threading.Event()
    engine.call(gate.wait)
    generations = [engine.submit_sync(one) for one in requests]
    gate.set()
    for generation in generations:
        generation.text = "".join(delta.text for delta in generation)  # type: ignore[attr-defined]
    return generations


def work(n: int = 12) -> list[Request]:
    return [
        request(f"r{i}", f"REQUEST NUMBER {i} " * (1 + i % 3), 20 + 7 * (i % 4), priority=i % 3, user=f"u{i % 2}")
        for i in range(n)
    ]


def texts(generations: list[Any]) -> list[str]:
    assert [generation.finish.reason for generation in generations] == [FinishReason.LENGTH] * len(generations)
    return [generation.text for generation in generations]


@pytest.fixture
def alone(make_engine: Callable[..., Engine]) -> list[str]:
    """What each request of ``work`` says when nobody disturbs it."""
    engine = make_engine()
    return [texts(run_all(engine, [one]))[0] for one in work()]


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_changes_an_answer(make_engine: Callable[..., Engine], alone: list[str], policy: str) -> None:
    engine = make_engine(parallel=3, scheduler=policy)
    assert texts(run_all(engine, work())) == alone
    assert engine.planning.snapshot()["policy"] == policy
    assert engine.planning.snapshot()["fallback"] is None


def test_live_swaps_drop_nothing_and_change_nothing(make_engine: Callable[..., Engine], alone: list[str]) -> None:
    engine = make_engine(parallel=3)
    params = {"round_robin": {"quantum_tokens": 3}, "preemptive": {"ageing_s": 0}}
    stop = threading.Event()
    swapped: list[dict[str, Any]] = []

    def swap() -> None:
        while not stop.is_set():
            policy = POLICIES[len(swapped) % len(POLICIES)]
            swapped.append(engine.planning.set_policy(policy, params.get(policy)))

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(3):
            assert texts(run_all(engine, work())) == alone
    finally:
        stop.set()
        swapper.join()
    assert len(swapped) > len(POLICIES)
    assert max(answer["handed_over"] for answer in swapped) > 3
    assert engine.planning.snapshot()["swaps"] == len(swapped)


def test_an_urgent_request_takes_a_slot(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=2, scheduler="preemptive", ctx_size=1024)
    gate = threading.Event()
    engine.call(gate.wait)
    batch = [engine.submit_sync(request(f"b{i}", "BATCH", 600, priority=10)) for i in range(2)]
    started = threading.Thread(target=lambda: [next(one) for one in batch])
    started.start()
    gate.set()
    started.join()
    urgent = engine.submit_sync(request("u", "URGENT", 5, priority=0))
    assert len("".join(delta.text for delta in urgent)) > 0
    assert any(one.finish is None for one in batch), "it did not wait for one of them"
    for one in batch:
        list(one)
    profiles = [one.finish.profile for one in batch if one.finish]
    assert sum(profile.preemptions for profile in profiles) >= 1
    assert [profile.completion_tokens for profile in profiles] == [600, 600]
    assert engine.counters()["parked"] == 0
    assert engine.counters()["parked_bytes"] == 0


@pytest.mark.parametrize("how", [Preempt.SWAP, Preempt.RECOMPUTE])
def test_the_request_says_how_it_is_preempted(make_engine: Callable[..., Engine], how: Preempt) -> None:
    # Without the host tier: there the KV that a sequence gives up would be found again.
    engine = make_engine(parallel=1, scheduler="round_robin", scheduler_arg=["quantum_tokens=4"], kv_host_bytes=0)
    expected = [texts(run_all(engine, [request("a", text, 40)]))[0] for text in ("FIRST ONE", "THE OTHER")]
    before = engine.counters()["swap_bytes"]
    found = run_all(engine, [request("a", text, 40, preempt=how) for text in ("FIRST ONE", "THE OTHER")])
    assert texts(found) == expected
    assert all(one.finish.profile.preemptions > 2 for one in found)
    assert all(one.finish.profile.preempted_ms > 0 for one in found)
    assert (engine.counters()["swap_bytes"] > before) is (how is Preempt.SWAP)
    assert (sum(one.finish.profile.recomputed_tokens for one in found) > 0) is (how is Preempt.RECOMPUTE)


def test_without_host_memory_it_is_computed_again(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=1, swap_bytes=1, scheduler="round_robin", scheduler_arg=["quantum_tokens=4"])
    found = run_all(engine, [request("a", text, 30, preempt=Preempt.SWAP) for text in ("FIRST ONE", "THE OTHER")])
    assert engine.counters()["swap_bytes"] == 0
    assert all(one.finish.profile.preemptions > 0 for one in found)


@pytest.mark.parametrize("state", ["waiting", "preempted"])
def test_cancelled_without_a_slot(make_engine: Callable[..., Engine], state: str) -> None:
    engine = make_engine(parallel=1, scheduler="preemptive", ctx_size=1024)
    first = engine.submit_sync(request("a", "FIRST ONE", 500, priority=5))
    next(first)
    second = engine.submit_sync(request("b", "THE OTHER", 500, priority=0 if state == "preempted" else 9))
    if state == "preempted":
        next(second)
    victim, other = (first, second) if state == "preempted" else (second, first)
    engine.call(lambda: None).result()
    states = {one["id"]: one["state"] for one in engine.planning.snapshot()["waiting"]}
    assert states == {victim.id: state}
    victim.cancel()
    list(victim)
    assert victim.finish is not None and victim.finish.reason is FinishReason.CANCELLED
    list(other)
    assert other.finish is not None and other.finish.reason is FinishReason.LENGTH
    assert engine.counters()["parked"] == 0


def test_under_kv_pressure_nobody_fails(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=4, kv_tokens=120)
    long = [request(f"r{i}", f"REQUEST NUMBER {i}", 70 + i, priority=i % 3) for i in range(12)]
    expected = [texts(run_all(engine, [one]))[0] for one in long]
    found = run_all(engine, long)
    assert texts(found) == expected
    assert sum(one.finish.profile.preemptions for one in found) > 0, "there was pressure"
    kv = engine.kv.snapshot()
    assert kv["cells_used"] <= 120
    assert engine.call(lambda: engine.kv._drop_all()).result() > 0
    assert engine.kv.snapshot()["cells_used"] == 0


def test_a_request_larger_than_the_kv_budget_is_refused_at_once(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=2, kv_tokens=100)
    assert engine.info.n_ctx == 100
    with pytest.raises(InvalidRequest, match="may use 100"):
        engine.submit_sync(request("a", "A" * 100, 5))
    assert texts(run_all(engine, [request("a", "A" * 90, 500)]))[0]


# -- what is refused ---------------------------------------------------------------------------------------------


def test_a_wrong_policy_or_parameter_changes_nothing(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(scheduler="priority", scheduler_arg=["ageing_s=5"])
    with pytest.raises(InvalidRequest, match="fair"):
        engine.planning.set_policy("fare")
    with pytest.raises(InvalidRequest, match="ageing_s"):
        engine.planning.set_policy("priority", {"age": 1})
    with pytest.raises(InvalidRequest, match="ageing_s"):
        asyncio.run(engine.planning.aconfigure({"ageing_s": "old"}))
    snapshot = engine.planning.snapshot()
    assert (snapshot["policy"], snapshot["params"]["ageing_s"]) == ("priority", 5.0)


def test_parameters_change_while_it_runs(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(scheduler="priority")
    answer = asyncio.run(engine.planning.aconfigure({"ageing_s": 2}))
    assert answer["params"]["ageing_s"] == 2.0
    assert engine.planning.snapshot()["params"]["ageing_s"] == 2.0


# -- users' policies -----------------------------------------------------------------------------------------------


class Base(Fcfs):
    name: ClassVar[str] = "mine"

    def params(self) -> Mapping[str, Any]:
        return {}


class Raises(Base):
    def plan(self, state: EngineState) -> Plan:
        raise RuntimeError("on purpose")


class RaisesInAdd(Base):
    def add(self, seq: SeqView) -> None:
        raise RuntimeError("on purpose")


class Hangs(Base):
    def plan(self, state: EngineState) -> Plan:
        while True:
            pass


class Sleeps(Base):
    def plan(self, state: EngineState) -> Plan:
        time.sleep(0.4)
        return super().plan(state)


class Nothing(Base):
    def plan(self, state: EngineState) -> Plan:
        return Plan()


class Waits(Base):
    """Always a moment later."""

    def plan(self, state: EngineState) -> Plan:
        return Plan(until_ns=state.now_ns + 20_000_000)


class Unknown(Base):
    def plan(self, state: EngineState) -> Plan:
        return Plan({10_000: 1})


class TooMany(Base):
    def plan(self, state: EngineState) -> Plan:
        return Plan(dict.fromkeys(self._seqs, 100000))


class NotAPlan(Base):
    def plan(self, state: EngineState) -> Plan:
        return {1: 1}  # type: ignore[return-value]


class Slow(Base):
    """Within the limit, and slower than a step."""

    def plan(self, state: EngineState) -> Plan:
        time.sleep(0.01)
        return super().plan(state)


def as_users(engine: Engine, policy: Any) -> None:
    """Put an object in charge the way a user's class is."""
    engine.call(lambda: engine._policy.change(policy, "mine", own_thread=True)).result()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Raises, "on purpose"),
        (RaisesInAdd, "on purpose"),
        (Hangs, "no answer within 100 ms"),
        (Sleeps, "no answer within 100 ms"),
        (Nothing, "the plan is empty"),
        (Waits, "no progress for 1 s"),
        (Unknown, "does not exist"),
        (TooMany, "tokens left, the plan says 100000"),
        (NotAPlan, "not a Plan"),
    ],
)
def test_a_broken_policy_is_replaced_and_nobody_fails(
    make_engine: Callable[..., Engine], alone: list[str], kind: type[Base], reason: str
) -> None:
    engine = make_engine(parallel=3)
    as_users(engine, kind())
    assert texts(run_all(engine, work())) == alone
    snapshot = engine.planning.snapshot()
    assert snapshot["policy"] == "fcfs"
    assert snapshot["fallback"]["from"] == "mine"
    assert reason in snapshot["fallback"]["reason"]


def test_a_policy_that_breaks_in_the_middle(make_engine: Callable[..., Engine], alone: list[str]) -> None:
    engine = make_engine(parallel=3)
    calls = 0

    class Later(Base):
        def plan(self, state: EngineState) -> Plan:
            nonlocal calls
            calls += 1
            return super().plan(state) if calls < 9 else Plan({-1: 1})

    as_users(engine, Later())
    assert texts(run_all(engine, work())) == alone
    assert "does not exist" in engine.planning.snapshot()["fallback"]["reason"]


def test_the_engine_goes_on_while_a_policy_thinks(make_engine: Callable[..., Engine], alone: list[str]) -> None:
    engine = make_engine(parallel=3)
    as_users(engine, Slow())
    assert texts(run_all(engine, work())) == alone
    snapshot = engine.planning.snapshot()
    assert (snapshot["policy"], snapshot["fallback"]) == ("Slow", None)
    assert snapshot["repeated_plans"] > 0


def test_a_policy_from_a_file(make_engine: Callable[..., Engine], tmp_path: Path, alone: list[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from mullama.scheduling import Fcfs\nclass Backwards(Fcfs):\n    name = 'backwards'\n")
    engine = make_engine(parallel=3, scheduler=f"{file}:Backwards")
    assert texts(run_all(engine, work())) == alone
    snapshot = engine.planning.snapshot()
    assert (snapshot["policy"], snapshot["fallback"]) == ("backwards", None)


def test_steady_decoding_asks_nobody(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=4)
    plans: list[int] = []

    class Counting(Fcfs):
        def plan(self, state: EngineState) -> Plan:
            plans.append(state.step)
            return super().plan(state)

    engine.call(lambda: engine._policy.change(Counting(), "fcfs", own_thread=False)).result()
    texts(run_all(engine, [request(f"r{i}", "HELLO", 300) for i in range(4)]))
    assert engine.counters()["steps"] >= 300
    assert len(plans) < 30


def test_the_snapshot_says_who_waits_and_who_runs(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=1, ctx_size=1024)
    first = engine.submit_sync(request("a", "FIRST", 800, priority=2, user="me"))
    next(first)
    second = engine.submit_sync(request("b", "SECOND", 5, slo_ms=100.0))
    engine.call(lambda: None).result()
    snapshot = engine.planning.snapshot()
    (running,) = snapshot["running"]
    (waiting,) = snapshot["waiting"]
    assert (running["id"], running["state"], running["slot"], running["priority"]) == ("a", "decode", 0, 2)
    assert running["completion_tokens"] + running["tokens_left"] == 800
    assert running["user"] == "me"
    assert running["state_ms"]["decode"] > 0
    assert (waiting["id"], waiting["state"], waiting["slo_ms"]) == ("b", "waiting", 100.0)
    assert snapshot["plan"]["tokens"] == {"a": 1}
    assert snapshot["plan_times"]["p50_ms"] > 0
    first.cancel()
    list(first)
    list(second)


# -- shadows ---------------------------------------------------------------------------------------------------------


def shadow_of(engine: Engine, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The shadow's snapshot once ``wanted`` holds; it works on a thread of its own."""
    engine.call(lambda: None).result()  # the last one has ended for the engine as well
    deadline = time.monotonic() + 20
    while True:
        found: dict[str, Any] = engine.planning.snapshot()["shadow"]
        if wanted(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def test_a_shadow_reports_and_decides_nothing(make_engine: Callable[..., Engine], alone: list[str]) -> None:
    engine = make_engine(parallel=2, shadow_scheduler="srpt")
    assert texts(run_all(engine, work())) == alone
    found = shadow_of(engine, lambda shadow: shadow["ttft_ms"])
    assert (found["policy"], found["off"], found["dropped"]) == ("srpt", None, 0)
    assert found["observed"] > 10
    assert found["differed"] > 0, "the shortest first is another order"
    assert found["recent"]
    predicted = found["ttft_ms"]
    assert predicted["requests"] == 12
    assert predicted["measured"]["p50"] > 0
    assert predicted["active"]["p50"] > 0 and predicted["shadow"]["p50"] > 0
    assert engine.planning.snapshot()["policy"] == "fcfs"


def test_a_shadow_of_the_same_policy_never_differs(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=2, shadow_scheduler="fcfs")
    texts(run_all(engine, work()))
    found = shadow_of(engine, lambda shadow: shadow["ttft_ms"])
    assert (found["observed"] > 10, found["differed"]) == (True, 0)


def test_a_broken_shadow_disturbs_nobody(make_engine: Callable[..., Engine], tmp_path: Path, alone: list[str]) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "from mullama.scheduling import Fcfs\nclass Bad(Fcfs):\n    def plan(self, state):\n        1 / 0\n"
    )
    engine = make_engine(parallel=2)
    engine.planning.set_shadow(f"{file}:Bad")
    assert texts(run_all(engine, work())) == alone
    found = shadow_of(engine, lambda shadow: shadow["off"])
    assert "ZeroDivisionError" in found["off"]
    with pytest.raises(InvalidRequest, match="srpt"):
        engine.planning.set_shadow("sprt")
    engine.planning.set_shadow(None)
    assert engine.planning.snapshot()["shadow"] is None


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1, 10**30])
def test_a_priority_beside_others_that_no_integer_of_c_holds_is_refused(
    make_engine: Callable[..., Engine], priority: int
) -> None:
    """Found by thousands of mutated requests: it was an internal error."""
    engine = make_engine()
    with pytest.raises(InvalidRequest, match=r"a priority must be -2147483648 to 2147483647"):
        engine.planning.set_share(priority=priority)
    engine.planning.set_share(priority=2**31 - 1)
    assert engine.planning.share()[1]["priority"] == 2**31 - 1
    engine.planning.set_share(priority=0)
