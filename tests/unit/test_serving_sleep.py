"""Models that sleep: who may, what they hold, and that whoever asks for one wakes it (serving/sleepers.py)."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any, cast

import pytest
from serving_support import TIMEOUT, Engine, Weights, World, play, settle, until

from mullama.engine.client import EngineClient
from mullama.errors import (
    AdapterLost,
    InvalidRequest,
    MemoryTooSmall,
    ModelBusy,
    ModelLoadError,
    ModelNotLoaded,
    ShuttingDown,
)
from mullama.serving.states import ModelState


@dataclass
class Report:
    tokens: int = 12
    host_bytes: int = 20
    disk_bytes: int = 5
    sleep_ms: float = 1.0


class SleeperWeights(Weights):
    def sleep(self, level: str) -> Report:
        self.engine.move(level)
        return Report()

    def wake(self) -> float:
        self.engine.move("wake")
        return 1.0


class Sleeper(Engine):
    """Sleeps and wakes when ``may_move`` is set; ``errors`` are raised first."""

    weights_class = SleeperWeights

    def __init__(self, name: str, size: int, may_move: threading.Event, errors: list[Exception]) -> None:
        super().__init__(name, size)
        self.may_move = may_move
        self.errors = errors
        self.calls: list[str] = []

    def move(self, what: str) -> None:
        self.calls.append(what)
        assert self.may_move.wait(TIMEOUT)
        if self.errors:
            raise self.errors.pop(0)


class SleepWorld(World):
    def __init__(self, names: str = "ab", **options: Any) -> None:
        self.may_move = threading.Event()
        self.may_move.set()
        self.failures: list[Exception] = []
        super().__init__(names, **options)

    def make(self, name: str, **options: Any) -> EngineClient:
        engine = Sleeper(name, self.sizes.get(name, 10), self.may_move, self.failures)
        self.engines.append(engine)
        return cast(EngineClient, engine)

    def calls(self, i: int = 0) -> list[str]:
        return cast(Sleeper, self.engines[i]).calls


def test_a_request_wakes_it_and_those_that_come_meanwhile_wait_with_it() -> None:
    async def test() -> None:
        world = SleepWorld()
        models = world.models
        told: list[tuple[str, bool]] = []
        models.watchers.append(lambda name, engine: told.append((name, engine is not None)))
        await models.load("a")
        served = await models.sleep("a", "disk")
        assert (served.state, served.resident, world.loaded()) == (ModelState.ASLEEP, None, [])
        assert served.asleep is not None and (served.asleep.level, served.asleep.host_bytes) == ("disk", 20)
        assert models.ready
        assert models.try_lease("a") is None
        with pytest.raises(ModelNotLoaded, match="asleep"):
            models.resolve("a")
        assert await models.sleep("a") is served  # sleeps on
        world.may_move.clear()
        waiting = [asyncio.ensure_future(models.lease("a")) for _ in range(5)]
        await until(lambda: world.calls()[-1] == "wake")
        world.may_move.set()
        leases = await asyncio.gather(*waiting)
        assert {id(lease.engine) for lease in leases} == {id(world.engines[0])}
        assert (world.loads, world.calls(), served.asleep) == (["a"], ["disk", "wake"], None)
        assert told == [("a", True), ("a", False), ("a", True)]
        with pytest.raises(ModelBusy, match="in use"):
            await models.sleep("a")
        for lease in leases:
            lease.release()

    play(test())


def test_who_comes_while_it_falls_asleep_wakes_it() -> None:
    async def test() -> None:
        world = SleepWorld()
        await world.models.load("a")
        world.may_move.clear()
        sleeping = asyncio.ensure_future(world.models.sleep("a"))
        await until(lambda: world.calls() == ["host"])
        waiting = asyncio.ensure_future(world.models.lease("a"))
        await settle()
        assert world.engines[0] in world.models.served.engines()
        world.may_move.set()
        await sleeping
        (await waiting).release()
        assert (world.loads, world.calls()) == (["a"], ["host", "wake"])

    play(test())


def test_one_that_cannot_sleep_stays_awake() -> None:
    async def test() -> None:
        world = SleepWorld()
        await world.models.load("a")
        world.failures.append(InvalidRequest("there is no disk tier"))
        world.may_move.clear()
        sleeping = asyncio.ensure_future(world.models.sleep("a", "disk"))
        await until(lambda: world.calls() == ["disk"])
        waiting = asyncio.ensure_future(world.models.lease("a"))
        await settle()
        world.may_move.set()
        with pytest.raises(InvalidRequest, match="disk tier"):
            await sleeping
        (await waiting).release()
        assert (world.loads, world.models.get("a").state) == (["a"], ModelState.READY)
        with pytest.raises(InvalidRequest, match="one of host, disk"):
            await world.models.sleep("a", "deep")
        with pytest.raises(ModelNotLoaded, match="cannot sleep"):
            await world.models.sleep("b")

    play(test())


def test_one_that_cannot_be_woken_is_loaded_anew() -> None:
    async def test() -> None:
        error = ModelLoadError("it has changed")
        world = SleepWorld()
        await world.models.load("a")
        await world.models.sleep("a")
        world.failures.append(error)
        (await world.models.lease("a")).release()
        assert world.loads == ["a", "a"]
        assert [engine.n_closed for engine in world.engines] == [1, 0]
        world.errors["a"] = ModelLoadError("gone")
        await world.models.sleep("a")
        world.failures.append(error)
        with pytest.raises(ModelLoadError, match="gone"):
            await world.models.lease("a")
        served = world.models.get("a")
        assert (served.state, served.asleep, world.engines[1].n_closed) == (ModelState.FAILED, None, 1)

    play(test())


@pytest.mark.parametrize(
    "error", [MemoryTooSmall("it does not fit", missing=1), AdapterLost("it does not fit")], ids=["memory", "adapter"]
)
def test_one_that_lacks_something_sleeps_on_and_is_woken_later(error: ModelLoadError) -> None:
    async def test() -> None:
        world = SleepWorld()
        await world.models.load("a")
        served = await world.models.sleep("a")
        for _ in range(3):
            world.failures.append(error)
            with pytest.raises(type(error), match="it does not fit"):
                await world.models.lease("a")
            assert (served.state, served.error, served.failures.n) == (ModelState.ASLEEP, "it does not fit", 0)
            assert served.asleep is not None
        (await world.models.lease("a")).release()
        assert (world.loads, world.engines[0].n_closed, served.error) == (["a"], 0, None)

    play(test())


def test_what_sleepers_hold_goes_before_idle_models_where_memory_lacks() -> None:
    async def test() -> None:
        world = SleepWorld("abc")
        models = world.models
        await models.load("a")
        await models.load("b")
        await models.sleep("a")
        world.refusals["c"] = [MemoryTooSmall("c does not fit", missing=15)]
        await models.load("c")
        assert (models.get("a").state, world.loaded()) == (ModelState.UNLOADED, ["b", "c"])
        world.refusals["a"] = [MemoryTooSmall("a does not fit", missing=15)]
        await models.sleep("b")
        models.get("b").pinned = True
        with pytest.raises(MemoryTooSmall, match="a does not fit"):
            await models.load("a")
        assert (models.get("b").state, world.loaded()) == (ModelState.ASLEEP, ["c"])

    play(test())


def test_what_sleepers_hold_counts_and_makes_room_first() -> None:
    async def test() -> None:
        world = SleepWorld("abc", memory_budget=100, sizes={"a": 50, "b": 30, "c": 60})
        models = world.models
        await models.load("a")
        await models.sleep("a")
        await models.load("b")  # 20 + 30
        assert models.get("a").state is ModelState.ASLEEP
        assert models.memory_left("b").alone == 80  # type: ignore[union-attr]
        await models.load("c")  # 20 + 30 + 60: too much, and without the sleeper it fits
        assert (models.get("a").state, world.loaded()) == (ModelState.UNLOADED, ["b", "c"])
        assert world.engines[0].n_closed == 1

    play(test())


def test_a_sleeper_that_finds_no_room_sleeps_on() -> None:
    async def test() -> None:
        world = SleepWorld("ab", memory_budget=100, sizes={"a": 50, "b": 60})
        models = world.models
        await models.load("a")
        await models.sleep("a")
        await models.load("b")
        models.get("b").pinned = True
        with pytest.raises(ModelBusy, match="pinned"):
            await models.lease("a")
        assert models.get("a").state is ModelState.ASLEEP
        models.get("b").pinned = False
        (await models.lease("a")).release()
        assert (world.loads, world.loaded()) == (["a", "b"], ["a"])

    play(test())


def test_idle_ones_fall_asleep_and_are_given_up_in_the_end() -> None:
    async def test() -> None:
        world = SleepWorld(sleep_after_s=10, sleep_level="disk")
        models = world.models
        await models.load("a")
        models.set_keep_alive("a", 100)
        served = models.get("a")
        with await models.lease("a"):
            world.clock.now += 50
            models.idle.look()
            await settle()
            assert served.state is ModelState.READY
        world.clock.now += 11
        models.idle.look()
        await until(lambda: served.state is ModelState.ASLEEP)
        assert world.calls() == ["disk"]
        world.clock.now += 100
        models.idle.look()
        await until(lambda: served.state is ModelState.UNLOADED)
        assert world.engines[0].n_closed == 1

    play(test())


def test_a_sleep_that_fails_is_not_tried_over_and_over() -> None:
    async def test() -> None:
        world = SleepWorld(sleep_after_s=10)
        await world.models.load("a")
        world.failures.append(InvalidRequest("no"))
        world.clock.now += 11
        world.models.idle.look()
        await until(lambda: world.models.get("a").resident.cannot_sleep)
        world.models.idle.look()
        await settle()
        assert (world.calls(), world.models.get("a").state) == (["host"], ModelState.READY)

    play(test())


def test_one_that_nobody_ever_asked_sleeps_too() -> None:
    async def test() -> None:
        world = SleepWorld("", sleep_after_s=0)
        await asyncio.to_thread(lambda: world.models.add_loaded("x", world.make("x")))
        world.models.start()
        await until(lambda: world.models.get("x").state is ModelState.ASLEEP)

    play(test())


def test_a_request_that_is_just_ending_puts_the_sleep_off() -> None:
    """The lease is given back when a client leaves, and its engine needs a step to stop."""

    async def test() -> None:
        world = SleepWorld(sleep_after_s=10)
        models = world.models
        await models.load("a")
        world.failures.append(ModelBusy("it computes now"))
        world.clock.now += 11
        models.idle.look()
        await until(lambda: len(world.calls()) == 1)
        await until(lambda: models.get("a").last_used == world.clock.now)
        world.clock.now += 11
        models.idle.look()
        await until(lambda: models.get("a").state is ModelState.ASLEEP)

    play(test())


def test_a_sleep_that_breaks_does_not_end_the_watch() -> None:
    async def test() -> None:
        world = SleepWorld(sleep_after_s=10)
        for name in "ab":
            await world.models.load(name)
        world.failures.append(OSError("disk full"))
        world.clock.now += 11
        world.models.idle.look()
        await until(lambda: world.models.get("b").state is ModelState.ASLEEP)
        assert world.models.get("a").resident.cannot_sleep

    play(test())


def test_unloading_and_the_end_close_a_sleeper() -> None:
    async def test() -> None:
        world = SleepWorld()
        for name in "ab":
            await world.models.load(name)
            await world.models.sleep(name)
        assert [name for name, _ in world.models.served.asleep()] == ["a", "b"]
        served = await world.models.unload("a")
        assert (served.state, world.engines[0].n_closed) == (ModelState.UNLOADED, 1)
        await world.models.drain(0)
        with pytest.raises(ShuttingDown):
            await world.models.lease("b")
        world.models.close()
        assert world.engines[1].n_closed == 1

    play(test())
