"""The load generator against a small fake server that speaks as llama-server and as mullama do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bench import answers, clients, online, servers

Handler = Callable[[dict[str, Any], asyncio.StreamWriter], Any]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(message: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(message).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def stream_tokens(body: dict[str, Any], writer: asyncio.StreamWriter, gap_s: float = 0.01) -> None:
    """A stream of ``max_tokens`` words, a ping in between, usage at the end, as mullama and OpenAI send it."""
    writer.write(HEAD)
    n = body["max_tokens"]
    for i in range(n):
        await asyncio.sleep(gap_s)
        text = event({"choices": [{"index": 0, "text": f" w{i}", "finish_reason": None}]})
        writer.write(chunk(b": ping\n\n") + chunk(text))
        await writer.drain()
    writer.write(chunk(event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})))
    usage = {
        "prompt_tokens": len(body["prompt"].split()),
        "completion_tokens": n,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    writer.write(chunk(event({"choices": [], "usage": usage, "profile": {"prefill_ms": 1.5}})))
    writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    await writer.drain()


@asynccontextmanager
async def fake_server(handler: Handler) -> AsyncIterator[tuple[int, list[dict[str, Any]]]]:
    """Yields the port and the bodies received; connections are kept alive."""
    bodies: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(answers.headers_of(head)["content-length"])
                body = json.loads(await reader.readexactly(length))
                bodies.append(body)
                await handler(body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, servers.HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1], bodies
    finally:
        server.close()


def request(n_tokens: int = 4, kind: str = "mullama", prompt: str = "a b c") -> bytes:
    return clients.completion_request(kind, prompt, n_tokens)


def test_closed_loop_measures_every_request() -> None:
    async def main() -> tuple[list[answers.Outcome], int]:
        async with fake_server(stream_tokens) as (port, bodies):
            work = [[request(5), request(3)], [request(5), request(3)]]
            return await clients.closed_loop(port, work), len(bodies)

    outcomes, n_received = clients.run(main())
    assert n_received == 4
    assert [out.completion_tokens for out in outcomes] == [5, 3, 5, 3]
    for out in outcomes:
        assert out.error is None
        assert out.status == 200
        assert out.prompt_tokens == 3
        assert out.cached_tokens == 2
        assert out.text == "".join(f" w{i}" for i in range(out.completion_tokens))
        assert out.finish_reason == "length"
        assert out.profile == {"prefill_ms": 1.5}
        assert len(out.chunk_ns) == out.completion_tokens
        assert out.ttft_ms is not None
        assert 9 < out.ttft_ms < 500
        assert all(gap > 5 for gap in out.itl_ms)
        assert out.decode_rate == pytest.approx(100, rel=0.5)
    figures = clients.load_figures(outcomes)
    assert figures["errors"] == 0
    assert figures["completion_tokens"] == 16
    assert figures["cached_tokens"] == 8
    assert figures["tokens_per_chunk"] == 1
    assert figures["itl_ms"]["n"] == 12
    assert figures["tok_s"] == pytest.approx(16 / figures["wall_s"])


def test_open_loop_does_not_wait_for_the_server() -> None:
    """Three arrivals within 20 ms of requests that take 100 ms each overlap."""

    async def main() -> tuple[list[answers.Outcome], float]:
        async with fake_server(stream_tokens) as (port, _):
            begin = time.monotonic()
            outcomes = await clients.open_loop(port, [request(10)] * 3, [0.0, 0.01, 0.02])
            return outcomes, time.monotonic() - begin

    outcomes, wall = clients.run(main())
    assert [out.completion_tokens for out in outcomes] == [10, 10, 10]
    assert wall < 0.29
    starts = [out.started_ns for out in outcomes]
    assert starts == sorted(starts)


def test_poisson_arrivals_are_seeded_and_have_the_rate() -> None:
    times = clients.poisson_arrivals(5000, 4.0, seed=1)
    assert times == clients.poisson_arrivals(5000, 4.0, seed=1) != clients.poisson_arrivals(5000, 4.0, seed=2)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(5000 / 4.0, rel=0.1)


def test_an_error_object_is_reported_and_the_connection_serves_on() -> None:
    async def handler(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if body["prompt"] != "too long":
            await stream_tokens(body, writer, 0)
            return
        payload = json.dumps({"error": {"message": "does not fit", "code": "context_length_exceeded"}}).encode()
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        writer.write(head.encode())
        await asyncio.sleep(0.01)  # head and body in separate packets
        writer.write(payload)

    async def main() -> list[answers.Outcome]:
        async with fake_server(handler) as (port, _):
            return await clients.closed_loop(port, [[request(prompt="too long"), request(2)]])

    refused, served = clients.run(main())
    assert refused.status == 400
    assert refused.error == "does not fit"
    assert served.error is None
    assert served.completion_tokens == 2
    figures = clients.load_figures([refused, served])
    assert (figures["requests"], figures["errors"], figures["first_error"]) == (2, 1, "does not fit")
    assert figures["completion_tokens"] == 2


def test_a_connection_cut_in_the_middle_is_an_error() -> None:
    async def handler(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(event({"choices": [{"text": "half", "finish_reason": None}]})))
        await writer.drain()
        writer.close()

    async def main() -> list[answers.Outcome]:
        async with fake_server(handler) as (port, _):
            return await clients.closed_loop(port, [[request(), request()]])

    for out in clients.run(main()):
        assert out.text == "half"
        assert out.error == "the connection was closed before the end of the answer"


def test_no_server_and_no_answer_are_errors_not_exceptions() -> None:
    async def silent(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async def main() -> tuple[answers.Outcome, answers.Outcome]:
        async with fake_server(silent) as (port, _):
            slow = await clients.Connection(port).call(request(), limit_s=0.05)
        nobody = await clients.Connection(port).call(request())
        return answers.parse(slow), answers.parse(nobody)

    slow, nobody = clients.run(main())
    assert slow.error is not None
    assert "within 0.05 s" in slow.error
    assert nobody.error is not None
    assert "cannot connect" in nobody.error


def test_background_streams_run_until_the_block_ends() -> None:
    async def main() -> tuple[list[answers.RawCall], int]:
        async with fake_server(stream_tokens) as (port, bodies):
            async with clients.background_streams(port, 2, lambda _: request(6)) as calls:
                await asyncio.sleep(0.2)
            return calls, len(bodies)

    calls, n_received = clients.run(main())
    outcomes = [answers.parse(call) for call in calls]
    assert len(calls) == n_received >= 4
    assert sum(out.completion_tokens == 6 for out in outcomes) >= 2  # whole ones
    assert sum(len(out.chunk_ns) for out in outcomes) >= 12  # the cut ones count as far as they came


@pytest.mark.parametrize("size", [1, 2, 7, 50, 100_000])
def test_parsing_does_not_depend_on_how_packets_were_cut(size: int) -> None:
    stream = HEAD + b"".join(
        [
            chunk(b": ping\n\n"),
            chunk(event({"choices": [{"delta": {"role": "assistant", "content": None}}]})),
            chunk(event({"choices": [{"delta": {"content": "Zürich"}}]})),
            chunk(event({"choices": [{"delta": {"content": " ok"}, "finish_reason": "stop"}]})),
            chunk(event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}})),
            chunk(b"data: [DONE]\n\n"),
            b"0\r\n\r\n",
        ]
    )
    packets = [(i, stream[i : i + size]) for i in range(0, len(stream), size)]
    out = answers.parse(answers.RawCall(0, packets, len(stream)))
    assert (out.text, out.finish_reason, out.prompt_tokens, out.completion_tokens) == ("Zürich ok", "stop", 9, 2)
    assert len(out.chunk_ns) == 2
    assert out.error is None


def test_garbage_is_an_error_not_an_exception() -> None:
    for raw in (b"SSH-2.0-OpenSSH\r\n\r\n", HEAD + chunk(b"data: {oops\n\n"), b""):
        assert answers.parse(answers.RawCall(0, [(1, raw)] if raw else [], 1)).error is not None


def test_each_server_gets_what_it_understands() -> None:
    def body(kind: str, **options: Any) -> dict[str, Any]:
        made = clients.completion_request(kind, "p", 8, **options)
        parsed: dict[str, Any] = json.loads(made.partition(b"\r\n\r\n")[2])
        return parsed

    assert "cache_prompt" not in body("mullama")
    assert body("llama-server")["cache_prompt"] is False
    assert body("mullama")["stream_options"] == {"include_usage": True}
    assert body("mullama")["temperature"] == 0
    assert body("mullama", sampling=clients.SAMPLED)["min_p"] == 0
    assert "stream" not in body("llama-server", stream=False)
    assert body("llama-server", stream=False, n_probs=2)["n_probs"] == 2
    assert b"X-Profile: true\r\n" in clients.completion_request("mullama", "p", 1, profile=True)


def test_share_of_busy_time_inside_llama_decode() -> None:
    assert online.decode_share((1000, 500), (2000, 1480)) == pytest.approx(0.98)
    assert online.decode_share((1000, 500), (1000, 500)) is None  # nothing was computed
    assert online.decode_share(None, None) is None  # another server
