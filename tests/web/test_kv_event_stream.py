"""GET /internal/kv/events: what is sent, at whose pace, and when it ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from docs_support import ROOT, names

from mullama.config import ServeConfig
from mullama.kv.events import KvEvent, KvEventKind, KvEventLog, KvTier
from mullama.kv.index.namespaces import short_namespace
from mullama.kv.index.tree import pack
from mullama.web.internal import kv_event_routes
from mullama.web.internal.kv_event_routes import KvEventStream
from mullama.web.services import Services
from mullama.web.stream.event_stream import PING

from .conftest import Live
from .fake_engine import FakeEngine
from .test_live import Raw, connect, wait_until

PATH = "/internal/kv/events"
PAGE = ROOT / "docs" / "kv-inspect.md"

Start = Callable[..., Live]


def parse(body: bytes) -> list[tuple[int, str, dict[str, Any]]]:
    """(id, event, data) of every event; pings are left out."""
    assert body == b"" or body.endswith(b"\n\n")
    found = []
    for text in body.decode().split("\n\n")[:-1]:
        while text.startswith(":"):
            text = text.partition("\n")[2]
        number, kind, data = text.split("\n")
        fields = json.loads(data.removeprefix("data: "))
        assert number == f"id: {fields['seq']}"
        found.append((fields["seq"], kind.removeprefix("event: "), fields))
    return found


def add(log: KvEventLog, n: int = 1, tokens: int = 3) -> None:
    for _ in range(n):
        seq, packed = log.next_seq(), pack(range(tokens))
        log.append(KvEvent(seq, time.monotonic_ns(), KvEventKind.STORED, KvTier.HOST, 1, tokens, b"", packed))


@asynccontextmanager
async def following(
    log: KvEventLog, *, since: int = 0, with_tokens: bool = False, ping_seconds: float = 15.0
) -> AsyncIterator[tuple[KvEventStream, asyncio.Event]]:
    """A stream, and what makes its client leave."""
    left = asyncio.Event()
    before = asyncio.all_tasks()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    stream = KvEventStream(log, since=since, with_tokens=with_tokens, ping_seconds=ping_seconds, receive=receive)
    try:
        yield stream, left
    finally:
        await stream.close()
        await stream.close()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() <= before
        assert log._wakers == []


def run(main: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 30))


def test_an_event_in_full() -> None:
    log = KvEventLog()
    packed = pack([7, 8, 9, 10])
    before = time.time() * 1000
    event = KvEvent(
        1,
        time.monotonic_ns(),
        KvEventKind.EVICTED,
        KvTier.HOST,
        1,
        3,
        b"salt",
        packed,
        "req",
        KvTier.DISK,
        2,
        gone=True,
    )
    log.append(event)

    async def main() -> None:
        async with following(log) as (stream, _):
            ((seq, kind, fields),) = parse(await anext(stream))
        assert (seq, kind) == (1, "evicted")
        assert before - 1 <= fields.pop("unix_ms") <= time.time() * 1000 + 1
        namespace = short_namespace(b"salt")
        assert fields == {
            "seq": 1, "kind": "evicted", "tier": "host", "source": "disk", "start": 1, "end": 3, "request": "req",
            "slot": 2, "gone": True, "namespace": namespace,
        }  # fmt: skip
        assert namespace and "salt" not in namespace and b"salt".hex() not in namespace
        async with following(log, with_tokens=True) as (stream, _):
            assert parse(await anext(stream))[0][2]["tokens"] == [7, 8, 9]

    run(main)


def test_the_page_lists_the_fields() -> None:
    log = KvEventLog()
    add(log)

    async def main() -> list[str]:
        async with following(log, with_tokens=True) as (stream, _):
            return list(parse(await anext(stream))[0][2])

    assert names(PAGE, "GET /internal/kv/events") == run(main)


def test_it_begins_after_a_number() -> None:
    log = KvEventLog()
    add(log, 5)

    async def main() -> None:
        for since, expected in ((0, [1, 2, 3, 4, 5]), (3, [4, 5]), (6, [1, 2, 3, 4, 5]), (10**17, [1, 2, 3, 4, 5])):
            async with following(log, since=since) as (stream, _):
                assert [seq for seq, *_ in parse(await anext(stream))] == expected
        async with following(log, since=5, ping_seconds=0.01) as (stream, _):
            assert await anext(stream) == PING
            add(log)
            assert [seq for seq, *_ in parse(await anext(stream))] == [6]

    run(main)


def test_lost_events_are_counted() -> None:
    log = KvEventLog(limit=10)
    add(log, 25)

    async def main() -> None:
        async with following(log, since=4) as (stream, _):
            (seq, kind, fields), *rest = parse(await anext(stream))
            assert (seq, kind, fields) == (15, "lost", {"seq": 15, "lost": 11})
            assert [one for one, *_ in rest] == list(range(16, 26))
            add(log, 11)
            (seq, kind, fields), *rest = parse(await anext(stream))
            assert (kind, fields["lost"], len(rest)) == ("lost", 1, 10)

    run(main)


def test_pieces_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_event_routes, "MAX_PIECE", 2000)
    log = KvEventLog()
    add(log, 50, tokens=100)

    async def main() -> None:
        seen: list[int] = []
        async with following(log, with_tokens=True) as (stream, _):
            while len(seen) < 50:
                piece = await anext(stream)
                events = parse(piece)
                assert len(piece) < 2000 + len(piece) / len(events) + 10
                seen += [seq for seq, *_ in events]
        assert seen == list(range(1, 51))

    run(main)


def test_the_engine_thread_rings_once_for_many_events() -> None:
    log = KvEventLog()

    async def main() -> None:
        async with following(log) as (stream, _):
            rings = 0
            call = stream._bell._loop.call_soon_threadsafe

            def counted(*args: Any) -> Any:
                nonlocal rings
                rings += 1
                return call(*args)

            stream._bell._loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
            add(log, 200)
            assert rings == 1
            assert len(parse(await anext(stream))) == 200
            await asyncio.sleep(0)  # the ring that came for them
            add(log)
            assert rings == 2

    run(main)


def test_nothing_is_lost_between_threads() -> None:
    log = KvEventLog(limit=100_000)

    async def main() -> list[int]:
        seen: list[int] = []
        async with following(log) as (stream, _):
            writer = threading.Thread(target=add, args=(log, 5000))
            writer.start()
            while len(seen) < 5000:
                seen += [seq for seq, *_ in parse(await anext(stream))]
            writer.join()
        return seen

    assert run(main) == list(range(1, 5001))


def test_it_ends_when_the_client_leaves_and_when_it_is_told_to() -> None:
    log = KvEventLog()

    async def rest(stream: KvEventStream) -> bytes:
        return b"".join([piece async for piece in stream])

    async def main() -> None:
        async with following(log) as (stream, left):
            reader = asyncio.create_task(rest(stream))
            await asyncio.sleep(0.01)
            left.set()
            assert await reader == b""
        async with following(log) as (stream, _):
            reader = asyncio.create_task(rest(stream))
            await asyncio.sleep(0.01)
            stream.end()
            assert await reader == b""
            assert [piece async for piece in stream] == []

    run(main)


def test_an_event_after_the_loop_is_closed_is_nobody_s_trouble() -> None:
    log = KvEventLog()

    async def main() -> KvEventStream:
        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        return KvEventStream(log, since=0, with_tokens=False, ping_seconds=1, receive=receive)

    stream = asyncio.run(main())
    add(log)
    assert not stream._bell._rang.is_set()


def test_responses_that_come_during_the_shutdown_end_at_once() -> None:
    class Endless:
        ended = 0

        def end(self) -> None:
            self.ended += 1

    services = Services(ServeConfig(), models=None)  # type: ignore[arg-type]
    before, after = Endless(), Endless()
    services.end_at_shutdown(before)
    assert before.ended == 0
    services.end_responses()
    services.end_at_shutdown(after)
    assert (before.ended, after.ended) == (1, 1)
    services.close()


# -- over a socket -------------------------------------------------------------------------------------------


@contextmanager
def open_stream(live: Live, query: str = "", headers: str = "") -> Iterator[Raw]:
    with connect(live) as raw:
        raw.send(f"{PATH}{query}", b"", method="GET", headers=headers)
        status, found = raw.head()
        assert (status, found["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert found["cache-control"] == "no-cache"
        yield raw


def test_events_arrive_as_they_happen(live: Start, engine: FakeEngine) -> None:
    engine.store([1, 2])
    running = live()
    with open_stream(running) as raw, open_stream(running, "?since=0&tokens=1") as whole:
        assert [fields["tokens"] for *_, fields in parse(whole.chunk())] == [[1, 2]]
        engine.store([3, 4, 5], request="req-7")
        ((seq, kind, fields),) = parse(raw.chunk())
        assert (seq, kind, fields["end"], fields["request"]) == (2, "stored", 3, "req-7")
        assert "tokens" not in fields
        assert [fields["tokens"] for *_, fields in parse(whole.chunk())] == [[3, 4, 5]]


def test_a_reader_comes_back_with_the_last_number(live: Start, engine: FakeEngine) -> None:
    for _ in range(3):
        engine.store([1])
    running = live()
    with open_stream(running, headers="Last-Event-ID: 1\r\n") as raw:
        assert [seq for seq, *_ in parse(raw.chunk())] == [2, 3]
    with open_stream(running, "?since=2", headers="Last-Event-ID: 1\r\n") as raw:
        assert [seq for seq, *_ in parse(raw.chunk())] == [3]


def test_silence_is_filled(live: Start) -> None:
    with open_stream(live(ping_seconds=0.02)) as raw:
        assert [raw.chunk(), raw.chunk()] == [PING, PING]


def test_a_client_that_leaves_is_followed_no_more(live: Start, engine: FakeEngine) -> None:
    running = live()
    with open_stream(running):
        wait_until(lambda: len(engine.kv.events._wakers) == 1)
    wait_until(lambda: not engine.kv.events._wakers and not running.server.server_state.tasks)


def test_a_shutdown_ends_the_stream_in_order(live: Start, engine: FakeEngine) -> None:
    running = live()
    with open_stream(running) as raw:
        running.server.should_exit = True
        assert raw.chunk() == b""  # the end of the body, not of the connection
    running.thread.join(10)
    assert not running.thread.is_alive()
    assert engine.kv.events._wakers == []


def test_a_stream_goes_on_with_the_engine_that_comes() -> None:
    first, second = KvEventLog(), KvEventLog()
    add(first, 3)

    async def main() -> None:
        async with following(first, ping_seconds=0.01) as (stream, _):
            add(first)
            stream.follow(None)  # what was not told yet is of no use any more
            assert [(seq, kind) for seq, kind, _ in parse(await anext(stream))] == [(0, "reset")]
            assert first._wakers == []
            assert await anext(stream) == PING
            add(second, 2)
            stream.follow(second)
            assert [seq for seq, *_ in parse(await anext(stream))] == [0, 1, 2]
            add(second)
            assert [seq for seq, *_ in parse(await anext(stream))] == [3]
        assert second._wakers == []

    run(main)


def test_a_stream_outlives_its_engine(live: Start, engine: FakeEngine) -> None:
    running = live()
    services = running.server._services
    models, loop = services.models, running.server.servers[0].get_loop()
    other = FakeEngine("fake")
    models.loads.load = lambda name, reference, progress: other
    other.store([1, 2, 3])

    def play(coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    with open_stream(running) as raw:
        wait_until(lambda: len(engine.kv.events._wakers) == 1)
        play(models.unload("fake"))
        assert [kind for _, kind, _ in parse(raw.chunk())] == ["reset"]
        play(models.load("fake"))
        assert [(seq, kind) for seq, kind, _ in parse(raw.chunk())] == [(0, "reset"), (1, "stored")]
        assert len(models.watchers) == 1
    wait_until(lambda: not models.watchers and not other.kv.events._wakers)


def test_running_requests_are_seen_to_their_end(live: Start, engine: FakeEngine) -> None:
    """The stream ends after the drain, not before."""
    engine.reply, engine.delay = ["x"] * 20, 0.01
    running = live()
    with open_stream(running) as raw, connect(running) as other:
        other.send("/v1/completions", {"prompt": "x"})
        wait_until(lambda: bool(engine.running))
        running.server.should_exit = True
        wait_until(lambda: engine.draining)
        engine.store([1, 2])
        assert parse(raw.chunk())[0][1] == "stored"
        assert other.response()[0] == 200
        assert raw.chunk() == b""
