"""The direct path of streamed text, over real sockets: the same bytes as through ASGI, in order, to whoever reads."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from mullama.errors import ComputeFailed
from mullama.types import Finish, FinishReason, Profile
from mullama.web.openai.chunks import ChunkFormat
from mullama.web.openai.schemas import options_of, parse_chat
from mullama.web.services import Services
from mullama.web.stream.direct import DirectBody
from mullama.web.stream.event_stream import PING, EventStream
from mullama.web.stream.generations import Group, Merged

from .conftest import Live, parse_events
from .fake_engine import FakeEngine
from .test_live import CHAT, MESSAGES, connect, wait_until

Start = Callable[..., Live]
STREAM: dict[str, Any] = {"messages": MESSAGES, "stream": True}
CHANGING = re.compile(
    rb'(chatcmpl|cmpl)-[0-9a-f]+|"created":\d+|date: [^\r]+|(?:x-request-id|openai-processing-ms): [^\r]+'
)


def raw_response(live: Live, path: str, body: object, *, version: str = "1.1", headers: str = "") -> bytes:
    """Everything the server sends on one connection, less what differs from one request to the next."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
    with connect(live) as raw:
        raw.sock.sendall(head.encode() + data)
        return CHANGING.sub(b"*", raw.file.read())


@pytest.fixture
def body_messages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The ASGI messages with a piece of a body that uvicorn was given."""
    seen: list[dict[str, Any]] = []
    send = RequestResponseCycle.send

    async def spy(self: RequestResponseCycle, message: Any) -> None:
        if message["type"] == "http.response.body":
            seen.append(message)
        await send(self, message)

    monkeypatch.setattr(RequestResponseCycle, "send", spy)
    return seen


CALLS = [
    (CHAT, {"messages": MESSAGES}, ""),
    (CHAT, {"messages": MESSAGES, "stream_options": {"include_usage": True}}, "X-Profile: true\r\n"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 2}, "X-Profile: true\r\n"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1}, ""),
    ("/v1/completions", {"prompt": "x"}, ""),
    ("/v1/completions", {"prompt": "x", "echo": True}, ""),
]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize(("path", "body", "headers"), CALLS)
def test_the_bytes_are_those_of_the_ordinary_path(
    live: Start, engine: FakeEngine, path: str, body: dict[str, Any], headers: str, version: str
) -> None:
    engine.reply, engine.delay = ["Hel", "", 'l"o\n', "wörld\u2028", "日本" * 200, "!"], 0.02
    engine.total_ms = 12.5
    headers += "Connection: close\r\n" if version == "1.1" else ""
    call = (path, body | {"stream": True})
    direct = raw_response(live(), *call, version=version, headers=headers)
    ordinary = raw_response(live(direct=False), *call, version=version, headers=headers)
    assert b"data: [DONE]" in direct and b"connection: close" in direct
    assert direct == ordinary


def test_an_error_on_the_way_has_the_same_bytes(live: Start, engine: FakeEngine) -> None:
    engine.delay, engine.fail_after, engine.failure = 0.01, 2, ComputeFailed("not finite")
    direct, ordinary = (raw_response(live(direct=way), CHAT, STREAM, headers="Connection: close\r\n") for way in (1, 0))
    assert b'"content":"lo"' in direct and b"not finite" in direct and b"[DONE]" not in direct
    assert direct == ordinary


def test_text_that_is_no_unicode_is_an_error_event(live: Start, engine: FakeEngine) -> None:
    engine.reply, engine.delay = ["ab", "\ud800", "c"], 0.01
    with connect(live()) as raw:
        raw.send(CHAT, STREAM)
        assert raw.response()[1][-1]["error"]["type"] == "server_error"


def test_a_flowing_stream_passes_asgi_by(live: Start, engine: FakeEngine, body_messages: list[dict[str, Any]]) -> None:
    engine.reply, engine.delay = ["x"] * 50, 0.002
    num_messages = []
    for direct in (True, False):
        body_messages.clear()
        with connect(live(direct=direct)) as raw:
            raw.send(CHAT, STREAM)
            _, events = raw.response()
        assert sum(len(event["choices"][0]["delta"].get("content", "")) for event in events[:-1]) == 50
        assert len(events) > 40, "nearly each text was a chunk of its own"
        num_messages.append(len(body_messages))
    assert num_messages[0] <= 5
    assert num_messages[1] > 40


@pytest.mark.parametrize("n", [2, 3])
def test_several_choices(live: Start, engine: FakeEngine, body_messages: list[dict[str, Any]], n: int) -> None:
    engine.reply, engine.delay = [f"{i} " for i in range(40)], 0.002
    with connect(live()) as raw:
        raw.send(CHAT, STREAM | {"n": n, "stream_options": {"include_usage": True}})
        *chunks, last, done = raw.response()[1]
    texts, roles = [""] * n, [0] * n
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles[choice["index"]] += "role" in choice["delta"]
    assert texts == ["".join(engine.reply)] * n
    assert roles == [1] * n
    assert (last["usage"]["completion_tokens"], done) == (40 * n, "[DONE]")
    assert len(body_messages) < 20


def test_a_slow_reader_gets_everything_in_order_from_a_bounded_buffer(live: Start, engine: FakeEngine) -> None:
    engine.reply = [f"{i:07d} " * 500 for i in range(1000)]  # 4 MB: more than the socket's buffers hold
    engine.delay = 0.0002
    running = live()
    with connect(running) as raw:
        raw.send(CHAT, STREAM)
        wait_until(lambda: bool(engine.generations) and not engine.running, 5)
        (connection,) = running.server.server_state.connections
        assert connection.transport.get_write_buffer_size() < 100_000  # type: ignore[union-attr]
        events = raw.response()[1]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == "".join(engine.reply)
    assert len(events) < 1000, "what piled up was merged"


@pytest.mark.parametrize("n", [1, 2])
def test_silence_between_texts_is_filled(live: Start, engine: FakeEngine, n: int) -> None:
    engine.reply, engine.delay = ["a", "b", "c"], 0.1
    with connect(live(ping_seconds=0.04)) as raw:
        raw.send(CHAT, STREAM | {"n": n})
        raw.head()
        chunks = []
        while chunk := raw.chunk():
            chunks.append(chunk)
    assert 4 <= chunks.count(PING) <= 8
    events = parse_events(b"".join(chunks))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]).count("b") == n


def test_direct_texts_break_the_silence(live: Start, engine: FakeEngine) -> None:
    engine.reply, engine.delay = ["x"] * 60, 0.005
    with connect(live(ping_seconds=0.1)) as raw:
        raw.send(CHAT, STREAM)
        raw.head()
        while chunk := raw.chunk():
            assert chunk != PING


def test_pipelined_streams_are_answered_one_after_the_other(live: Start, engine: FakeEngine) -> None:
    engine.delay = 0.005
    with connect(live()) as raw:
        for _ in range(3):
            raw.send(CHAT, STREAM)
        raw.send(CHAT, {"messages": MESSAGES})
        for _ in range(3):
            status, events = raw.response()
            assert (status, events[-1]) == (200, "[DONE]")
            assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "Hello wörld!"
        assert raw.response()[1]["choices"][0]["message"]["content"] == "Hello wörld!"


def test_a_cut_stream_ends_with_an_error_and_the_connection(live: Start, engine: FakeEngine, config: Any) -> None:
    config.drain_timeout = 0.05
    engine.reply, engine.delay = ["x"] * 10_000, 0.002
    running = live()
    with connect(running) as raw:
        raw.send(CHAT, STREAM)
        raw.head()
        raw.chunk()
        running.server.should_exit = True
        chunks = [b""]
        while chunk := raw.chunk():
            chunks.append(chunk)
        assert b'"error"' in chunks[-1]
        assert raw.file.read() == b""


# -- the law, without a socket


class Door(DirectBody):
    """A direct way that is open or shut."""

    def __init__(self) -> None:
        self.is_open = True
        self.sent: list[bytes] = []

    def writer(self, head: bytes, tail: bytes) -> Callable[[bytes], bool]:
        def send(middle: bytes) -> bool:
            if self.is_open:
                self.sent.append(head + middle + tail)
            return self.is_open

        return send


async def group_of(services: Services, engine: FakeEngine, n: int) -> Group:
    engine.hang = True
    call = parse_chat(json.dumps(STREAM | {"n": n}).encode(), models=services.models)
    lease = services.models.try_lease("fake")
    assert lease is not None
    assert lease.engine is engine
    group = Group(
        services,
        lease,
        request_id="r",
        model="fake",
        endpoint="e",
        prompts=[[1]],
        options=options_of(call.body, engine.info),
        arrival_ns=0,
    )
    await group.submit()
    return group


@pytest.mark.parametrize("ticks", range(6))
@pytest.mark.parametrize("n", [1, 2])
def test_nothing_overtakes_a_declined_text(services: Services, engine: FakeEngine, n: int, ticks: int) -> None:
    """However far a declined text has come on its way, the next one queues behind it."""

    async def go() -> bytes:
        group, door = await group_of(services, engine, n), Door()
        chunks = ChunkFormat(group, created=0, is_chat=True, include_usage=False)
        stream = EventStream(group, chunks, ping_seconds=9.0, body=door)
        out = door.sent
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        first = engine.generations[0]
        first.deliver("1", 1)
        assert len(out) == 1, "the stream waits, so the text goes out at once"
        door.is_open = False
        first.deliver("2", 1)
        for _ in range(ticks):
            await asyncio.sleep(0)
        door.is_open = True
        first.deliver("3", 1)
        out.append(await waiting)
        first.deliver("4", 1)  # nobody waits: it is queued
        assert len(out) == 2
        first.end(Finish(FinishReason.STOP, Profile()))
        for generation in engine.generations[1:]:
            generation.end(Finish(FinishReason.STOP, Profile()))
        async for data in stream:
            out.append(data)
        await stream.close()
        return b"".join(out)

    events = parse_events(asyncio.run(go()))
    deltas = [event["choices"][0]["delta"] for event in events[:-1] if event["choices"][0]["index"] == 0]
    assert "".join(delta.get("content", "") for delta in deltas) == "1234"
    assert sum("role" in delta for delta in deltas) == 1
    assert events[-1] == "[DONE]"


def test_a_closed_stream_takes_no_more(services: Services, engine: FakeEngine) -> None:
    async def go() -> None:
        group, door = await group_of(services, engine, 2), Door()
        chunks = ChunkFormat(group, created=0, is_chat=True, include_usage=False)
        stream = EventStream(group, chunks, ping_seconds=9.0, body=door)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        await stream.close()
        engine.generations[0].deliver("late", 1)
        assert door.sent == []
        assert engine.generations[0].sink is None
        await asyncio.sleep(0.01)

    asyncio.run(go())


def test_merged_says_what_is_queued() -> None:
    async def go() -> None:
        merged = Merged([])
        merged._put((0, None))
        assert merged.queued == [(0, None)]
        assert await merged.next() == [(0, None)]
        assert merged.queued == []
        merged.close()

    asyncio.run(go())
