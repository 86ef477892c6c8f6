"""A real uvicorn on a loopback port: the official client, raw sockets, disconnects."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from mullama.config import ServeConfig
from mullama.errors import ComputeFailed, QueueFull

from .conftest import Live, parse_events
from .fake_engine import FakeEngine

Start = Callable[..., Live]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def sdk(live: Live, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options)


def wait_until(condition: Callable[[], bool], seconds: float = 2.0) -> float:
    """Seconds until the condition held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.001)
    return time.monotonic() - start


class Raw:
    """One connection, written and read by hand."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.file = self.sock.makefile("rb")

    def send(self, path: str, body: object = None, *, method: str = "POST", headers: str = "") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
        self.sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def head(self) -> tuple[int, dict[str, str]]:
        status = int(self.file.readline().split()[1])
        headers = {}
        while line := self.file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    def chunk(self) -> bytes:
        size = int(self.file.readline(), 16)
        data = self.file.read(size)
        self.file.readline()
        return data

    def response(self) -> tuple[int, Any]:
        """The status, and the JSON of the body or the events of the stream."""
        status, headers = self.head()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while chunk := self.chunk():
                body += chunk
            return status, parse_events(body)
        return status, json.loads(self.file.read(int(headers["content-length"])))

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@contextmanager
def connect(live: Live) -> Iterator[Raw]:
    raw = Raw(live.port)
    try:
        yield raw
    finally:
        raw.close()


def test_the_openai_client(live: Start) -> None:
    with sdk(live()) as client:
        reply = client.chat.completions.create(model="fake", messages=MESSAGES)
        assert reply.choices[0].message.content == "Hello wörld!"
        assert reply.usage is not None and reply.usage.completion_tokens == 4
        assert client.completions.create(model="fake", prompt=["a", "b"], n=2).choices[3].index == 3
        assert [model.id for model in client.models.list()] == ["fake"]
        assert client.models.retrieve("fake").created == 1_700_000_000


def test_the_openai_client_streams(live: Start) -> None:
    with sdk(live()) as client:
        stream = client.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "Hello wörld!"
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
        texts = client.completions.create(model="fake", prompt="x", stream=True)
        assert "".join(chunk.choices[0].text for chunk in texts) == "Hello wörld!"


def test_the_openai_client_s_errors(live: Start, engine: FakeEngine) -> None:
    with sdk(live()) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="fake", messages=MESSAGES, temperature=3)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nope", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        engine.submit_errors = [QueueFull("full", retry_after=1)]
        with pytest.raises(openai.InternalServerError) as full:
            client.chat.completions.create(model="fake", messages=MESSAGES)
        assert full.value.response.headers["retry-after"] == "1"
        engine.fail_after, engine.failure = 1, ComputeFailed("not finite")
        with pytest.raises(openai.APIError, match="not finite"):
            list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True))


def test_the_openai_client_s_key(live: Start, config: ServeConfig) -> None:
    config.api_key = ["k"]
    running = live()
    with sdk(running) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with sdk(running, api_key="k") as client:
        assert len(list(client.models.list())) == 1


def test_many_async_clients_at_once(live: Start, engine: FakeEngine) -> None:
    engine.delay = 0.002
    running = live()

    async def main() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)

        async def one(i: int) -> str:
            if i % 2:
                reply = await client.chat.completions.create(model="fake", messages=MESSAGES)
                return reply.choices[0].message.content or ""
            stream = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        replies = await asyncio.gather(*map(one, range(20)))
        await client.close()
        return replies

    assert asyncio.run(main()) == ["Hello wörld!"] * 20


def test_the_openai_client_closing_a_stream_cancels(live: Start, engine: FakeEngine) -> None:
    engine.reply, engine.delay = ["x"] * 1000, 0.005
    with sdk(live()) as client:
        stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: not engine.running)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_before_the_first_token_cancels_at_once(
    live: Start, engine: FakeEngine, stream: bool, n: int
) -> None:
    engine.hang = True
    running = live()
    raw = Raw(running.port)
    raw.send(CHAT, {"messages": MESSAGES, "stream": stream, "n": n})
    wait_until(lambda: len(engine.running) == n)
    raw.close()
    assert wait_until(lambda: all(g.cancelled_at for g in engine.generations)) < 0.5
    wait_until(lambda: not running.server.server_state.tasks)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_on_the_way_cancels(live: Start, engine: FakeEngine, stream: bool, n: int) -> None:
    engine.reply, engine.delay = ["x"] * 1000, 0.005
    running = live()
    raw = Raw(running.port)
    raw.send(CHAT, {"messages": MESSAGES, "stream": stream, "n": n})
    if stream:
        raw.head()
        raw.chunk()
    wait_until(lambda: len(engine.running) == n)
    raw.close()
    assert wait_until(lambda: all(g.cancelled_at for g in engine.generations)) < 0.5
    wait_until(lambda: not running.server.server_state.tasks and not engine.running)


def test_a_client_that_does_not_read_holds_up_nobody(live: Start, engine: FakeEngine) -> None:
    engine.reply = ["x" * 10_000] * 300  # 3 MB: more than the socket's buffers hold
    engine.delay = 0.0002
    running = live()
    with connect(running) as slow, connect(running) as other:
        slow.send(CHAT, {"messages": MESSAGES, "stream": True})
        wait_until(lambda: bool(engine.generations) and not engine.running, 5)
        engine.reply = ["ok"]
        other.send(CHAT, {"messages": MESSAGES})
        assert other.response()[0] == 200
        status, events = slow.response()
        assert status == 200
        assert sum(len(event["choices"][0]["delta"].get("content", "")) for event in events[:-1]) == 3_000_000


def test_tokens_arrive_one_by_one(live: Start, engine: FakeEngine) -> None:
    engine.reply, engine.delay = ["a", "b", "c"], 0.1
    with connect(live()) as raw:
        raw.send(CHAT, {"messages": MESSAGES, "stream": True})
        status, headers = raw.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        first = raw.chunk()
        assert b'"role":"assistant"' in first and b'"content":"a"' in first
        start = time.monotonic()
        assert b'"content":"b"' in raw.chunk()
        assert time.monotonic() - start > 0.05


def test_pings_go_out_on_silence(live: Start, engine: FakeEngine) -> None:
    engine.first_delay = 0.1
    with connect(live(ping_seconds=0.03)) as raw:
        raw.send(CHAT, {"messages": MESSAGES, "stream": True})
        raw.head()
        assert raw.chunk() == b": ping\n"


def test_a_connection_serves_many_requests(live: Start) -> None:
    with connect(live()) as raw:
        for _ in range(3):
            raw.send(CHAT, {"messages": MESSAGES})
            assert raw.response()[0] == 200
            raw.send(CHAT, {"messages": MESSAGES, "stream": True})
            assert raw.response()[1][-1] == "[DONE]"
            raw.send(CHAT, b"{")
            assert raw.response()[0] == 400


def test_chunked_bodies(live: Start, config: ServeConfig) -> None:
    body = json.dumps({"messages": MESSAGES}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    running = live()
    with connect(running) as raw:
        parts = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))
        raw.sock.sendall(head + parts + b"0\r\n\r\n")
        assert raw.response()[0] == 200
    with connect(running) as raw:
        raw.sock.sendall(head)
        piece = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16))
        for _ in range((config.max_body_bytes >> 16) + 1):
            raw.sock.sendall(piece)
        status, reply = raw.response()
        assert (status, reply["error"]["code"]) == (413, "request_too_large")


def test_ten_megabytes_are_413_and_the_connection_goes_on(live: Start) -> None:
    with connect(live()) as raw:
        raw.send(CHAT, b'{"messages": "' + b"x" * 10_000_000 + b'"}')
        status, reply = raw.response()
        assert (status, reply["error"]["code"]) == (413, "request_too_large")
        raw.send(CHAT, {"messages": MESSAGES})
        assert raw.response()[0] == 200


def test_garbage_leaves_the_server_serving(live: Start) -> None:
    running = live()
    for garbage in (b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
        with connect(running) as raw:
            raw.sock.sendall(garbage)
            assert raw.head()[0] in (400, 403, 404)
    with connect(running) as raw:
        raw.sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nab".encode())
    with connect(running) as raw:
        raw.send(CHAT, {"messages": MESSAGES})
        assert raw.response()[0] == 200


def test_the_overhead_of_a_request_is_small(live: Start) -> None:
    """Not a benchmark: a guard against milliseconds creeping in. The median of a keep-alive connection."""
    times = []
    with connect(live()) as raw:
        for _ in range(50):
            start = time.perf_counter()
            raw.send(CHAT, {"messages": MESSAGES, "stream": True, "max_tokens": 1})
            raw.head()
            raw.chunk()
            times.append(time.perf_counter() - start)
            while raw.chunk():
                pass
    assert sorted(times)[25] < 0.010
