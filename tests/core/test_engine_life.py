"""The engine's own life: cancelling, draining, closing, dying."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from core_support import greedy
from test_engine_requests import complete, finish_of, request

from mullama import abi
from mullama.config import ServeConfig
from mullama.engine.engine import Engine
from mullama.errors import EngineDead, ShuttingDown
from mullama.scheduling import EngineState, Plan, SeqView
from mullama.serving.manager import ModelManager
from mullama.types import FinishReason

LONG = greedy(3500)  # seconds of work: it does not end by itself while a test looks


class Broken:
    """Stands in for the host of the policy, which never raises unless the engine itself is wrong."""

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        self._first = first

    def arrived(self, seq: SeqView) -> None:
        pass

    def plan(self, state: EngineState) -> Plan:
        self._first()
        raise ZeroDivisionError("on purpose")

    def close(self) -> None:
        pass


def test_an_idle_engine_is_ready(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.call(lambda: None).result(10)
    assert engine.is_ready()
    engine.close()
    engine.close()
    assert not engine.is_ready()


def shows(engine: Engine, **gauges: int) -> bool:
    """Whether the page comes to show these; nothing is asked of the engine meanwhile, which would wake it."""
    end = time.monotonic() + 30
    while any(engine.counters()[name] != value for name, value in gauges.items()):
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def test_the_page_of_an_idle_engine_shows_that_it_is_idle(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=2)
    complete(engine, "HELLO", greedy(4))
    cells = 5 + 4 - 1  # the last token is not computed
    assert shows(engine, running=0, waiting=0, retained=1, cells_used=cells)
    assert [row.state for row in engine._parts.page.rows()].count(abi.RETAINED) == 1
    assert engine.kv.drop() == cells
    assert shows(engine, retained=0, cells_used=0)


def test_the_page_forgets_what_was_cancelled(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(ctx_size=4096, parallel=1)
    first, second = (engine.submit_sync(request(text, LONG)) for text in ("HELLO", "WORLD"))
    next(first)
    assert shows(engine, running=1, waiting=1)
    for generation in (second, first):
        generation.cancel()
        list(generation)
    assert shows(engine, running=0, waiting=0, retained=0, cells_used=0)


@pytest.mark.parametrize("moment", ["waiting", "running"])
def test_cancel_frees_the_slot(make_engine: Callable[..., Engine], moment: str) -> None:
    engine = make_engine(ctx_size=4096, parallel=1)
    first = engine.submit_sync(request("HELLO", LONG))
    next(first)
    second = engine.submit_sync(request("WORLD", LONG))
    target = second if moment == "waiting" else first
    target.cancel()
    list(target)
    assert finish_of(target).reason is FinishReason.CANCELLED
    target.cancel()
    other = first if moment == "waiting" else second
    next(other)
    other.cancel()
    list(other)
    snapshot = engine.kv.snapshot()
    assert snapshot["cells_used"] == 0 and snapshot["audit"] == []


def test_drain_waits_for_the_running(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()

    async def go() -> None:
        generations = [engine.submit(request("HELLO")) for _ in range(6)]
        assert await engine.drain(30)
        assert not engine.is_ready()
        for generation in generations:
            assert sum([delta.n_tokens async for delta in generation]) == 16
            assert finish_of(generation).reason is FinishReason.LENGTH
        with pytest.raises(ShuttingDown):
            engine.submit(request("HELLO"))

    asyncio.run(go())


def test_drain_cuts_what_takes_too_long(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(ctx_size=4096)

    async def go() -> None:
        generation = engine.submit(request("HELLO", LONG))
        await anext(generation)
        assert not await engine.drain(0)
        async for _ in generation:
            pass
        assert finish_of(generation).reason is FinishReason.CANCELLED

    asyncio.run(go())


def test_close_while_generating_ends_every_request(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(ctx_size=4096, parallel=2)
    generations = [engine.submit_sync(request("HELLO", LONG)) for _ in range(4)]  # two of them wait
    next(generations[0])
    engine.close()
    for generation in generations:
        list(generation)
        finish = finish_of(generation)
        assert finish.reason is FinishReason.ERROR and isinstance(finish.error, ShuttingDown)
    with pytest.raises(ShuttingDown):
        engine.submit_sync(request("HELLO"))
    with pytest.raises(EngineDead):
        engine.call(lambda: None)


def test_close_under_an_event_loop_that_reads(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(ctx_size=4096)

    async def go() -> None:
        generation = engine.submit(request("HELLO", LONG))
        await anext(generation)
        await asyncio.to_thread(engine.close)
        async for _ in generation:
            pass
        assert isinstance(finish_of(generation).error, ShuttingDown)

    asyncio.run(go())


def test_a_rearm_that_comes_late_does_not_hide_a_close(make_engine: Callable[..., Engine]) -> None:
    """The engine thread is about to rearm when close() aborts: it must stop all the same."""
    engine = make_engine()
    real = engine._core
    entered, aborted = threading.Event(), threading.Event()

    class LateCore:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def rearm(self) -> None:
            entered.set()
            aborted.wait(30)
            real.rearm()

        def abort(self) -> None:
            real.abort()
            aborted.set()

    engine._core = LateCore()  # type: ignore[assignment]
    generation = engine.submit_sync(request("HELLO", greedy(400)))
    assert entered.wait(30)
    closer = threading.Thread(target=engine.close, daemon=True)
    closer.start()
    closer.join(30)
    assert not closer.is_alive()
    list(generation)
    assert isinstance(finish_of(generation).error, ShuttingDown)


def test_a_dead_engine_tells_everybody(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    gate = threading.Event()
    engine.call(gate.wait)
    engine._policy = Broken()  # type: ignore[assignment]
    generations = [engine.submit_sync(request("HELLO")) for _ in range(3)]
    gate.set()
    for generation in generations:
        list(generation)
        finish = finish_of(generation)
        assert finish.reason is FinishReason.ERROR and isinstance(finish.error, EngineDead)
        assert "on purpose" not in str(finish.error), "it may quote anybody's request: it is for the log"
    assert engine.death == "ZeroDivisionError: on purpose"
    assert not engine.is_ready()
    with pytest.raises(EngineDead):
        engine.submit_sync(request("HELLO"))
    with pytest.raises(EngineDead):
        engine.call(lambda: None)
    engine.close()


def test_calls_that_were_queued_when_it_died_are_answered(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    asked: list[Future[None]] = []
    gate = threading.Event()
    engine.call(gate.wait)
    engine._policy = Broken(lambda: asked.append(engine.call(lambda: None)))  # type: ignore[assignment]
    generation = engine.submit_sync(request("HELLO"))
    gate.set()
    list(generation)
    with pytest.raises(EngineDead):
        asked[0].result(30)


def test_who_asked_may_go_away(make_engine: Callable[..., Engine]) -> None:
    """A cancelled question is not answered, and harms nobody."""
    engine = make_engine()

    async def go() -> None:
        gate = threading.Event()
        engine.call(gate.wait)
        question = asyncio.ensure_future(engine.kv.asnapshot())
        await asyncio.sleep(0)
        question.cancel()
        with pytest.raises(asyncio.CancelledError):
            await question
        gate.set()
        assert (await engine.kv.asnapshot())["audit"] == []

    asyncio.run(go())
    assert engine.is_ready()
    assert complete(engine, "HELLO")[1].reason is FinishReason.LENGTH


def test_an_error_of_a_call_is_its_callers(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(10)
    assert engine.is_ready()


def test_a_recurrent_model_reports_no_negative_cells(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path]
) -> None:
    engine = make_engine(tiny_model("mamba"))
    complete(engine, "HELLO")
    assert engine.kv.snapshot()["cells_free"] >= 0


@pytest.mark.parametrize("kind", ["loop", "thread"])
def test_nothing_is_left_after_close(tiny_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Descriptors here; threads are counted after every test."""
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    config = ServeConfig(ctx_size=512, parallel=2, threads=1, page_dir=str(tmp_path / "pages"))

    async def read(engine: Engine) -> None:
        async for _ in engine.submit(request("HELLO")):
            pass

    def round_trip() -> None:
        with Engine.load(tiny_model(), config=config) as engine:
            if kind == "loop":
                asyncio.run(read(engine))
            else:
                complete(engine, "HELLO")

    round_trip()  # what is opened once a process
    before = len(list(folder.iterdir()))
    for _ in range(5):
        round_trip()
    assert len(list(folder.iterdir())) == before
    assert list((tmp_path / "pages").iterdir()) == []


def test_whatever_stops_an_engine_is_reported_and_the_next_request_loads_it_anew(
    make_engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        engines: list[Engine] = []

        def load(name: str, reference: str, progress: Callable[[float], bool]) -> Engine:
            engines.append(make_engine())
            return engines[-1]

        models = ModelManager(load=load)
        models.add("m", "m")
        lease = await models.lease("m")
        generations = [lease.engine.submit(request("HELLO", LONG)) for _ in range(6)]  # some run, some wait
        await anext(aiter(generations[0]))

        def ends() -> None:
            raise SystemExit("on purpose")

        engines[0]._commands.post_quietly(ends)
        for generation in generations:
            async for _ in generation:
                pass
            error = finish_of(generation).error
            assert isinstance(error, EngineDead) and "on purpose" not in error.message, "that is for the log"
        assert engines[0].death == "SystemExit: on purpose"
        assert not models.ready and models.get("m").error == "the engine stopped: SystemExit: on purpose"
        lease.release()
        again = await models.lease("m")
        assert len(engines) == 2 and models.ready
        generation = again.engine.submit(request("HELLO"))
        assert sum([delta.n_tokens async for delta in generation]) == 16
        again.release()

    asyncio.run(go())
    assert "SystemExit: on purpose; the next request loads it anew" in caplog.text


def test_a_command_that_tells_the_engine_to_end_ends_nothing(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()

    def exits() -> None:
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="told to end by SystemExit"):
        engine.call(exits).result(10)
    assert engine.death is None and len(complete(engine, "HELLO")) > 0
