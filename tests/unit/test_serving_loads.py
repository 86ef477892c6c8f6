"""Loads that are given up, and loads that fail over and over (serving/manager.py)."""

from __future__ import annotations

import asyncio

import pytest
from serving_support import World, play, settle, until

from mullama.errors import LoadCancelled, ModelLoadError
from mullama.serving.states import ModelState


def test_unloading_what_is_being_loaded_cancels_the_load() -> None:
    async def test() -> None:
        world = World("ab")
        world.may_load.clear()
        waiting = [asyncio.ensure_future(world.models.lease("a")) for _ in range(3)]
        other = asyncio.ensure_future(world.models.lease("b"))
        await until(lambda: world.loads == ["a"])
        unloading = asyncio.ensure_future(world.models.unload("a"))
        for waiter in waiting:
            with pytest.raises(LoadCancelled, match="'a' was unloaded while it was being loaded"):
                await waiter
        late = asyncio.ensure_future(world.models.lease("a"))  # asks after the unload, and gets it
        await settle()
        world.may_load.set()
        served = await unloading
        assert world.cancelled == ["a"]
        (await other).release()
        (await late).release()
        assert (served.state, served.error, served.n_failures) == (ModelState.READY, None, 0)
        assert world.loads == ["a", "b", "a"]

    play(test())


def test_an_engine_that_comes_too_late_to_be_cancelled_is_closed() -> None:
    async def test() -> None:
        world = World("a")
        load = world.load
        world.models._load_engine = lambda name, reference, progress: load(name, reference)
        world.may_load.clear()
        waiting = asyncio.ensure_future(world.models.lease("a"))
        await until(lambda: world.loads == ["a"])
        unloading = asyncio.ensure_future(world.models.unload("a"))
        with pytest.raises(LoadCancelled):
            await waiting
        world.may_load.set()
        served = await unloading
        assert (served.state, served.resident, world.engines[0].n_closed) == (ModelState.UNLOADED, None, 1)

    play(test())


def test_a_load_that_fails_again_and_again_is_tried_ever_more_rarely() -> None:
    async def test() -> None:
        world = World("a")
        world.errors["a"] = ModelLoadError("truncated")
        pauses = []
        for _ in range(10):
            with pytest.raises(ModelLoadError, match="truncated"):
                await world.models.lease("a")
            served = world.models.get("a")
            pauses.append(served.retry_at - world.clock.now)
            n_loads = len(world.loads)
            if pauses[-1] > 0:
                with pytest.raises(ModelLoadError, match="truncated") as failure:
                    await world.models.lease("a")
                assert failure.value.retry_after == max(1, round(pauses[-1]))
                assert len(world.loads) == n_loads
            world.clock.now += pauses[-1]
        assert pauses == [0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]
        n_loads = len(world.loads)
        with pytest.raises(ModelLoadError, match="truncated"):  # by hand there is no pause
            await world.models.load("a")
        assert len(world.loads) == n_loads + 1
        del world.errors["a"]
        await world.models.load("a")
        assert (served.n_failures, served.failure) == (0, None)

    play(test())
