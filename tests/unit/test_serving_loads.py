"""Loads that are given up, and loads that fail over and over (serving/loads.py)."""

from __future__ import annotations

import asyncio

import pytest
from serving_support import World, play, settle, until

from mullama.errors import EngineDead, LoadCancelled, MemoryTooSmall, ModelLoadError, ModelNotLoaded
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
        assert (served.state, served.error, served.failures.n) == (ModelState.READY, None, 0)
        assert world.loads == ["a", "b", "a"]

    play(test())


def test_an_engine_that_comes_too_late_to_be_cancelled_is_closed() -> None:
    async def test() -> None:
        world = World("a")
        load = world.load
        world.models.loads.load = lambda name, reference, progress: load(name, reference)
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
            pauses.append(served.failures.retry_at - world.clock.now)
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
        assert (served.failures.n, served.failures.last) == (0, None)

    play(test())


def too_small(missing: int = 10) -> MemoryTooSmall:
    return MemoryTooSmall("it does not fit", missing=missing)


def test_too_little_memory_is_not_remembered() -> None:
    """It says nothing of the file: the next request tries again at once, and the server is as ready as before."""

    async def test() -> None:
        world = World("a")
        world.refusals["a"] = [too_small() for _ in range(5)]
        served = world.models.get("a")
        for n in range(5):
            with pytest.raises(MemoryTooSmall, match="it does not fit") as refused:
                await world.models.lease("a")
            assert refused.value.retry_after is None
            assert (served.state, served.error, served.failures.n) == (ModelState.UNLOADED, "it does not fit", 0)
            assert (len(world.loads), world.models.ready) == (n + 1, True)
        (await world.models.lease("a")).release()
        assert (served.state, served.error) == (ModelState.READY, None)

    play(test())


def test_idle_models_go_one_by_one_where_memory_lacks() -> None:
    async def test() -> None:
        world = World("abcd")
        models = world.models
        for name in "abc":
            await models.load(name)
            world.clock.now += 1
        world.refusals["d"] = [too_small(15), too_small(5)]
        await models.load("d")
        assert (world.loads[3:], world.loaded()) == (["d", "d", "d"], ["c", "d"])
        assert [engine.n_closed for engine in world.engines] == [1, 1, 0, 0]

    play(test())


def test_busy_and_pinned_models_stay_where_memory_lacks() -> None:
    async def test() -> None:
        world = World("abc")
        models = world.models
        with await models.lease("a"):
            await models.load("b")
            models.get("b").pinned = True
            world.refusals["c"] = [too_small(0)]
            with pytest.raises(MemoryTooSmall):
                await models.lease("c")
            assert world.loaded() == ["a", "b"]
            assert models.get("a").state is ModelState.READY

    play(test())


def test_nobody_goes_for_a_model_that_would_not_fit_even_so() -> None:
    async def test() -> None:
        world = World("abc")
        models = world.models
        await models.load("a")
        await models.load("b")
        world.refusals["c"] = [too_small(21)]  # a and b are 20
        with pytest.raises(MemoryTooSmall):
            await models.lease("c")
        assert world.loaded() == ["a", "b"]

    play(test())


def test_what_is_just_being_closed_is_waited_for() -> None:
    """Its memory is free in a moment, so that nobody else has to go for it."""

    async def test() -> None:
        world = World("abc", max_models=2, memory_budget=100, sizes={"a": 10, "b": 10, "c": 10})
        models = world.models
        await models.load("a")
        world.clock.now += 1
        await models.load("b")
        world.engines[0].may_close.clear()
        world.refusals["c"] = [too_small()]
        waiting = asyncio.ensure_future(models.lease("c"))
        await until(lambda: world.loads[2:] == ["c"])
        await settle()
        assert not waiting.done()
        world.engines[0].may_close.set()
        (await waiting).release()
        assert (world.loads[2:], world.loaded()) == (["c", "c"], ["b", "c"])

    play(test())


def test_who_gives_a_model_up_while_memory_is_freed_for_it_is_heard() -> None:
    async def test() -> None:
        world = World("ab")
        models = world.models
        await models.load("a")
        world.engines[0].may_close.clear()
        world.refusals["b"] = [too_small(), too_small()]
        waiting = asyncio.ensure_future(models.lease("b"))
        await until(lambda: not world.loaded())
        unloading = asyncio.ensure_future(models.unload("b"))
        with pytest.raises(LoadCancelled):
            await waiting
        world.engines[0].may_close.set()
        served = await unloading
        assert (served.state, served.error) == (ModelState.UNLOADED, None)

    play(test())


# -- engines that stop by themselves ----------------------------------------------------------------------------------


def test_an_engine_that_stopped_is_told_of_and_loaded_anew_by_the_next_request() -> None:
    async def test() -> None:
        world = World("ab")
        told: list[tuple[str, bool]] = []
        world.models.watchers.append(lambda name, engine: told.append((name, engine is not None)))
        running = await world.models.lease("a")
        (await world.models.lease("b")).release()
        assert world.models.ready
        world.engines[0].death = "RuntimeError: on purpose"
        assert not world.models.ready
        (row, _) = world.models.all()
        assert (row.state, row.resident, row.error) == (
            ModelState.FAILED,
            None,
            "the engine stopped: RuntimeError: on purpose",
        )
        with pytest.raises(ModelNotLoaded):
            world.models.resolve("a")
        assert told == [("a", True), ("b", True), ("a", False)]
        assert world.engines[0].n_closed == 0, "a request still reads its error"
        again = await world.models.lease("a")
        assert world.loads == ["a", "b", "a"] and world.models.ready
        assert again.engine is world.engines[2] and row.error is None
        running.release()
        await until(lambda: world.engines[0].n_closed == 1)
        again.release()

    play(test())


@pytest.mark.parametrize("look", ["lease", "load", "hold", "resolve", "ready", "all"])
def test_whoever_looks_finds_out(look: str) -> None:
    async def test() -> None:
        world = World("a")
        (await world.models.lease("a")).release()
        world.engines[0].death = "SystemExit: 3"
        models = world.models
        if look == "lease":
            (await models.lease("a")).release()
        elif look == "load":
            assert (await models.load("a")).state is ModelState.READY
        elif look == "hold":
            assert models.hold("a") is None
        elif look == "resolve":
            with pytest.raises(ModelNotLoaded, match="it is failed"):
                models.resolve("a")
        else:
            assert (look != "ready" or not models.ready) and models.all()
        assert world.loads == (["a", "a"] if look in ("lease", "load") else ["a"])
        await until(lambda: world.engines[0].n_closed == 1)

    play(test())


def test_engines_that_stop_again_and_again_are_loaded_ever_more_rarely() -> None:
    async def test() -> None:
        world = World("a")
        pauses = []
        for _ in range(5):
            (await world.models.lease("a")).release()
            world.engines[-1].death = "RuntimeError: on purpose"
            begin = world.clock.now
            while True:
                try:
                    (await world.models.lease("a")).release()
                    break
                except EngineDead as error:
                    assert error.retry_after and "on purpose" not in error.message
                    world.clock.now += 0.25
            pauses.append(world.clock.now - begin)
        assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0]
        world.clock.now += 61  # it has been at work for a while: that was no load that went wrong
        world.engines[-1].death = "RuntimeError: on purpose"
        (await world.models.lease("a")).release()

    play(test())
