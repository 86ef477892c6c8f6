"""An engine without a model for `mullama compare`: slots, times that are known, and a loop whose clock jumps."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from cli_support import model_info

from mullama.errors import InvalidRequest, MullamaError
from mullama.types import Delta, Finish, FinishReason, Profile, Request
from mullama.workload.base import TraceRequest
from mullama.workload.spec import parse_workload

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing will ever happen: every task waits")
        self.loop.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only while everybody waits, and then at once."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run_virtually(main: Callable[[Callable[[], float]], Coroutine[Any, Any, T]]) -> T:
    """Run ``main(clock)`` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main(runner.get_loop().time))


class TimedGeneration:
    def __init__(self, request: Request) -> None:
        self.id = request.id
        self.request = request
        self.finish: Finish | None = None
        self.is_cancelled = False
        self.queue: asyncio.Queue[Delta | None] = asyncio.Queue()

    def cancel(self) -> None:
        self.is_cancelled = True

    def __aiter__(self) -> TimedGeneration:
        return self

    async def __anext__(self) -> Delta:
        delta = await self.queue.get()
        if delta is None:
            raise StopAsyncIteration
        return delta


class TimedEngine:
    """``prefill_s`` a prompt token and ``step_s`` an output token, in ``n_parallel`` slots; fcfs or by priority."""

    loaded: list[TimedEngine] = []
    POLICIES = ("fcfs", "priority", "broken")

    def __init__(self, *, parallel: int = 1, ctx: int = 512, prefill_s: float = 0.01, step_s: float = 0.1) -> None:
        self.info = replace(model_info("fake"), n_parallel=parallel, n_ctx=ctx, n_vocab=400)
        self.prefill_s = prefill_s
        self.step_s = step_s
        self.policy = "fcfs"
        self.log: list[Any] = []  # ("scheduler", name, params), "drop", or a Request
        self.generations: list[TimedGeneration] = []
        self.refuse: Callable[[Request], MullamaError | None] = lambda request: None
        self.fail: Callable[[Request], MullamaError | None] = lambda request: None
        self.on_submit: Callable[[Request], None] = lambda request: None
        self.config: Any = None
        self.closed = 0
        self._waiting: list[TimedGeneration] = []
        self._free = parallel
        self._tasks: set[asyncio.Task[None]] = set()

    def computing(self) -> dict[str, Any]:
        return {"threads": 2, "system": "fake"}

    @classmethod
    def load(cls, path: Any, *, name: str, config: Any, progress: Any, weights: str = "") -> TimedEngine:
        engine = cls(parallel=config.parallel or 2, ctx=config.ctx_size, prefill_s=1e-6, step_s=1e-4)
        engine.config = config
        cls.loaded.append(engine)
        return engine

    def detokenize(self, tokens: Sequence[int], *, special: bool = False, only_whole: bool = False) -> str:
        (token,) = tokens
        return f" word{'x' * (token % 7)}" if token % 2 else "<|control|>"

    @property
    def planning(self) -> TimedEngine:
        return self

    @property
    def kv(self) -> TimedEngine:
        return self

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        if spec not in self.POLICIES:
            raise InvalidRequest(f"there is no policy '{spec}'; there are {', '.join(self.POLICIES)}")
        self.policy = spec
        self.log.append(("scheduler", spec, dict(params or {})))
        return {"policy": spec, "params": {"budget": 512, **(params or {})}, "handed_over": 0}

    async def adrop(self, *, tiers: Sequence[str]) -> dict[str, int]:
        assert set(tiers) == {"device", "host"}  # what is on disk is not of this run
        self.log.append("drop")
        return {"cells_freed": 0}

    def snapshot(self) -> dict[str, Any]:
        broken = {"from": "broken", "reason": "it raised", "unix_time": 0.0}
        return {"policy": self.policy, "fallback": broken if self.policy == "broken" else None}

    def submit(self, request: Request) -> TimedGeneration:
        self.on_submit(request)
        refusal = self.refuse(request)
        if refusal is not None:
            raise refusal
        self.log.append(request)
        generation = TimedGeneration(request)
        self.generations.append(generation)
        self._waiting.append(generation)
        self._admit()
        return generation

    def close(self) -> None:
        self.closed += 1

    def _admit(self) -> None:
        if self.policy == "priority":
            self._waiting.sort(key=lambda generation: generation.request.priority)
        while self._free and self._waiting:
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._work(self._waiting.pop(0)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self, generation: TimedGeneration) -> None:
        request = generation.request
        profile = Profile(prompt_tokens=len(request.prompt), kv_cache_hit=3, preemptions=1)
        error = self.fail(request)
        await asyncio.sleep(len(request.prompt) * self.prefill_s)
        for number in range(0 if error else request.sampling.max_tokens or 0):
            if generation.is_cancelled:
                break
            if number:
                await asyncio.sleep(self.step_s)
            generation.queue.put_nowait(Delta("x", 1))
        reason = FinishReason.CANCELLED if generation.is_cancelled else FinishReason.LENGTH
        generation.finish = Finish(FinishReason.ERROR if error else reason, profile, error=error)
        generation.queue.put_nowait(None)
        self._free += 1
        self._admit()


def requests_of(spec: str, seed: int = 0) -> list[TraceRequest]:
    """The requests of an open-loop workload, by arrival."""
    workload = parse_workload(spec, seed)
    assert not workload.clients
    return list(workload.requests)
