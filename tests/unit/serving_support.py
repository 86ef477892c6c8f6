"""Engines for the tests of ``mullama.serving``: nothing is computed, and what happens to them is written down."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, cast

from cli_support import model_info

from mullama.engine.client import EngineClient
from mullama.errors import LoadCancelled
from mullama.serving.manager import ModelManager

TIMEOUT = 20  # of a test; nothing here takes as long as a second


class Weights:
    """``engine.weights``."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def loras(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.engine.loras
        return found


class Engine:
    """Counts how often it is closed; ``close`` waits for ``may_close``."""

    weights_class = Weights

    def __init__(self, name: str, size: int = 10, weights: str = "old") -> None:
        self.death: str | None = None
        self.info = replace(model_info(name), size_bytes=size, weights=weights)
        self.n_closed = 0
        self.loras: list[dict[str, Any]] = []
        self.weights = self.weights_class(self)
        self.drained: list[float] = []
        self.in_use: Callable[[], int] = lambda: 0
        self.closed_in_use = False
        self.up = True
        self.on_drain: Callable[[], None] = lambda: None
        self.may_close = threading.Event()
        self.may_close.set()

    def is_ready(self) -> bool:
        return self.up

    def counters(self) -> dict[str, int]:
        return {"sampled_tokens": 1}

    async def drain(self, seconds: float) -> bool:
        self.drained.append(seconds)
        self.on_drain()
        return True

    def close(self) -> None:
        assert self.may_close.wait(TIMEOUT)
        self.closed_in_use |= self.in_use() > 0
        self.n_closed += 1


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class World:
    """A manager with a loader whose loads wait for ``may_load``; every engine that was made."""

    def __init__(self, names: str = "abc", *, sizes: dict[str, int] | None = None, **options: Any) -> None:
        self.engines: list[Engine] = []
        self.loads: list[str] = []
        self.cancelled: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.refusals: dict[str, list[Exception]] = {}  # raised by the next loads, one each
        self.sizes = sizes or {}
        self.may_load = threading.Event()
        self.may_load.set()
        self.clock = Clock()
        options = {"load": self.load, "estimate": self.sizes.get, **options}
        self.models = ModelManager(clock=self.clock, **options)
        for name in names:
            self.models.add(name, name)

    def load(
        self, name: str, reference: str, progress: Callable[[float], bool] = lambda fraction: True
    ) -> EngineClient:
        self.loads.append(name)
        assert self.may_load.wait(TIMEOUT)
        if not progress(0.5):
            self.cancelled.append(name)
            raise LoadCancelled("cancelled")
        if refusals := self.refusals.get(name):
            raise refusals.pop(0)
        if name in self.errors:
            raise self.errors[name]
        return self.make(name)

    def make(self, name: str, **options: Any) -> EngineClient:
        engine = Engine(name, self.sizes.get(name, 10), **options)
        self.engines.append(engine)
        return cast(EngineClient, engine)

    def loaded(self) -> list[str]:
        return [name for name, _ in self.models.items()]


def play(test: Coroutine[Any, Any, None]) -> None:
    """Run a test on a loop of its own, with an end."""

    async def limited() -> None:
        await asyncio.wait_for(test, TIMEOUT)

    asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what threads and other tasks bring about."""
    while not condition():
        await asyncio.sleep(0.001)


async def settle() -> None:
    """Let every task go as far as it gets without threads."""
    for _ in range(20):
        await asyncio.sleep(0)
