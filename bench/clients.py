"""Load generation over HTTP that is light enough to share two cores with the server it measures.

While requests run, the client only stores packets with their arrival times (one callback a packet, no parsing, no
JSON); everything is parsed after the last byte arrived. It speaks as much HTTP/1.1 as both servers need: keep-alive,
chunked or counted bodies, no redirects, no compression.

Tokens are counted by the server's ``usage``; latencies are those of SSE chunks that carry text (a chunk may hold more
than one token when the reader was late, and a token may hold half a character and no chunk).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

from bench.answers import Outcome, Packet, RawCall, headers_of, parse
from bench.common import distribution
from bench.servers import HOST, LLAMA_SERVER

T = TypeVar("T")

GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0}


# --- requests ---------------------------------------------------------------------------------


def completion_request(
    kind: str,
    prompt: str | Sequence[int],
    max_tokens: int,
    *,
    sampling: dict[str, Any] | None = None,
    stream: bool = True,
    profile: bool = False,
    ignore_eos: bool = True,
    **extra: Any,
) -> bytes:
    """A whole POST /v1/completions, ready to send. ``kind`` adds what only that server understands.

    llama-server would reuse a slot's prompt where texts happen to start alike; ``cache_prompt: false`` makes it
    compute every prompt token, as unique prompts make mullama do.
    """
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": ignore_eos}
    body |= GREEDY if sampling is None else sampling
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind == LLAMA_SERVER:
        body["cache_prompt"] = False
    return http_post("/v1/completions", body | extra, {"X-Profile": "true"} if profile else {})


def http_post(path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> bytes:
    payload = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {HOST}",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload


# --- one connection ---------------------------------------------------------------------------


class _Wire(asyncio.Protocol):
    """Stores packets and notices the end of the answer; nothing else happens while others are measured."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.packets: list[Packet] = []
        self.closed = False
        self.complete = False  # the whole answer came
        self._done: asyncio.Future[None] | None = None
        self._head = b""  # until the blank line was seen
        self._left: int | None = None  # bytes of a counted body still to come
        self._chunked = False
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def expect(self) -> asyncio.Future[None]:
        self.packets, self._head, self._left, self._chunked, self._tail = [], b"", None, False, b""
        self.complete = False
        self._done = asyncio.get_running_loop().create_future()
        return self._done

    def data_received(self, data: bytes) -> None:
        self.packets.append((time.monotonic_ns(), data))
        if self._chunked:
            # Only the closing chunk ends like this: SSE events end "\n\n", JSON bodies "}".
            self._tail = (self._tail + data)[-5:]
            if self._tail == b"0\r\n\r\n":
                self._finish()
        elif self._left is not None:
            self._left -= len(data)
            if self._left <= 0:
                self._finish()
        else:
            self._head += data
            self._read_head()

    def _read_head(self) -> None:
        head, blank, rest = self._head.partition(b"\r\n\r\n")
        if not blank:
            return
        headers = headers_of(head)
        if "chunked" in headers.get("transfer-encoding", ""):
            self._chunked = True
            self._tail = rest[-5:]
            if self._tail == b"0\r\n\r\n":
                self._finish()
        elif "content-length" in headers:
            self._left = int(headers["content-length"]) - len(rest)
            if self._left <= 0:
                self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        until_close = bool(self.packets) and not self._chunked and self._left is None
        self._finish(complete=until_close)

    def _finish(self, *, complete: bool = True) -> None:
        if self._done is not None and not self._done.done():
            self.complete = complete
            self._done.set_result(None)


class Connection:
    """A keep-alive connection that carries one request at a time and reconnects when the server closed it."""

    def __init__(self, port: int, host: str = HOST) -> None:
        self._host, self._port = host, port
        self._wire: _Wire | None = None

    async def _connected(self) -> _Wire:
        if self._wire is None or self._wire.closed:
            loop = asyncio.get_running_loop()
            _, self._wire = await loop.create_connection(_Wire, self._host, self._port)
        return self._wire

    async def call(self, request: bytes, *, limit_s: float = 300.0, into: RawCall | None = None) -> RawCall:
        """Send a request and wait for the end of the answer. Never raises for the server's faults.

        ``into`` receives the packets while they arrive, for callers that cancel this call.
        """
        call = RawCall(0) if into is None else into
        reused = self._wire is not None and not self._wire.closed
        try:
            wire = await self._connected()
        except OSError as error:
            call.started_ns = call.ended_ns = time.monotonic_ns()
            call.error = f"cannot connect: {error}"
            return call
        done = wire.expect()
        call.packets = wire.packets
        assert wire.transport is not None
        call.started_ns = time.monotonic_ns()
        wire.transport.write(request)
        try:
            async with asyncio.timeout(limit_s):
                await done
            if not wire.complete and reused and not wire.packets:
                # llama-server closes its connections after a streamed answer, and the request crossed with that.
                # As HTTP clients do: send it again on a fresh one (the clock starts again, in the server's favour).
                self._wire = None
                return await self.call(request, limit_s=limit_s, into=call)
            if not wire.complete:
                call.error = "the connection was closed before the end of the answer"
        except TimeoutError:
            call.error = f"no end of the answer within {limit_s:g} s"
            self.close()
        except asyncio.CancelledError:
            self.close()  # the server sees the disconnect and stops working for us
            raise
        finally:
            call.ended_ns = call.packets[-1][0] if call.packets else time.monotonic_ns()
        return call

    def close(self) -> None:
        if self._wire is not None and self._wire.transport is not None:
            self._wire.transport.abort()
        self._wire = None


# --- loads ------------------------------------------------------------------------------------


async def closed_loop(port: int, clients: Sequence[Sequence[bytes]], *, host: str = HOST) -> list[Outcome]:
    """Each client sends its requests one after the other on its own connection."""

    async def one(requests: Sequence[bytes]) -> list[RawCall]:
        connection = Connection(port, host)
        try:
            return [await connection.call(request) for request in requests]
        finally:
            connection.close()

    calls = await asyncio.gather(*(one(requests) for requests in clients))
    return [parse(call) for per_client in calls for call in per_client]


def poisson_arrivals(n: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which ``n`` requests of a Poisson process with ``rate`` a second arrive."""
    rng = random.Random(seed)
    times, now = [], 0.0
    for _ in range(n):
        now += rng.expovariate(rate)
        times.append(now)
    return times


async def open_loop(
    port: int, requests: Sequence[bytes], arrivals: Sequence[float], *, host: str = HOST
) -> list[Outcome]:
    """Send each request at its time, however many are still running: the load does not wait for the server."""
    idle: list[Connection] = []
    begin = time.monotonic()

    async def one(request: bytes, at: float) -> RawCall:
        await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
        connection = idle.pop() if idle else Connection(port, host)
        call = await connection.call(request)
        idle.append(connection)
        return call

    calls = await asyncio.gather(*(one(request, at) for request, at in zip(requests, arrivals, strict=True)))
    for connection in idle:
        connection.close()
    return [parse(call) for call in calls]


@contextlib.asynccontextmanager
async def background_streams(
    port: int, n: int, make_request: Callable[[int], bytes], *, host: str = HOST
) -> AsyncIterator[list[RawCall]]:
    """Keep ``n`` streams running while the block runs, then cut them. Yields the calls, still growing.

    ``make_request(i)`` makes the i-th request; a stream that ends is followed by the next.
    """
    calls: list[RawCall] = []

    async def one(connection: Connection) -> None:
        while True:
            call = RawCall(0)
            calls.append(call)
            await connection.call(make_request(len(calls) - 1), into=call)
            if call.error is not None:  # a server that refuses at once must not become a busy loop
                await asyncio.sleep(0.1)

    connections = [Connection(port, host) for _ in range(n)]
    tasks = [asyncio.create_task(one(connection)) for connection in connections]
    try:
        yield calls
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in connections:
            connection.close()


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


# --- figures ----------------------------------------------------------------------------------


def load_figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Throughput, TTFT and ITL of a load. Failed requests are counted and otherwise left out.

    ``tok_s`` is completion tokens over the time from the first request's start to the last answer's end.
    """
    good = [out for out in outcomes if out.error is None]
    failed = [out for out in outcomes if out.error is not None]
    figures: dict[str, Any] = {"requests": len(outcomes), "errors": len(failed)}
    if failed:
        figures["first_error"] = failed[0].error
    if not good:
        return figures
    tokens = sum(out.completion_tokens for out in good)
    wall = (max(out.ended_ns for out in good) - min(out.started_ns for out in good)) / 1e9
    chunks = sum(len(out.chunk_ns) for out in good)
    rates = [rate for out in good if (rate := out.decode_rate) is not None]
    return figures | {
        "wall_s": wall,
        "prompt_tokens": sum(out.prompt_tokens for out in good),
        "cached_tokens": sum(out.cached_tokens for out in good),
        "completion_tokens": tokens,
        "tok_s": tokens / wall if wall > 0 else float("nan"),
        "decode_tok_s": sum(rates) / len(rates) if rates else float("nan"),
        "tokens_per_chunk": tokens / chunks if chunks else float("nan"),
        "ttft_ms": distribution([ttft for out in good if (ttft := out.ttft_ms) is not None]),
        "itl_ms": distribution([gap for out in good for gap in out.itl_ms]),
    }
