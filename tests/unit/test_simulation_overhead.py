"""What an engine adds to its decodes, measured on one whose overheads are known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

import pytest
from cli_support import model_info
from simulation_support import MS, plain

from mullama.errors import ComputeFailed
from mullama.simulation.cost_model.overhead import OverheadGauge
from mullama.types import Delta, Finish, FinishReason, Profile, Request

DECODE, STEP, TOKEN, PLAN, GREEDY = 4 * MS, 50_000, 6_000, 200_000, 20_000
QUEUE, DELIVER = 900_000, 250_000


class FakeEngine:
    """Steps in virtual time: all that was submitted decodes together, prompts are computed in chunks alone."""

    def __init__(self, n_parallel: int = 4, *, fails: bool = False) -> None:
        self.info = model_info()
        object.__setattr__(self.info, "n_parallel", n_parallel)
        self.now = 1_000_000_000
        self.budget = 512
        self.policies: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails
        self.most = 0
        self._counters = dict.fromkeys(("steps", "busy_ns", "decode_ns", "sample_ns", "commit_ns"), 0)
        self._queues: list[tuple[asyncio.Queue[Delta | None], Request, list[int]]] = []
        self._task: asyncio.Task[None] | None = None

    def clock(self) -> int:
        return self.now

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    @property
    def planning(self) -> FakeEngine:
        return self

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self.policies.append((spec, dict(params or {})))
        self.budget = (params or {}).get("prefill_budget", 512)
        return {}

    def submit(self, request: Request) -> FakeGeneration:
        queue: asyncio.Queue[Delta | None] = asyncio.Queue()
        self._queues.append((queue, request, [0]))
        self.most = max(self.most, len(self._queues))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._steps())
        return FakeGeneration(queue, self, request)

    def _spend(self, decode: int, tokens: int, plans: int, *, counted_plans: int | None = None) -> None:
        self._counters["steps"] += 1
        self._counters["decode_ns"] += decode
        self._counters["sample_ns"] += tokens * GREEDY
        counted = plans if counted_plans is None else counted_plans
        self._counters["busy_ns"] += decode + STEP + tokens * (GREEDY + TOKEN) + counted * PLAN
        self.now += decode + STEP + tokens * (GREEDY + TOKEN) + plans * PLAN

    async def _steps(self) -> None:
        await asyncio.sleep(0)  # all that come at once
        first = True
        while self._queues:
            decoding = [one for one in self._queues if one[2][0]]
            for _, request, _ in [one for one in self._queues if not one[2][0]]:
                chunks = -(-len(request.prompt) // self.budget)
                for number in range(chunks):
                    self._spend(DECODE, int(number == chunks - 1), 1, counted_plans=0 if first else 1)
                    first = False
            if decoding:
                self._spend(DECODE, len(decoding), 0)
            for queue, request, generated in list(self._queues):
                generated[0] += 1
                queue.put_nowait(Delta("x", 1))
                if generated[0] == request.sampling.max_tokens:
                    self._queues = [one for one in self._queues if one[0] is not queue]
                    queue.put_nowait(None)
                    first = not self._queues
            for _ in range(3):
                await asyncio.sleep(0)


class FakeGeneration:
    def __init__(self, queue: asyncio.Queue[Delta | None], engine: FakeEngine, request: Request) -> None:
        self.queue, self.engine, self.request = queue, engine, request
        self.finish: Finish | None = None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while (delta := await self.queue.get()) is not None:
            if self.request.sampling.max_tokens == 1:
                self.engine.now += DELIVER
            yield delta
        ttft = (self.engine.now - DELIVER - self.request.arrival_ns) / 1e6
        error = ComputeFailed("no") if self.engine.fails else None
        reason = FinishReason.ERROR if error else FinishReason.LENGTH
        profile = Profile(queue_ms=QUEUE / 1e6, time_to_first_token_ms=ttft)
        self.finish = Finish(reason, profile, error=error)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


@pytest.mark.parametrize("n_parallel", [1, 4, 8])
def test_known_overheads_are_found(n_parallel: int) -> None:
    engine = FakeEngine(n_parallel)
    seen: list[tuple[str, float, float]] = []
    before = plain(DECODE, admit_ns=30_000, about={"model": "x"})
    gauge = OverheadGauge(engine, before, clock=engine.clock, progress=lambda *now: seen.append(now))
    costs = run(gauge.run())
    if n_parallel > 1:
        assert costs.step_ns == pytest.approx(STEP, rel=0.02)
        assert costs.token_ns == pytest.approx(TOKEN, rel=0.02)
    assert costs.step_ns + costs.token_ns == pytest.approx(STEP + TOKEN, rel=0.02)
    assert costs.plan_ns == pytest.approx(PLAN, rel=0.1)
    assert costs.wake_ns == pytest.approx(QUEUE - costs.plan_ns - 30_000, rel=0.01)
    assert costs.deliver_ns == pytest.approx(DELIVER, rel=0.01)
    assert engine.most == n_parallel
    assert engine.policies[-1] == ("fcfs", {}), "left as it was"
    assert {total for _, _, total in seen} == {seen[-1][1] + 1}
    assert (costs.decode, costs.prefill, costs.about) == (before.decode, before.prefill, before.about)


def test_a_failure_is_raised() -> None:
    engine = FakeEngine(1, fails=True)
    with pytest.raises(BaseExceptionGroup) as caught:
        run(OverheadGauge(engine, plain(DECODE), clock=engine.clock).run())
    assert caught.group_contains(ComputeFailed)
