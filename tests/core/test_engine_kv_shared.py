"""Requests that share the KV cache at the same time: one computes for all, too few cells, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_support import greedy
from kv_engine_support import (
    EXACT,
    KINDS,
    LONG,
    Faulty,
    ask,
    events,
    exact,
    one,
    read,
    request,
    submit,
    tokens,
    totals_agree,
)

from mullama.engine.engine import Engine
from mullama.errors import ComputeFailed
from mullama.kv.choice import MIN_GAIN
from mullama.kv.events import KvEventKind, KvTier
from mullama.scheduling import EngineState, Fcfs, Plan
from mullama.types import FinishReason, Preempt, Request, SeqState

Make = Callable[..., Engine]
Tiny = Callable[..., Path]

# -- several at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0, 10])
@pytest.mark.parametrize("layout", ["streams", "unified"])
def test_a_cold_prefix_is_computed_once(make_engine: Make, layout: str, tail: int) -> None:
    engine = make_engine(parallel=4, **exact(layout))
    prompts = [tokens(1, 300) + tokens(10 + i, tail) for i in range(4)]
    before = engine.counters()["prefill_tokens"]
    answers = ask(engine, *(request(f"r{i}", prompt, 20) for i, prompt in enumerate(prompts)))
    shared = 300 if tail else 299
    assert engine.counters()["prefill_tokens"] - before == 4 * (300 + tail) - 3 * shared
    assert sorted(answer.profile.kv_cache_hit for answer in answers) == [0, shared, shared, shared]
    if layout == "unified":
        cells = engine.kv.snapshot()
        assert cells["cells_used"] == shared + 4 * (300 + tail - shared + 19), "a shared prefix is stored once"
    totals_agree(engine, answers)
    for prompt, answer in zip(prompts, answers, strict=True) if layout == "streams" else ():
        engine.kv.drop()
        assert one(engine, prompt, 20).text == answer.text


class AtPlan(Fcfs):
    """Fcfs that calls ``act`` before its ``n``-th plan."""

    def __init__(self, n: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.left, self.act = n, act

    def plan(self, state: EngineState) -> Plan:
        self.left -= 1
        if self.left == 0:
            self.act()
        return super().plan(state)


def test_the_one_that_computes_is_cancelled(make_engine: Make) -> None:
    engine = make_engine(parallel=4, **EXACT)
    prompts = [tokens(1, 400) + tokens(10 + i, 10) for i in range(4)]
    expected = [one(engine, prompt).text for prompt in prompts]
    engine.kv.drop()
    running: list[Any] = []
    policy = AtPlan(4, lambda: running[0].cancel())
    engine.call(lambda: engine._policy.change(policy, "fcfs", own_thread=False)).result()
    running += submit(engine, *(request(f"r{i}", prompt) for i, prompt in enumerate(prompts)))
    list(running[0])
    assert running[0].finish.reason is FinishReason.CANCELLED
    assert running[0].finish.profile.completion_tokens == 0, "in the middle of its prompt"
    answers = [read(generation) for generation in running[1:]]
    assert [answer.text for answer in answers] == expected[1:]
    assert all(answer.profile.kv_cache_hit > 400 - MIN_GAIN for answer in answers[1:])


class LeavesOut(Fcfs):
    """Fcfs that leaves the first sequence out of its plans, from its third one on, while there is another."""

    n = 0

    def plan(self, state: EngineState) -> Plan:
        plan = super().plan(state)
        self.n += 1
        if self.n > 2 and len(plan.tokens) > 1:
            plan.tokens.pop(min(plan.tokens))
        return plan


@pytest.mark.parametrize("own_thread", [False, True])
def test_a_policy_that_pauses_the_source_holds_nobody_up(make_engine: Make, own_thread: bool) -> None:
    engine = make_engine(parallel=2, **EXACT)
    prompts = [tokens(1, 400) + tokens(10 + i, 10) for i in range(2)]
    expected = [one(engine, prompt).text for prompt in prompts]
    engine.kv.drop()
    engine.call(lambda: engine._policy.change(LeavesOut(), "mine", own_thread=own_thread)).result()
    answers = ask(engine, *(request(f"r{i}", prompt) for i, prompt in enumerate(prompts)))
    assert [answer.text for answer in answers] == expected
    assert engine.planning.snapshot()["fallback"] is None
    if not own_thread:
        assert answers[1].profile.kv_cache_hit < 400, "it took what there was and computed the rest"
        stored = [event for event in events(engine) if event.kind is KvEventKind.STORED]
        ended = [event.request for event in stored if event.tier is KvTier.DEVICE][-2:]  # not what is saved when idle
        assert ended == ["r1", "r0"]


# -- too few cells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["streams", "unified"])
@pytest.mark.parametrize("how", [Preempt.SWAP, Preempt.RECOMPUTE])
@pytest.mark.parametrize("host", [0, 1 << 26])
def test_under_pressure_everybody_succeeds(make_engine: Make, layout: str, how: Preempt, host: int) -> None:
    engine = make_engine(parallel=4, kv_tokens=256, kv_host_bytes=host, **exact(layout))
    n = 500 if LONG else 60
    prompts = [tokens(i % 7, 20 + 9 * (i % 9)) + tokens(50 + i, 4) for i in range(n)]
    lengths = [10 + 17 * (i % 5) for i in range(n)]
    todo = [request(f"r{i}", *one, preempt=how) for i, one in enumerate(zip(prompts, lengths, strict=True))]
    answers = [answer for at in range(0, n, 20) for answer in ask(engine, *todo[at : at + 20])]
    assert sum(answer.profile.preemptions for answer in answers) > 0, "there was pressure"
    totals_agree(engine, answers)
    kv = engine.kv.snapshot()
    assert kv["cells_used"] <= 256 and kv["parked_sequences"] == kv["parked_bytes"] == 0
    for i in range(0, n, 3) if layout == "streams" else ():  # see test_answers_in_the_unified_layout
        engine.kv.drop()
        assert one(engine, prompts[i], lengths[i]).text == answers[i].text


class OneFirst(Fcfs):
    """Nobody goes on while somebody waits for a slot."""

    def plan(self, state: EngineState) -> Plan:
        plan = super().plan(state)
        waiting = {seq.id: min(64, seq.prefill_left) for seq in self._seqs.values() if seq.state is SeqState.WAITING}
        return Plan(dict(list(waiting.items())[:1])) if waiting and state.free_slots else plan


@pytest.mark.timeout(30)
def test_a_policy_that_pauses_all_for_one_that_does_not_fit(make_engine: Make) -> None:
    engine = make_engine(parallel=2, kv_tokens=400, kv_host_bytes=0)
    engine.call(lambda: engine._policy.change(OneFirst(), "mine", own_thread=False)).result()
    answers = ask(engine, request("a", tokens(1, 60), 150), request("b", tokens(2, 350), 20))
    assert [answer.profile.completion_tokens for answer in answers] == [150, 20]
    assert engine.planning.snapshot()["fallback"] is None


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("broken", ["copy", "extend"])
def test_kv_that_llama_cpp_does_not_take_is_computed(
    make_engine: Make, tiny_model: Tiny, arch: str, broken: str
) -> None:
    engine = make_engine(tiny_model(arch), parallel=2, kv_host_bytes=1 << 26, **EXACT)
    first = one(engine, tokens(1, 120))
    engine._kv.cells = Faulty(engine._kv.cells, **{broken: lambda *_, **__: False})  # type: ignore[assignment]
    answers = ask(engine, *(request(f"r{i}", tokens(1, 120)) for i in range(2)))
    for seed in (2, 3):
        one(engine, tokens(seed, 60))
    answers.append(one(engine, tokens(1, 120)))
    assert [answer.text for answer in answers] == [first.text] * 3
    assert engine.kv.audit() == []


def test_a_prefix_that_is_lost_on_its_way_is_computed(make_engine: Make) -> None:
    engine = make_engine(parallel=2, kv_host_bytes=0, **EXACT)
    ask(engine, *(request(f"r{i}", tokens(i, 120)) for i in range(2)))
    past = engine.kv.export(1)["tokens"]  # it has to go to slot 0
    assert len(past) == 127
    moves: list[tuple[int, int]] = []

    def exchange(a: int, b: int) -> int:
        moves.append((a, b))
        for slot in (a, b):
            engine._core.evict(slot)
        raise ComputeFailed("on purpose")

    engine._seqs._core = Faulty(engine._core, exchange=exchange)  # type: ignore[assignment]
    answer = one(engine, [*past, 70])
    assert moves and answer.profile.kv_cache_hit == 0
    assert engine.kv.audit() == []
    engine._seqs._core = engine._core
    engine.kv.drop()
    assert one(engine, [*past, 70]).text == answer.text


@pytest.mark.parametrize(("parallel", "source"), [(1, "in_place"), (2, "copy")])
def test_a_request_that_the_core_refuses_leaves_the_books_right(
    make_engine: Make, parallel: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(parallel=parallel, kv_host_bytes=0)
    one(engine, tokens(1, 240))
    prompt = tokens(1, 240)[:40] + tokens(2, 20)
    bad = Request("bad", prompt, greedy(4, logit_bias=((1 << 20, 1.0),)))
    with monkeypatch.context() as patched:
        patched.setattr(engine._intake, "check", lambda request: None)  # else it would be refused before
        (generation,) = submit(engine, bad)
    list(generation)
    assert generation.finish.reason is FinishReason.ERROR
    assert engine.kv.audit() == []
    assert one(engine, prompt).profile.kv_cache_hit == 40
