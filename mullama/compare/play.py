"""Plays a workload once on an engine, by its public interface, and notes when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from mullama.engine.client import AsyncGeneration, EngineClient
from mullama.errors import EngineDead, MullamaError, ShuttingDown
from mullama.types import Finish, FinishReason, Request, SamplingParams
from mullama.workload.base import Client, Outcome, TraceRequest, Workload
from mullama.workload.prompts import Prompts

#: ``progress(done, total)``: requests, or seconds where the workload says when it stops.
Progress = Callable[[float, float], None]


@dataclass(slots=True)
class Played:
    """One run. ``late_s``: how late the latest request was sent, because this process was busy."""

    outcomes: list[Outcome] = field(default_factory=list)
    late_s: float = 0.0
    exhausted: int = 0  # clients that had sent everything before the workload stops


async def play(
    engine: EngineClient,
    workload: Workload,
    prompts: Prompts,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda done, total: None,
) -> Played:
    """Send every request in its time, read every answer to its end, and return the outcomes by index.

    A request that is refused or fails is an outcome with an error; an engine that stops raises EngineDead or
    ShuttingDown. Cancelled, it cancels what it has sent.
    """
    player = _Player(engine, workload, prompts, clock, progress)
    try:
        await player.run()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    player.played.outcomes.sort(key=lambda outcome: outcome.index)
    return player.played


class _Player:
    def __init__(
        self,
        engine: EngineClient,
        workload: Workload,
        prompts: Prompts,
        clock: Callable[[], float],
        progress: Progress,
    ) -> None:
        self.played = Played()
        self._engine = engine
        self._workload = workload
        self._prompts = prompts
        self._clock = clock
        self._progress = progress
        self._total = len(workload.all_requests())
        self._start = 0.0

    async def run(self) -> None:
        self._start = self._clock()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._open_loop(group))
            for client, first in zip(self._workload.clients, self._workload.first_indices(), strict=True):
                group.create_task(self._closed_loop(client, first))

    def _now(self) -> float:
        return self._clock() - self._start

    async def _open_loop(self, group: asyncio.TaskGroup) -> None:
        for index, request in enumerate(self._workload.requests):
            prompt = self._prompts.make(index, request)  # before its time comes
            await asyncio.sleep(max(request.at_s - self._now(), 0.0))
            self.played.late_s = max(self.played.late_s, self._now() - request.at_s)
            generation = self._submit(index, request, prompt)
            if generation is not None:
                group.create_task(self._read(index, request, generation))

    async def _closed_loop(self, client: Client, first: int) -> None:
        stop_s = self._workload.stop_s
        for offset, request in enumerate(client.requests):
            prompt = self._prompts.make(first + offset, request)
            now = self._now()
            at_s = max(request.at_s, now + (client.think_s if offset else 0.0))
            if stop_s is not None and at_s >= stop_s:
                return
            await asyncio.sleep(at_s - now)
            sent = replace(request, at_s=self._now())
            generation = self._submit(first + offset, sent, prompt)
            if generation is not None:
                await self._read(first + offset, sent, generation)
        if stop_s is not None and self._now() < stop_s:
            self.played.exhausted += 1

    def _submit(self, index: int, request: TraceRequest, prompt: list[int]) -> AsyncGeneration | None:
        """None: it was refused, and its outcome is noted."""
        sampling = SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True)
        try:
            return self._engine.submit(
                Request(
                    id=f"compare-{index}",
                    prompt=prompt,
                    sampling=sampling,
                    priority=request.priority,
                    user=request.user,
                    slo_ms=request.slo_ms,
                )
            )
        except (EngineDead, ShuttingDown):
            raise
        except MullamaError as error:
            self._note(Outcome(index, request, finished_s=self._now(), error=error.message))
            return None

    async def _read(self, index: int, request: TraceRequest, generation: AsyncGeneration) -> None:
        token_s: list[float] = []
        try:
            async for delta in generation:
                token_s += [self._now()] * delta.n_tokens
        finally:
            generation.cancel()
        finish = generation.finish
        assert finish is not None, "a generation that stopped has ended"
        self._note(
            Outcome(
                index,
                request,
                token_s=tuple(token_s),
                finished_s=self._now(),
                cached_tokens=finish.profile.kv_cache_hit,
                preemptions=finish.profile.preemptions,
                error=_failure(finish, len(token_s), request.output_tokens),
            )
        )

    def _note(self, outcome: Outcome) -> None:
        self.played.outcomes.append(outcome)
        stop_s = self._workload.stop_s
        if stop_s is None:
            self._progress(len(self.played.outcomes), self._total)
        else:
            self._progress(min(self._now(), stop_s), stop_s)


def _failure(finish: Finish, n_tokens: int, wanted: int) -> str | None:
    """Why a request did not do what the trace says. Raises what stopped the whole engine."""
    if isinstance(finish.error, EngineDead | ShuttingDown):
        raise finish.error
    if finish.reason is FinishReason.ERROR:
        return str(finish.error)
    if finish.reason is FinishReason.CANCELLED:
        return "it was cancelled"
    return f"it ended after {n_tokens} of {wanted} tokens" if n_tokens < wanted else None
