"""The laws of the manager of models (serving/manager.py), with engines that are none and a clock that stands still."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mullama.errors import InvalidRequest, ModelBusy, ModelLoadError, ModelNotFound, QueueFull, ShuttingDown
from mullama.serving.durations import parse_duration
from mullama.serving.manager import ModelManager
from mullama.serving.states import ModelState


class Info:
    size_bytes = 100


class Engine:
    """Counts what is done to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.info = Info()
        self.closed = 0
        self.leases = 0

    def is_ready(self) -> bool:
        return self.closed == 0

    def close(self) -> None:
        assert self.leases == 0, f"{self.name} was closed under {self.leases} leases"
        self.closed += 1

    async def drain(self, timeout: float) -> bool:
        return True


class World:
    """A loader, and all that it loaded."""

    def __init__(self, **options: Any) -> None:
        self.engines: list[Engine] = []
        self.fails: set[str] = set()
        self.now = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.manager = ModelManager(load=self.load, clock=lambda: self.now, **options)

    def load(self, name: str, reference: str) -> Any:
        self.gate.wait(10)
        if name in self.fails:
            raise ModelLoadError(f"{name} is broken")
        engine = Engine(name)
        self.engines.append(engine)
        return engine

    @property
    def open_engines(self) -> list[str]:
        return sorted(engine.name for engine in self.engines if not engine.closed)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))  # type: ignore[arg-type]


async def settle(n: int = 50) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


def test_requests_for_one_model_share_its_load() -> None:
    async def go() -> None:
        world = World()
        world.manager.add("a", "ref")
        world.gate.clear()
        waiting = [asyncio.ensure_future(world.manager.lease("a")) for _ in range(5)]
        await settle()
        assert world.manager.get("a").state is ModelState.LOADING
        world.gate.set()
        leases = await asyncio.gather(*waiting)
        assert len(world.engines) == 1
        assert world.manager.get("a").in_use == 5
        for lease in leases:
            lease.release()
            lease.release()
        assert world.manager.get("a").in_use == 0

    run(go)


def test_a_failed_load_answers_everybody_and_the_next_one_tries_again() -> None:
    async def go() -> None:
        world = World()
        world.manager.add("a", "ref")
        world.fails.add("a")
        results = await asyncio.gather(*(world.manager.lease("a") for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [ModelLoadError] * 3
        assert (world.manager.get("a").state, world.manager.get("a").error) == (ModelState.FAILED, "a is broken")
        assert not world.manager.ready
        world.fails.clear()
        (await world.manager.lease("a")).release()
        assert world.manager.ready

    run(go)


def test_an_idle_model_makes_room_and_a_busy_one_is_waited_for() -> None:
    async def go() -> None:
        world = World(max_models=1)
        for name in "ab":
            world.manager.add(name, name)
        first = await world.manager.lease("a")
        waiting = asyncio.ensure_future(world.manager.lease("b"))
        await settle()
        assert not waiting.done()
        assert world.open_engines == ["a"]
        late = asyncio.ensure_future(world.manager.lease("a"))  # it must not keep b out for ever
        await settle()
        assert not late.done()
        first.release()
        second = await waiting
        assert world.open_engines == ["b"]
        second.release()
        (await late).release()
        assert world.open_engines == ["a"]

    run(go)


def test_the_budget_and_pins_hold() -> None:
    async def go() -> None:
        world = World(memory_budget=250, estimate=lambda reference: int(reference))
        for name, size in (("a", "100"), ("b", "100"), ("c", "100"), ("huge", "300")):
            world.manager.add(name, size)
        for name in "ab":
            (await world.manager.lease(name)).release()
            world.now += 1
        world.manager.get("a").pinned = True
        (await world.manager.lease("c")).release()
        assert world.open_engines == ["a", "c"]
        with pytest.raises(ModelBusy, match="needs"):
            await world.manager.lease("huge")
        world.manager.get("c").pinned = True
        with pytest.raises(ModelBusy, match="pinned"):
            await world.manager.lease("b")

    run(go)


def test_a_client_that_leaves_gives_its_place_up() -> None:
    async def go() -> None:
        world = World(max_waiting=1)
        world.manager.add("a", "ref")
        world.gate.clear()
        waiting = asyncio.ensure_future(world.manager.lease("a"))
        await settle()
        with pytest.raises(QueueFull):
            await world.manager.lease("a")
        waiting.cancel()
        await settle()
        again = asyncio.ensure_future(world.manager.lease("a"))
        world.gate.set()
        (await again).release()
        assert world.manager.get("a").in_use == 0

    run(go)


def test_keep_alive() -> None:
    async def go() -> None:
        world = World(keep_alive_s=60.0)
        world.manager.add("a", "ref")
        lease = await world.manager.lease("a")
        world.now = 1000.0
        world.manager.set_keep_alive("a", 60.0)
        await asyncio.sleep(0.12)
        assert world.open_engines == ["a"], "it is in use"
        lease.release()
        await asyncio.sleep(0.12)
        assert world.open_engines == ["a"], "it was used just now"
        world.now = 1100.0
        world.manager.set_keep_alive("a", 0.0)
        await asyncio.sleep(0.3)
        assert world.open_engines == []

    run(go)


def test_unloading_by_hand() -> None:
    async def go() -> None:
        world = World()
        world.manager.add("a", "ref")
        lease = await world.manager.lease("a")
        with pytest.raises(ModelBusy):
            await world.manager.unload("a")
        forced = asyncio.ensure_future(world.manager.unload("a", force=True))
        await settle()
        assert not forced.done()
        lease.release()
        await forced
        assert world.open_engines == []
        await world.manager.unload("a")

    run(go)


def test_replacing_an_engine() -> None:
    async def go() -> None:
        world = World()
        world.manager.add("a", "ref")
        old_lease = await world.manager.lease("a")
        new = Engine("new")
        world.engines.append(new)
        old = world.manager.replace("a", new)  # type: ignore[arg-type]
        new_lease = await world.manager.lease("a")
        assert new_lease.engine is new
        retiring = asyncio.ensure_future(world.manager.retire(old))
        await settle()
        assert not retiring.done()
        old_lease.release()
        await retiring
        assert world.open_engines == ["new"]
        new_lease.release()

    run(go)


def test_the_end_answers_waiters_and_closes_everything() -> None:
    async def go() -> None:
        world = World(max_models=1)
        for name in "ab":
            world.manager.add(name, name)
        lease = await world.manager.lease("a")
        waiting = asyncio.ensure_future(world.manager.lease("b"))
        await settle()
        assert await world.manager.drain(1)
        with pytest.raises(ShuttingDown):
            await waiting
        with pytest.raises(ShuttingDown):
            await world.manager.lease("a")
        lease.release()
        await settle()
        world.manager.close()
        assert all(engine.closed == 1 for engine in world.engines)

    run(go)


def test_names() -> None:
    world = World(find=lambda name: "key" if name == "stored" else None, others=lambda: [("a", "x"), ("z", "y")])
    world.manager.add("a", "ref")
    assert world.manager.get(None).name == "a"
    assert world.manager.get("A").name == "a"
    assert world.manager.get("stored").from_store
    assert world.manager.others() == [("z", "y")]
    with pytest.raises(ModelNotFound, match="served models: a, stored"):
        world.manager.get("nobody")


@pytest.mark.parametrize("seed", range(8))
def test_random_work_keeps_the_laws(seed: int) -> None:
    async def go() -> None:
        rng = random.Random(seed)
        world = World(max_models=2)
        names = "abcd"
        for name in names:
            world.manager.add(name, name)
        answered = 0

        async def client() -> None:
            nonlocal answered
            for _ in range(15):
                task = asyncio.ensure_future(world.manager.lease(rng.choice(names)))
                if rng.random() < 0.2:
                    await settle(rng.randrange(5))
                    task.cancel()
                try:
                    lease = await task
                except (asyncio.CancelledError, ModelLoadError):
                    continue
                engine: Any = lease.engine
                engine.leases += 1
                assert not engine.closed
                assert len({one.name for one in world.engines if not one.closed}) <= 3  # one may be closing
                await settle(rng.randrange(20))
                assert not engine.closed
                engine.leases -= 1
                lease.release()
                answered += 1
                if rng.random() < 0.1:
                    world.fails ^= {rng.choice(names)}

        await asyncio.gather(*(client() for _ in range(6)))
        assert answered > 20
        await world.manager.drain(1)
        await asyncio.sleep(0.05)
        world.manager.close()
        assert [engine.closed for engine in world.engines] == [1] * len(world.engines)

    run(go)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        (-3, -1),
        ("-1", -1),
        (0, 0),
        ("2d", 172800),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5 minutes", "m5", "1e400", "nan", "5x", True, float("nan"), 1e300])
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(InvalidRequest):
        parse_duration(text)
