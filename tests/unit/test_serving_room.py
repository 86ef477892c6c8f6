"""Making room where several models are busy, and loads that nobody waits for any more (serving/manager.py)."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_support import TIMEOUT, Engine, World, play, settle, until

from mullama.errors import ModelBusy, ModelNotLoaded, ShuttingDown
from mullama.serving.model_eviction import ModelView
from mullama.serving.states import ModelState


def test_whichever_busy_model_ends_first_makes_room() -> None:
    async def test() -> None:
        world = World("abc", max_models=2)
        models = world.models
        long = await models.lease("a")
        world.clock.now += 1
        short = await models.lease("b")
        waiting = asyncio.ensure_future(models.lease("c"))
        await until(lambda: models.get("a").state is ModelState.YIELDING)
        short.release()
        with await waiting:
            assert world.loaded() == ["a", "c"]
            # a was named by lru, but its room was not needed: it takes requests again
            assert models.get("a").state is ModelState.READY
        long.release()

    play(test())


def test_who_waited_for_a_model_that_stays_after_all_is_answered() -> None:
    async def test() -> None:
        world = World("abc", max_models=2)
        models = world.models
        long = await models.lease("a")
        world.clock.now += 1
        short = await models.lease("b")
        waiting = asyncio.ensure_future(models.lease("c"))
        await until(lambda: models.get("a").state is ModelState.YIELDING)
        late = asyncio.ensure_future(models.lease("a"))
        await settle()
        assert not late.done()
        short.release()
        (await waiting).release()
        assert (await late).engine is long.engine
        assert world.loads == ["a", "b", "c"]

    play(test())


def test_a_room_that_nobody_wants_any_more_is_given_back() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        models = world.models
        lease = await models.lease("a")
        waiting = asyncio.ensure_future(models.lease("b"))
        await until(lambda: models.get("a").state is ModelState.YIELDING)
        waiting.cancel()
        await until(lambda: models.get("a").state is not ModelState.YIELDING)
        again = models.try_lease("a")
        assert again is not None and again.engine is lease.engine
        lease.release()
        again.release()
        await settle()
        assert (world.loads, world.engines[0].n_closed) == (["a"], 0)

    play(test())


def test_a_model_is_not_loaded_for_who_left_while_room_was_made() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        models = world.models
        (await models.lease("a")).release()
        world.engines[0].may_close.clear()
        waiting = asyncio.ensure_future(models.lease("b"))
        await until(lambda: not world.loaded())
        waiting.cancel()
        await settle()
        world.engines[0].may_close.set()
        await until(lambda: models.loads.is_idle)
        assert world.loads == ["a"]

    play(test())


def test_a_pin_that_comes_while_a_model_gives_way_holds() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        models = world.models
        lease = await models.lease("a")
        waiting = asyncio.ensure_future(models.lease("b"))
        await until(lambda: models.get("a").state is ModelState.YIELDING)
        models.get("a").pinned = True
        lease.release()
        with pytest.raises(ModelBusy, match="pinned"):
            await waiting
        assert (world.loaded(), world.engines[0].n_closed) == (["a"], 0)
        again = models.try_lease("a")
        assert again is not None
        again.release()

    play(test())


def test_no_room_now_says_nothing_of_the_model_or_the_server() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        models = world.models
        await models.load("a")
        models.get("a").pinned = True
        with pytest.raises(ModelBusy):
            await models.lease("b")
        assert models.get("b").state is ModelState.UNLOADED
        assert "pinned" in (models.get("b").error or "")
        assert models.ready
        models.get("a").pinned = False
        (await models.lease("b")).release()
        assert models.get("b").error is None

    play(test())


def test_a_forced_unload_of_a_model_that_gives_way_is_not_taken_back() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        models = world.models
        lease = await models.lease("a")
        waiting = asyncio.ensure_future(models.lease("b"))
        await until(lambda: models.get("a").state is ModelState.YIELDING)
        unloading = asyncio.ensure_future(models.unload("a", force=True))
        await until(lambda: bool(world.engines[0].drained))
        waiting.cancel()
        await settle()
        assert models.try_lease("a") is None, "a drained engine would refuse it"
        lease.release()
        await unloading
        assert world.engines[0].n_closed == 1

    play(test())


@pytest.mark.parametrize("is_late", [False, True])
def test_a_load_that_outlives_the_loop_leaves_no_engine(is_late: bool) -> None:
    world = World("a")

    async def test() -> None:
        waiting = asyncio.ensure_future(world.models.lease("a"))
        await until(lambda: world.loads == ["a"])
        await world.models.drain(0)
        with pytest.raises(ShuttingDown):
            await waiting
        if not is_late:  # asyncio.run waits for its threads before it returns
            threading.Timer(0.05, world.may_load.set).start()

    world.may_load.clear()
    if is_late:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(test())
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        world.models.close()
        world.may_load.set()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    else:
        asyncio.run(test())
        world.models.close()
    assert [engine.n_closed for engine in world.engines] == [1]


def test_a_model_that_was_there_from_the_start_counts_as_one_that_is_loaded_later() -> None:
    async def test() -> None:
        world = World("", sizes={"a": 30, "b": 30}, memory_budget=50)
        engine = Engine("a", size=10)
        world.engines.append(engine)
        models = world.models
        models.add_loaded("a", engine, "a")  # type: ignore[arg-type]
        models.add("b", "b")
        assert models.get("a").n_bytes == 30
        (await models.lease("b")).release()
        assert world.loaded() == ["b"], "30 and 30 are more than 50, though the weights are 10"

    play(test())


def test_what_a_model_takes_beside_its_weights_stays_when_it_is_replaced() -> None:
    async def test() -> None:
        world = World("a", sizes={"a": 30})
        first = Engine("a", size=10)
        world.models.add_loaded("z", first, "a")  # type: ignore[arg-type]
        old = world.models.served.replace(world.models.get("z"), Engine("z", size=25))  # type: ignore[arg-type]
        assert world.models.get("z").n_bytes == 45
        await world.models.served.retire(old)
        assert first.n_closed == 1

    play(test())


class BusyFirst:
    """A policy that would rather stop a model in use."""

    def victim(self, candidates: object) -> str:
        return max(candidates, key=lambda view: (view.in_use, view.name)).name  # type: ignore[call-overload,no-any-return]


def test_a_policy_is_not_asked_about_busy_models_where_one_is_idle() -> None:
    async def test() -> None:
        world = World("abc", max_models=2)
        world.models.evictor.policy = BusyFirst()
        with await world.models.lease("b"):
            await world.models.load("a")
            await asyncio.wait_for(world.models.load("c"), 5)
            assert world.loaded() == ["b", "c"]

    play(test())


def test_a_name_that_comes_while_somebody_goes_through_them() -> None:
    """Bodies are parsed in threads, so that a name of the store may come at any moment, and twice at once."""
    world = World("ab", find=lambda name: name)
    going_through = iter(world.models.served)
    assert next(going_through).name == "a"
    world.models.get("stored")
    assert [one.name for one in going_through] == ["b"]

    def find_slowly(name: str) -> str:
        if len(world.models) == 3:
            world.models.add(name, name, from_store=True)  # the other thread is first
        return name

    world.models._find = find_slowly
    assert world.models.get("twice") is world.models.get("twice")
    assert [one.name for one in world.models.all()] == ["a", "b", "stored", "twice"]


@given(seed=st.integers(0, 2**32), max_models=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_long_and_short_answers_never_lock_anybody_out(seed: int, max_models: int) -> None:
    """Whoever stays is answered, though models are always busy and clients leave while room is made."""
    choose = random.Random(seed)

    async def test() -> None:
        world = World("abcd", max_models=max_models)
        models = world.models
        in_use: dict[int, int] = {}
        for_each = world.make

        def make(name: str, **options: object) -> object:
            engine = for_each(name, **options)
            engine.in_use = lambda: in_use.get(id(engine), 0)  # type: ignore[attr-defined]
            return engine

        world.make = make  # type: ignore[method-assign,assignment]

        async def client(leaves: bool) -> None:
            for _ in range(4):
                asking = asyncio.ensure_future(models.lease(choose.choice("abcd")))
                if leaves:
                    for _ in range(choose.randrange(6)):
                        await asyncio.sleep(0)
                    asking.cancel()
                try:
                    lease = await asking
                except asyncio.CancelledError:
                    continue
                key = id(lease.engine)
                in_use[key] = in_use.get(key, 0) + 1
                assert len(models.items()) <= max_models
                for _ in range(choose.choice((0, 1, 30))):
                    await asyncio.sleep(0)
                in_use[key] -= 1
                lease.release()

        await asyncio.gather(*(client(leaves=i % 3 == 0) for i in range(9)))
        assert not any(one.waiters or one.state is ModelState.YIELDING for one in models.all())
        await models.drain(0)
        await until(lambda: models.loads.is_idle)
        await until(lambda: not models.budget.closing)
        models.close()
        assert [engine.n_closed for engine in world.engines] == [1] * len(world.engines)
        assert not any(engine.closed_in_use for engine in world.engines)

    play(test())


def test_an_engine_that_was_replaced_counts_until_it_has_ended() -> None:
    """What fits as soon as it has drained waits for that, and nobody is unloaded in its place."""

    async def test() -> None:
        world = World("ab", sizes={"a": 10, "b": 10}, memory_budget=25)
        models = world.models
        streaming = await models.lease("a")
        old = models.served.replace(models.get("a"), world.make("a"))
        retiring = asyncio.ensure_future(models.served.retire(old))
        waiting = asyncio.ensure_future(models.lease("b"))
        await settle()
        await asyncio.sleep(0.01)
        assert not waiting.done() and world.loads == ["a"]
        streaming.release()
        await retiring
        with await waiting:
            assert world.loads == ["a", "b"]
            assert world.loaded() == ["a", "b"]
        assert [engine.n_closed for engine in world.engines] == [1, 0, 0]

    play(test())


def test_what_is_looked_at_is_closed_afterwards() -> None:
    async def test() -> None:
        world = World("a")
        models = world.models
        (await models.lease("a")).release()
        look = models.borrow("a")
        with pytest.raises(ModelBusy, match="looked at"):
            await models.unload("a")
        unloading = asyncio.ensure_future(models.unload("a", force=True))
        await until(lambda: models.get("a").state is ModelState.UNLOADING)
        with models.borrow("A"):
            await settle()
            look.release()
            await settle()
            assert world.engines[0].n_closed == 0
        await unloading
        assert world.engines[0].n_closed == 1
        assert models.get("a").in_use == 0
        with pytest.raises(ModelNotLoaded):
            models.borrow("a")

    play(test())


@pytest.mark.parametrize("does", ["exits", "sleeps", "names nobody", "raises"])
def test_a_user_s_policy_runs_beside_the_event_loop(
    does: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mullama.serving.model_eviction.VICTIM_S", 0.05)
    threads: list[threading.Thread] = []
    over = threading.Event()

    class Mine:
        def victim(self, candidates: Sequence[ModelView]) -> Any:
            threads.append(threading.current_thread())
            if does == "exits":
                raise SystemExit(3)
            if does == "sleeps":
                over.wait(TIMEOUT)
            return {"names nobody": None, "sleeps": "a"}[does]

    async def test() -> None:
        world = World("ab", max_models=1)
        world.models.evictor.policy = Mine()
        for name in "ab":
            (await world.models.lease(name)).release()
        assert world.loaded() == ["b"]
        over.set()

    play(test())
    assert threads[0] is not threading.main_thread()
    words = {
        "exits": "raised SystemExit: 3",
        "raises": "raised KeyError: 'raises'",
        "sleeps": "gave no answer within 0.05 s",
        "names nobody": "named 'None', which cannot be unloaded",
    }
    assert f"the model policy {words[does]}" in caplog.text and "; lru is asked instead" in caplog.text
