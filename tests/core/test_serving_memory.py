"""A server's loads on demand against the memory that is free, with engines that are real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from homes import home

from mullama.cli.server.serving import make_manager
from mullama.config import ServeConfig
from mullama.engine.memory import fits
from mullama.errors import MemoryTooSmall
from mullama.machine import memory as machine_memory
from mullama.models.child import probe
from mullama.serving.manager import ModelManager
from mullama.serving.states import ModelState


class Memory:
    """A machine whose free memory shrinks with each model that is loaded."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.a_model = 0
        self.models: ModelManager | None = None

    def available(self) -> int:
        loaded = len(self.models.items()) if self.models is not None else 0
        return self.free - loaded * self.a_model


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory(1 << 40)
    monkeypatch.setattr(machine_memory, "available_memory", found.available)
    return found


@pytest.fixture
def models(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Memory
) -> Iterator[ModelManager]:
    """Two models by name, ``a`` and ``b``, neither of them loaded."""
    monkeypatch.setenv("MULLAMA_HOME", home(tmp_path / "home"))
    config = ServeConfig(
        ctx_size=512, parallel=2, threads=1, batch_size=64, page_dir=str(tmp_path / "pages"), memory_budget="0",
        kv_host_bytes=0, store_models=False,
    )  # fmt: skip
    found = memory.models = make_manager(config)
    for name, arch in (("a", "llama"), ("b", "gemma3")):
        found.add(name, str(tiny_model(arch)))
    needs = fits.expected(tiny_model("gemma3"), config, n_ctx=512, n_parallel=2)
    assert needs is not None
    memory.a_model = needs.total
    yield found
    found.close()


def play(models: ModelManager, test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test, 60)
        await models.drain(1)

    asyncio.run(limited())


def test_an_idle_model_makes_room_where_memory_lacks(models: ModelManager, memory: Memory) -> None:
    async def test() -> None:
        await models.load("a")
        memory.free = 2 * memory.a_model - 1
        await models.load("b")
        assert [name for name, _ in models.items()] == ["b"]
        assert models.get("a").state is ModelState.UNLOADED

    play(models, test())


def test_a_refused_model_is_not_even_opened_and_loads_when_there_is_memory(
    models: ModelManager, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    check_model = probe.check_model

    def noted(path: Path, **options: Any) -> Any:
        opened.append(str(path))
        return check_model(path, **options)

    monkeypatch.setattr(probe, "check_model", noted)

    async def test() -> None:
        memory.free = memory.a_model - 1
        for _ in range(3):
            with pytest.raises(MemoryTooSmall, match=r"^b with 2 x 512 tokens does not fit: "):
                await models.load("b")
        assert (opened, models.get("b").failures.n) == ([], 0)
        memory.free += 1
        await models.load("b")
        assert opened == [models.get("b").reference]

    play(models, test())


def test_a_sleeper_is_woken_when_there_is_memory(models: ModelManager, memory: Memory) -> None:
    async def test() -> None:
        await models.load("b")
        await models.sleep("b")
        memory.free = memory.a_model - 1
        with pytest.raises(MemoryTooSmall, match=r"^b with 2 x 512 tokens does not fit: "):
            await models.lease("b")
        served = models.get("b")
        assert (served.state, served.asleep is None) == (ModelState.ASLEEP, False)
        memory.free += 1
        (await models.lease("b")).release()
        assert (served.state, served.error) == (ModelState.READY, None)

    play(models, test())
