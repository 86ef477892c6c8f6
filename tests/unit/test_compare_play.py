"""Playing a workload: arrivals, answers and failures, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from compare_support import TimedEngine, run_virtually

from mullama.compare.play import Played, play
from mullama.errors import ComputeFailed, EngineDead, QueueFull
from mullama.workload.base import Client, TraceRequest, Workload
from mullama.workload.metrics import itl_s, ttft_s
from mullama.workload.prompts import Prompts

PROMPTS = Prompts(range(1, 400))


def played(engine: TimedEngine, workload: Workload, progress: Callable[[float, float], None] | None = None) -> Played:
    async def main(clock: Callable[[], float]) -> Played:
        return await play(engine, workload, PROMPTS, clock=clock, progress=progress or (lambda done, total: None))

    return run_virtually(main)


def test_times_are_those_of_the_engine() -> None:
    engine = TimedEngine(parallel=1, prefill_s=0.01, step_s=0.1)
    requests = (TraceRequest(1.0, 50, 3), TraceRequest(1.2, 20, 2, user="u", priority=7, slo_ms=90.0))
    first, second = played(engine, Workload(requests=requests)).outcomes
    assert first.token_s == pytest.approx((1.5, 1.6, 1.7))
    assert first.finished_s == pytest.approx(1.7)
    assert ttft_s(first) == pytest.approx(0.5)
    assert itl_s(first) == pytest.approx([0.1, 0.1])
    assert second.token_s == pytest.approx((1.9, 2.0))  # it waited for the slot until 1.7
    assert (first.index, first.request, first.cached_tokens, first.preemptions) == (0, requests[0], 3, 1)
    sent = engine.log[1]
    assert sent.prompt == PROMPTS.make(1, requests[1])
    assert (sent.user, sent.priority, sent.slo_ms) == ("u", 7, 90.0)
    assert (sent.sampling.temperature, sent.sampling.ignore_eos, sent.sampling.max_tokens) == (0.0, True, 2)


def test_open_loop_does_not_wait_for_answers() -> None:
    engine = TimedEngine(parallel=4, prefill_s=0.0, step_s=1.0)
    run = played(engine, Workload(requests=tuple(TraceRequest(i * 0.25, 5, 2) for i in range(4))))
    assert [outcome.token_s[0] for outcome in run.outcomes] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert run.late_s == pytest.approx(0)


def test_closed_loop_waits_thinks_and_stops() -> None:
    engine = TimedEngine(parallel=2, prefill_s=0.0, step_s=0.5)
    client = Client((TraceRequest(0.0, 5, 2, group="batch"),) * 10, think_s=0.25)
    urgent = TraceRequest(0.1, 3, 1, group="urgent")
    workload = Workload(requests=(urgent,), clients=(client,), stop_s=2.0)
    seen: list[tuple[float, float]] = []
    run = played(engine, workload, lambda done, total: seen.append((done, total)))
    batch = [outcome for outcome in run.outcomes if outcome.request.group == "batch"]
    assert [outcome.request.at_s for outcome in batch] == pytest.approx([0.0, 0.75, 1.5])  # the next would be at 2.25
    assert [outcome.index for outcome in run.outcomes] == [0, 1, 2, 3]
    assert run.outcomes[0].request == urgent
    assert run.exhausted == 0
    assert seen[-1] == (2.0, 2.0)
    assert [len(g.request.prompt) for g in engine.generations] == [5, 3, 5, 5]
    assert len({tuple(g.request.prompt) for g in engine.generations}) == 4


def test_a_client_may_start_later_and_run_out() -> None:
    engine = TimedEngine(prefill_s=0.0, step_s=0.5)
    late = Client((TraceRequest(1.0, 5, 2), TraceRequest(0.0, 5, 2)))
    run = played(engine, Workload(clients=(late,), stop_s=10.0))
    assert [outcome.request.at_s for outcome in run.outcomes] == pytest.approx([1.0, 1.5])
    assert run.exhausted == 1


def test_failures_are_outcomes() -> None:
    engine = TimedEngine(parallel=4, step_s=0.1)
    engine.refuse = lambda request: QueueFull("the queue is full") if request.id.endswith("-0") else None
    engine.fail = lambda request: ComputeFailed("not finite") if request.id.endswith("-1") else None
    requests = tuple(TraceRequest(0.5, 10, 2) for _ in range(3))
    refused, failed, fine = played(engine, Workload(requests=requests)).outcomes
    assert (refused.error, refused.token_s) == ("the queue is full", ())
    assert refused.finished_s == pytest.approx(0.5)
    assert (failed.error, ttft_s(failed)) == ("not finite", None)
    assert fine.error is None


def test_an_answer_that_ends_early_has_failed() -> None:
    class Short(TimedEngine):
        def submit(self, request):  # type: ignore[no-untyped-def]
            return super().submit(replace(request, sampling=replace(request.sampling, max_tokens=1)))

    (outcome,) = played(Short(), Workload(requests=(TraceRequest(0, 10, 4),))).outcomes
    assert outcome.error == "it ended after 1 of 4 tokens"


@pytest.mark.parametrize("how", ["refuse", "fail"])
def test_a_dead_engine_ends_it(how: str) -> None:
    client = Client((TraceRequest(0.0, 5, 2),) * 3)
    for workload in (Workload(requests=(TraceRequest(0, 10, 4),) * 3), Workload(clients=(client,))):
        engine = TimedEngine()
        setattr(engine, how, lambda request: EngineDead("it stopped"))
        with pytest.raises(EngineDead, match="it stopped"):
            played(engine, workload)


def test_cancelled_it_cancels_what_it_sent() -> None:
    engine = TimedEngine(parallel=2)

    async def main(clock: Callable[[], float]) -> None:
        workload = Workload(requests=tuple(TraceRequest(i, 10, 50) for i in range(6)))
        task = asyncio.create_task(play(engine, workload, PROMPTS, clock=clock))
        await asyncio.sleep(2.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_virtually(main)
    assert len(engine.generations) == 3
    assert all(generation.is_cancelled for generation in engine.generations)
