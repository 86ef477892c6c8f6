"""Measures what a running engine adds to its decodes: plans, wake-ups, handing tokens to readers on an event loop."""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import msgspec

from mullama.simulation.cost_model.costs import CostModel
from mullama.simulation.cost_model.fitting import positive_line
from mullama.simulation.cost_model.gauge import Progress
from mullama.types import ModelInfo, Request, SamplingParams

PROMPT = 16  # tokens
CHUNK = 8  # tokens of a step of which nearly all is overhead
STEADY_S = 1.5  # of decoding that is looked at
MARGIN = 4  # steps at either end that are not
SINGLES = 8


class PlanningLike(Protocol):
    """What is used of ``PlanningClient``."""

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]: ...


class EngineLike(Protocol):
    """What is used of ``EngineClient``."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def planning(self) -> PlanningLike: ...
    def submit(self, request: Request) -> Any: ...
    def counters(self) -> dict[str, int]: ...


@dataclass(slots=True)
class _Answer:
    """Times in ns from arrival."""

    first_ns: int
    queue_ns: float
    ttft_ns: float  # as the engine saw it


class OverheadGauge:
    """Nothing else may use the engine meanwhile."""

    def __init__(
        self,
        engine: EngineLike,
        costs: CostModel,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        progress: Progress = lambda step, done, total: None,
    ) -> None:
        self._engine = engine
        self._costs = costs
        self._clock = clock
        self._progress = progress
        self._rng = random.Random(2)
        self._n = 0

    async def run(self) -> CostModel:
        """``costs`` with the overheads filled in."""
        sizes = sorted({1, max(self._engine.info.n_parallel // 2, 1), self._engine.info.n_parallel})
        await self._engine.planning.aset_policy("fcfs", {})
        await self._steady(1)  # warm-up
        extra = []
        for number, n in enumerate(sizes):
            self._progress("measuring the engine", number, len(sizes) + 2)
            extra.append((float(n), await self._steady(n)))
        step_ns, token_ns = positive_line(extra)
        self._progress("measuring the engine", len(sizes), len(sizes) + 2)
        plan_ns = max(await self._chunked() - step_ns, 0.0)
        self._progress("measuring the engine", len(sizes) + 1, len(sizes) + 2)
        singles = []
        for _ in range(SINGLES):
            await asyncio.sleep(0.02)
            singles.append(await self._answer(PROMPT, 1))
        return msgspec.structs.replace(
            self._costs,
            step_ns=step_ns,
            token_ns=token_ns,
            plan_ns=plan_ns,
            wake_ns=max(median(one.queue_ns for one in singles) - plan_ns - self._costs.admit_ns, 0.0),
            deliver_ns=max(float(median(one.first_ns - one.ttft_ns for one in singles)), 0.0),
        )

    def _request(self, n_prompt: int, n_out: int) -> Request:
        self._n += 1
        prompt = [self._rng.randrange(self._engine.info.n_vocab) for _ in range(n_prompt)]
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n_out)
        return Request(f"calibrate-{self._n}", prompt, sampling, arrival_ns=self._clock())

    async def _answer(self, n_prompt: int, n_out: int, each: Callable[[int], None] = lambda n: None) -> _Answer:
        """One request; ``each`` is called with the tokens so far."""
        request = self._request(n_prompt, n_out)
        generation = self._engine.submit(request)
        first_ns = n = 0
        async for delta in generation:
            first_ns = first_ns or self._clock() - request.arrival_ns
            n += delta.n_tokens
            each(n)
        finish = generation.finish
        if finish.error is not None:
            raise finish.error
        profile = finish.profile
        return _Answer(first_ns, profile.queue_ms * 1e6, (profile.time_to_first_token_ms or 0.0) * 1e6)

    async def _steady(self, n: int) -> float:
        """Ns of a step in which ``n`` sequences decode, beside the decode and the sampling."""
        step_ns = self._costs.decode_ns(n, PROMPT, PROMPT)
        tokens = min(max(int(STEADY_S * 1e9 / max(step_ns, 1)), 16), 96, self._engine.info.n_ctx - PROMPT - 1)
        so_far = [0] * n
        marks: list[dict[str, int]] = []  # when all of them decode, and when the first is about to end

        def each(which: int, n_tokens: int) -> None:
            so_far[which] = n_tokens
            if (min(so_far) >= MARGIN and not marks) or (max(so_far) >= tokens - MARGIN and len(marks) == 1):
                marks.append(self._engine.counters())

        async with asyncio.TaskGroup() as group:
            for which in range(n):
                group.create_task(self._answer(PROMPT, tokens, functools.partial(each, which)))
        if len(marks) < 2 or marks[0]["steps"] == marks[1]["steps"]:
            return 0.0
        return _beside(marks[0], marks[1]) / (marks[1]["steps"] - marks[0]["steps"])

    async def _chunked(self) -> float:
        """Ns of a step and its plan, beside the decode and the sampling: a prompt in small chunks."""
        n_prompt = min(24 * CHUNK, self._engine.info.n_ctx // 2)
        await self._engine.planning.aset_policy("fcfs", {"prefill_budget": CHUNK})
        before = self._engine.counters()
        await self._answer(n_prompt, 1)
        after = self._engine.counters()
        await self._engine.planning.aset_policy("fcfs", {})
        # No plan is counted before the first step.
        return _beside(before, after) / max(after["steps"] - before["steps"] - 1, 1)


def _beside(before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """Busy time between two looks that went neither into decodes nor into tokens, in ns."""
    moved = {name: after[name] - before[name] for name in ("busy_ns", "decode_ns", "sample_ns", "commit_ns")}
    return float(moved["busy_ns"] - moved["decode_ns"] - moved["sample_ns"] - moved["commit_ns"])
