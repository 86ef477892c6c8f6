"""Loading on demand, making room, leases, keep-alive, and the end; engines and the clock are fakes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_support import World, play, settle, until

from mullama.errors import (
    ConfigError,
    ModelBusy,
    ModelLoadError,
    ModelNotFound,
    ModelNotLoaded,
    MullamaError,
    QueueFull,
    ShuttingDown,
)
from mullama.serving.manager import ModelManager
from mullama.serving.model_eviction import POLICIES, ModelView
from mullama.serving.states import ModelState, Served

# -- names


def test_names() -> None:
    world = World("ab", find=lambda name: f"ref-{name}" if name.lower() == "stored" else None)
    models = world.models
    assert models.get(None).name == "a"
    assert models.get("B").name == "b"
    with pytest.raises(ConfigError, match="served as 'a'"):
        models.add("a", "other")
    with pytest.raises(ModelNotFound, match="served models: a, b"):
        models.get("nosuch")
    with pytest.raises(ModelNotFound, match="no model is served"):
        ModelManager().get(None)
    found = models.get("Stored")
    assert (found.name, found.reference, found.from_store) == ("stored", "ref-Stored", True)
    assert len(models) == 3
    with pytest.raises(ModelNotLoaded, match="it is unloaded"):
        models.resolve("a")


def test_a_name_with_capitals_is_found_in_any_case() -> None:
    world = World(
        "", find=lambda name: "other" if name == "Kept" else None, others=lambda: [("mymodel", "r"), ("s", "r")]
    )
    models = world.models
    models.add("MyModel", "r")
    for asked in ("MyModel", "mymodel", "MYMODEL"):
        assert models.get(asked).name == "MyModel"
        with pytest.raises(ModelNotLoaded):
            models.resolve(asked)
    assert models.others() == [("s", "r")], "no name is listed twice"
    assert models.get("Kept") is models.get("kept")
    models.add("mymodel", "r2")
    assert [models.get(asked).name for asked in ("MyModel", "mymodel", "MYMODEL")] == ["MyModel", "mymodel", "mymodel"]


def test_others_are_those_that_are_not_served() -> None:
    world = World("a", others=lambda: [("a", "ra"), ("s", "rs")])
    assert world.models.has_others
    assert world.models.others() == [("s", "rs")]
    assert World().models.others() == []
    assert not World().models.has_others


# -- loading


def test_loads_are_coalesced_and_in_order() -> None:
    async def test() -> None:
        world = World("ab")
        world.may_load.clear()
        waiting = [asyncio.ensure_future(world.models.lease(name)) for name in "abaab"]
        await until(lambda: world.loads == ["a"])
        assert world.models.get("a").state is ModelState.LOADING
        world.may_load.set()
        leases = await asyncio.gather(*waiting)
        assert world.loads == ["a", "b"]
        assert [lease.engine.info.name for lease in leases] == list("abaab")
        assert (world.models.get("a").in_use, world.models.get("a").n_requests) == (3, 3)
        for lease in leases:
            lease.release()
            lease.release()  # once
        assert world.models.get("a").in_use == 0
        world.models.close()

    play(test())


def test_a_load_that_fails_answers_all_and_is_tried_again() -> None:
    async def test() -> None:
        world = World("a")
        world.errors["a"] = ModelLoadError("truncated")
        answers = await asyncio.gather(*(world.models.lease("a") for _ in range(3)), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["truncated"] * 3
        served = world.models.get("a")
        assert (served.state, served.error, world.models.ready) == (ModelState.FAILED, "truncated", False)
        del world.errors["a"]
        (await world.models.lease("a")).release()
        assert (served.state, served.error, world.loads) == (ModelState.READY, None, ["a", "a"])
        assert world.models.ready

    play(test())


def test_an_unexpected_error_of_the_loader_is_an_answer_too() -> None:
    async def test() -> None:
        world = World("ab")
        world.errors["a"] = ZeroDivisionError("x")
        with pytest.raises(ZeroDivisionError):
            await world.models.lease("a")
        assert world.models.get("a").error == "ZeroDivisionError: x"
        (await world.models.lease("b")).release()

    play(test())


def test_nothing_loads_without_a_loader() -> None:
    async def test() -> None:
        with pytest.raises(ModelNotLoaded, match="nothing here loads"):
            await World("a", load=None).models.lease("a")

    play(test())


def test_who_leaves_gives_the_place_up() -> None:
    async def test() -> None:
        world = World("ab")
        world.may_load.clear()
        first = asyncio.ensure_future(world.models.lease("a"))
        second = asyncio.ensure_future(world.models.lease("b"))
        await until(lambda: world.loads == ["a"])
        first.cancel()
        second.cancel()
        await settle()
        assert world.models.get("a").waiters == world.models.get("b").waiters == []
        world.may_load.set()
        (await world.models.lease("a")).release()
        assert world.loads == ["a"]  # nobody wanted b any more
        assert world.models.get("a").in_use == 0

    play(test())


def test_who_leaves_in_the_moment_of_the_answer_leaves_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        world = World("a")
        served, answer, answered = world.models.get("a"), world.models.served.answer, []

        def answer_and_leave(one: Served) -> None:
            answered.extend(one.waiters)
            answer(one)
            waiting.cancel()

        monkeypatch.setattr(world.models.served, "answer", answer_and_leave)
        waiting = asyncio.ensure_future(world.models.lease("a"))
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [waiter.result().name for waiter in answered] == ["a"]
        assert served.in_use == 0

    play(test())


def test_the_queue_for_loads_has_an_end() -> None:
    async def test() -> None:
        world = World("ab", max_waiting=2)
        world.may_load.clear()
        waiting = [asyncio.ensure_future(world.models.lease(name)) for name in "ab"]
        await settle()
        with pytest.raises(QueueFull, match="2 requests"):
            await world.models.lease("a")
        world.may_load.set()
        for lease in await asyncio.gather(*waiting):
            lease.release()

    play(test())


# -- making room


def test_the_one_idle_longest_makes_room() -> None:
    async def test() -> None:
        world = World("abc", max_models=2)
        for name in "aba":
            world.clock.now += 1
            (await world.models.lease(name)).release()
        (await world.models.lease("c")).release()
        assert world.loaded() == ["a", "c"]
        assert [engine.n_closed for engine in world.engines] == [0, 1, 0]

    play(test())


def test_the_memory_budget() -> None:
    async def test() -> None:
        world = World("abc", sizes={"a": 40, "b": 50, "c": 101}, memory_budget=100)
        for name in "ab":
            (await world.models.lease(name)).release()
        assert world.loaded() == ["a", "b"]
        with pytest.raises(ModelBusy, match="budget"):
            await world.models.lease("c")
        assert world.loaded() == ["a", "b"]  # nobody went for what cannot fit
        world.sizes["c"] = 60
        world.clock.now += 1
        (await world.models.lease("b")).release()
        (await world.models.lease("c")).release()
        assert world.loaded() == ["c"]

    play(test())


def test_adapters_count_for_the_memory_budget() -> None:
    async def test() -> None:
        world = World("abc", sizes={"a": 40, "b": 30, "c": 20}, memory_budget=100)
        for name in "ab":
            (await world.models.lease(name)).release()
            world.clock.now += 1
        world.engines[1].loras = [{"id": "x", "size_bytes": 15}]
        assert world.models.get("b").held_bytes == 45
        (await world.models.lease("c")).release()
        assert world.loaded() == ["b", "c"]

    play(test())


def test_a_busy_model_ends_first_and_takes_nothing_new() -> None:
    """A has somebody at all times; B gets its turn all the same, then A comes back."""

    async def test() -> None:
        world = World("ab", max_models=1)
        held = await world.models.lease("a")
        other = asyncio.ensure_future(world.models.lease("b"))
        await until(lambda: world.models.get("a").state is ModelState.YIELDING)
        again = asyncio.ensure_future(world.models.lease("a"))
        await settle()
        assert world.models.try_lease("a") is None
        assert (world.engines[0].n_closed, other.done(), again.done()) == (0, False, False)
        held.release()
        lease = await other
        assert world.loads == ["a", "b"]
        lease.release()
        (await again).release()
        assert world.loads == ["a", "b", "a"]
        assert [engine.n_closed for engine in world.engines] == [1, 1, 0]

    play(test())


def test_nobody_starves() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        got = {"a": 0, "b": 0}

        async def user(name: str) -> None:
            while min(got.values()) < 5:
                with await world.models.lease(name):
                    got[name] += 1
                    await asyncio.sleep(0)

        await asyncio.gather(*(user(name) for name in "aaab"))
        assert min(got.values()) >= 5

    play(test())


def test_pinned_models_stay() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        (await world.models.lease("a")).release()
        world.models.get("a").pinned = True
        with pytest.raises(ModelBusy, match="pinned"):
            await world.models.lease("b")
        world.models.get("a").pinned = False
        (await world.models.lease("b")).release()
        assert world.loaded() == ["b"]

    play(test())


class Wrong:
    def victim(self, candidates: Any) -> str:
        return "nosuch"


def test_a_policy_that_names_nobody_is_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    load = POLICIES.load
    monkeypatch.setattr(POLICIES, "load", lambda name: Wrong if name == "wrong" else load(name))

    async def test() -> None:
        world = World("ab", max_models=1, policy="wrong")
        for name in "ab":
            (await world.models.lease(name)).release()
        assert world.loaded() == ["b"]

    play(test())


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(MullamaError, match="nosuch"):
        World(policy="nosuch")


def test_policies() -> None:
    views = [ModelView("a", 9, 50, 0, 0, 1), ModelView("b", 1, 5, 0, 0, 0), ModelView("c", 2, 1, 0, 0, 0)]
    assert POLICIES.load("lru")().victim(views) == "b"
    assert POLICIES.load("largest")().victim(views) == "c"
    assert POLICIES.load("lru")().victim(views[:1]) == "a"


def test_an_engine_that_closes_slowly_is_waited_for() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        (await world.models.lease("a")).release()
        world.engines[0].may_close.clear()
        waiting = asyncio.ensure_future(world.models.lease("b"))
        await until(lambda: not world.loaded())
        await settle()
        assert world.loads == ["a"]
        world.engines[0].may_close.set()
        (await waiting).release()

    play(test())


# -- by hand


def test_unload_by_hand() -> None:
    async def test() -> None:
        world = World("a")
        await world.models.load("a")
        lease = await world.models.lease("a")
        with pytest.raises(ModelBusy, match="answers 1 request now"):
            await world.models.unload("a")
        (engine,) = world.engines
        engine.on_drain = lease.release
        assert (await world.models.unload("a", force=True, timeout_s=3)).state is ModelState.UNLOADED
        assert (engine.drained, engine.n_closed) == ([3], 1)
        await world.models.unload("a")  # nothing to do
        assert engine.n_closed == 1

    play(test())


def test_who_asks_during_a_forced_unload_gets_a_new_engine() -> None:
    async def test() -> None:
        world = World("a")
        lease = await world.models.lease("a")
        unloading = asyncio.ensure_future(world.models.unload("a", force=True))
        await until(lambda: bool(world.engines[0].drained))
        waiting = asyncio.ensure_future(world.models.lease("a"))
        await settle()
        assert not waiting.done()
        unloading.cancel()  # who asked for it leaves: it goes on
        await settle()
        lease.release()
        with await waiting as found:
            assert found.engine is not lease.engine
        assert [engine.n_closed for engine in world.engines] == [1, 0]

    play(test())


def test_a_hold_keeps_the_engine_and_is_no_request() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        await world.models.load("a")
        served = world.models.get("a")
        before = served.n_requests, served.last_used
        world.clock.now += 5
        hold = world.models.hold("a")
        assert hold is not None
        assert (served.n_requests, served.last_used, served.in_use) == (*before, 0)
        with pytest.raises(ModelBusy, match="changes its weights"):
            await world.models.unload("a")
        waiting = asyncio.ensure_future(world.models.lease("b"))
        await until(lambda: served.state is ModelState.YIELDING)
        assert world.models.hold("a") is None
        hold.release()
        assert served.last_used == before[1]
        (await waiting).release()

    play(test())


def test_replace_and_retire() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        told: list[tuple[str, Any]] = []
        world.models.watchers.append(lambda name, engine: told.append((name, engine)))
        old = await world.models.lease("a")
        new = world.make("a", weights="new")
        resident = world.models.served.replace(world.models.get("a"), new, "ref2")
        assert world.models.get("a").reference == "ref2"
        assert world.models.served.engines() == [new, old.engine]
        retiring = asyncio.ensure_future(world.models.served.retire(resident))
        await settle()
        assert world.engines[0].n_closed == 0
        old.release()
        await retiring
        assert (world.engines[0].n_closed, world.models.served.engines()) == (1, [new])
        await world.models.unload("a")
        assert told == [("a", old.engine), ("a", new), ("a", None)]
        with pytest.raises(ModelNotLoaded):
            world.models.served.replace(world.models.get("a"), new)

    play(test())


def test_a_victim_that_is_replaced_while_it_ends_leaves_no_engine_behind() -> None:
    async def test() -> None:
        world = World("ab", max_models=1)
        old = await world.models.lease("a")
        waiting = asyncio.ensure_future(world.models.lease("b"))
        await until(lambda: world.models.get("a").state is ModelState.YIELDING)
        resident = world.models.served.replace(world.models.get("a"), world.make("a"))
        retiring = asyncio.ensure_future(world.models.served.retire(resident))
        old.release()
        await retiring
        (await waiting).release()
        assert [engine.n_closed for engine in world.engines] == [1, 1, 0]

    play(test())


# -- keep-alive


def test_keep_alive_counts_from_the_end_of_the_last_answer() -> None:
    async def test() -> None:
        world = World("a", keep_alive_s=10.0)
        lease = await world.models.lease("a")
        world.clock.now += 100
        lease.release()
        await asyncio.sleep(0.06)
        assert world.loaded() == ["a"]
        world.clock.now += 11
        world.models.served.changed.set()
        await until(lambda: world.engines[0].n_closed == 1)
        await until(lambda: world.models.get("a").state is ModelState.UNLOADED)

    play(test())


def test_keep_alive_0_unloads_at_once_and_never_under_a_lease() -> None:
    async def test() -> None:
        world = World("a")
        lease = await world.models.lease("a")
        world.models.set_keep_alive("a", 0)
        await asyncio.sleep(0.06)
        assert world.loaded() == ["a"]
        lease.release()
        await until(lambda: world.engines[0].n_closed == 1)

    play(test())


def test_an_engine_that_was_there_from_the_start_is_watched_too() -> None:
    async def test() -> None:
        world = World("", keep_alive_s=0.0)
        await asyncio.to_thread(lambda: world.models.add_loaded("x", world.make("x")))  # as before the loop runs
        await settle()
        assert world.engines[0].n_closed == 0
        world.models.start()
        await until(lambda: world.engines[0].n_closed == 1)

    play(test())


def test_idle_time_begins_when_requests_may_come() -> None:
    """The first of several models must not be due already because the others took long to load."""

    async def test() -> None:
        world = World("", keep_alive_s=10.0)
        world.models.add_loaded("x", world.make("x"))
        world.clock.now += 100
        world.models.start()
        await asyncio.sleep(0.06)
        assert world.loaded() == ["x"]
        world.clock.now += 11
        world.models.served.changed.set()
        await until(lambda: world.engines[0].n_closed == 1)
        await until(lambda: world.models.get("x").memory_bytes == 0)

    play(test())


def test_an_engine_that_takes_over_is_watched_though_nobody_was_before() -> None:
    async def test() -> None:
        world = World("", keep_alive_s=0.0)
        world.models.start()  # there is nothing to watch
        world.models.add_loaded("x", world.make("x"))
        await until(lambda: world.engines[0].n_closed == 1)

    play(test())


def test_one_that_cannot_be_unloaded_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        world = World("ab", keep_alive_s=10.0)
        for name in "ab":
            await world.models.load(name)

        def fail() -> None:
            raise OSError("disk full")

        monkeypatch.setattr(world.engines[0], "close", fail)
        world.clock.now += 11
        world.models.served.changed.set()
        await until(lambda: world.engines[1].n_closed == 1)
        (await world.models.lease("a")).release()
        assert world.loads == ["a", "b", "a"], "who asks for it is answered"

    play(test())


def test_who_comes_while_an_idle_engine_closes_gets_the_next_one() -> None:
    async def test() -> None:
        world = World("a", keep_alive_s=0.0)
        lease = await world.models.lease("a")
        world.engines[0].may_close.clear()
        lease.release()
        await until(lambda: not world.loaded())
        waiting = asyncio.ensure_future(world.models.lease("a"))
        await settle()
        world.engines[0].may_close.set()
        with await waiting as found:
            await until(lambda: world.engines[0].n_closed == 1)
            await settle()
            assert world.models.get("a").state is ModelState.READY
            assert world.models.try_lease("a") is not None
            assert found.engine is world.models.served.engines()[0]

    play(test())


# -- the end


def test_drain_answers_everybody_and_a_late_load_is_closed() -> None:
    async def test() -> None:
        world = World("ab")
        (await world.models.lease("b")).release()
        world.may_load.clear()
        waiting = asyncio.ensure_future(world.models.lease("a"))
        await until(lambda: world.loads == ["b", "a"])
        assert await world.models.drain(2)
        with pytest.raises(ShuttingDown):
            await waiting
        with pytest.raises(ShuttingDown):
            await world.models.lease("b")
        world.may_load.set()
        await until(lambda: len(world.engines) == 2 and world.engines[1].n_closed == 1)
        world.models.close()
        world.models.close()
        assert [engine.n_closed for engine in world.engines] == [1, 1]
        assert world.engines[0].drained == [2]

    play(test())


@given(seed=st.integers(0, 2**32), max_models=st.integers(0, 3), by_memory=st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_random_walk_keeps_the_laws(seed: int, max_models: int, by_memory: bool) -> None:
    """Requests, clients that leave, unloads, keep-alives, failures, replacements, in any order."""
    choose = random.Random(seed)

    async def test() -> None:
        names = "abcd"
        sizes = {"a": 10, "b": 20, "c": 30, "d": 40}
        world = World(names, sizes=sizes, max_models=max_models, memory_budget=50 if by_memory else 0)
        models = world.models
        held: dict[int, int] = {}  # leases on an engine

        def check() -> None:
            loaded = [one for one in models.all() if one.resident is not None]
            assert not max_models or len(loaded) <= max_models
            assert not by_memory or sum(one.n_bytes for one in loaded) <= 50
            for engine in world.engines:
                assert not (engine.n_closed and held.get(id(engine))), "closed while leased"
                assert engine.n_closed <= 1

        async def request() -> None:
            name = choose.choice(names)
            try:
                lease = await models.lease(name)
            except (ModelLoadError, ModelBusy):
                return
            held[id(lease.engine)] = held.get(id(lease.engine), 0) + 1
            try:
                for _ in range(choose.randrange(4)):
                    check()
                    await asyncio.sleep(0)
            finally:
                held[id(lease.engine)] -= 1
                lease.release()

        async def unload() -> None:
            with contextlib.suppress(ModelBusy):
                await models.unload(choose.choice(names))

        tasks = []
        for _ in range(40):
            action = choose.randrange(8)
            if action < 4:
                tasks.append(asyncio.ensure_future(request()))
            elif action == 4:
                tasks.append(asyncio.ensure_future(unload()))
            elif action == 5 and tasks:
                choose.choice(tasks).cancel()
            elif action == 6:
                models.set_keep_alive(choose.choice(names), choose.choice((-1.0, 0.0, 5.0)))
            else:
                world.errors = {"a": ModelLoadError("no")} if choose.random() < 0.5 else {}
            await asyncio.sleep(0)
            check()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 15)
        assert not any(one.waiters for one in models.all())
        await models.drain(0)
        await until(lambda: not models.budget.closing and models.loads.is_idle)
        models.close()
        assert [engine.n_closed for engine in world.engines] == [1] * len(world.engines)

    play(test())
