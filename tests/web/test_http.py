"""HTTP as clients and proxies speak it: 1.0, half-closed connections, compressed bodies, spellings of a path."""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from mullama.web.http.half_closed import HalfClosed, has_no_owner, is_gone
from mullama.web.http.protocol import MAX_HEAD

from .conftest import Client, Live, parse_events
from .fake_engine import FakeEngine
from .test_live import Raw, connect, wait_until

Start = Callable[..., Live]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def say(port: int, head: str, body: object = None, *, shut: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and all bytes up to the end of the connection."""
    data = b"" if body is None else json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        if shut:
            sock.shutdown(socket.SHUT_WR)
        received = b""
        while piece := sock.recv(65536):
            received += piece
    top, _, rest = received.partition(b"\r\n\r\n")
    lines = top.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, rest


# -- HTTP/1.0 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_for_http_1_0_has_no_chunks(live: Start, engine: FakeEngine, direct: bool, n: int) -> None:
    engine.delay = 0.002
    port = live(direct=direct).port
    body = {"messages": MESSAGES, "stream": True, "n": n}
    status, headers, data = say(port, f"POST {CHAT} HTTP/1.0\r\nHost: localhost", body)
    assert status == 200 and "transfer-encoding" not in headers and headers["connection"] == "close"
    events = parse_events(data)  # it would not parse with chunk sizes between
    assert events[-1] == "[DONE]" and "wörld" in data.decode()


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/internal/kv", "/nothing"])
def test_whole_answers_for_http_1_0(live: Start, path: str) -> None:
    status, headers, data = say(live().port, f"GET {path} HTTP/1.0")
    assert status == (404 if path == "/nothing" else 200)
    assert int(headers["content-length"]) == len(data) and json.loads(data)


def test_other_streams_for_http_1_0(live: Start, engine: FakeEngine) -> None:
    with socket.create_connection(("127.0.0.1", live(ping_seconds=0.02).port), timeout=10) as sock:
        sock.sendall(b"GET /internal/kv/events HTTP/1.0\r\n\r\n")
        received = b""
        while received.count(b": ping") < 3:
            received += sock.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and body.startswith(b": ping\n: ping\n")


def test_http_1_0_gets_no_interim_response(live: Start) -> None:
    head = f"POST {CHAT} HTTP/1.0\r\nExpect: 100-continue"
    assert say(live().port, head, {"messages": MESSAGES})[0] == 200


# -- half-closed connections ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_shuts_its_sending_half_is_answered(
    live: Start, engine: FakeEngine, stream: bool, version: str
) -> None:
    engine.first_delay = 0.4  # longer than the connection is looked at for the first times
    head = f"POST {CHAT} HTTP/{version}\r\nHost: localhost"
    status, headers, data = say(live().port, head, {"messages": MESSAGES, "stream": stream}, shut=True)
    assert status == 200 and "wörld" in data.decode()
    assert stream or (headers["connection"] == "close" and json.loads(data)["choices"][0]["finish_reason"] == "stop")


def test_pipelined_requests_and_the_end_of_the_stream(live: Start) -> None:
    with socket.create_connection(("127.0.0.1", live().port), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        sock.shutdown(socket.SHUT_WR)
        received = b""
        while piece := sock.recv(65536):
            received += piece
    assert received.count(b"HTTP/1.1 200 OK") == 3


def test_a_request_that_was_cut_ends_the_connection(live: Start) -> None:
    with connect(live()) as raw:
        raw.sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.file.read() == b""


def test_an_idle_connection_ends_with_the_stream(live: Start) -> None:
    with connect(live()) as raw:
        raw.send("/health", method="GET")
        assert raw.response()[0] == 200
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.file.read() == b""


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_shuts_and_then_leaves_is_noticed(live: Start, engine: FakeEngine, stream: bool) -> None:
    engine.hang = True
    running = live()
    raw = Raw(running.port)
    raw.send(CHAT, {"messages": MESSAGES, "stream": stream})
    wait_until(lambda: len(engine.running) == 1)
    raw.sock.shutdown(socket.SHUT_WR)
    time.sleep(0.2)
    assert not engine.generations[0].cancelled_at
    raw.close()
    wait_until(lambda: bool(engine.generations[0].cancelled_at), 15)
    wait_until(lambda: not running.server.server_state.tasks)


def test_what_is_known_of_the_other_end() -> None:
    """Loopback and Unix sockets; where the system cannot say it, it is never taken for gone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        served, _ = server.accept()
        with served:
            assert not is_gone(served)
            client.shutdown(socket.SHUT_WR)
            assert not is_gone(served)
            client.close()
            if has_no_owner(served.getpeername(), served.getsockname()):
                assert is_gone(served)
    one, other = socket.socketpair()
    with one:
        other.shutdown(socket.SHUT_WR)
        assert not is_gone(one)
        other.close()
        assert is_gone(one)
    assert not has_no_owner(("192.0.2.1", 1), ("192.0.2.2", 2))
    assert not has_no_owner(("127.0.0.1", 1), ("127.0.0.1", 2))  # no such connection: nothing is known of it


def test_half_closed_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    gone = []

    async def main() -> None:
        one, other = socket.socketpair()
        with one:
            transport: Any = type("T", (), {"get_extra_info": lambda self, name: one})()
            watch = HalfClosed(transport, lambda: gone.append(1))
            await asyncio.sleep(0.1)
            assert not gone
            other.close()
            while not gone:
                await asyncio.sleep(0.01)
            watch.close()

    asyncio.run(main())
    assert gone == [1]


# -- offers of other protocols ----------------------------------------------------------------------------------

#: As Java's HttpClient sends it unless it is told not to.
OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_an_offer_of_http_2_is_passed_over(live: Start, chunked: bool, in_pieces: bool) -> None:
    body = json.dumps({"messages": MESSAGES}).encode()
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    with connect(live()) as raw:
        for _ in range(2):  # the connection goes on
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{OFFER}{length}\r\n\r\n".encode()
            if in_pieces:
                raw.sock.sendall(head)
                time.sleep(0.05)
                raw.sock.sendall(data)
            else:
                raw.sock.sendall(head + data)
            status, answer = raw.response()
            assert status == 200 and answer["choices"][0]["message"]["content"] == "Hello wörld!"
        raw.sock.sendall(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{OFFER}\r\n".encode() * 500)
        assert {raw.response()[0] for _ in range(500)} == {200}


def test_a_websocket_is_an_ordinary_request(live: Start) -> None:
    head = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    assert say(live().port, head[:-2], shut=True)[0] == 200


def test_connect_is_refused(live: Start) -> None:
    with connect(live()) as raw:
        raw.sock.sendall(b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.response()[0] == 400


def test_probes_with_head(live: Start) -> None:
    with connect(live()) as raw:
        for path in ("/health", "/ready", "/v1/models"):
            raw.sock.sendall(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            status, headers = raw.head()
            assert status == 200 and int(headers["content-length"]) > 0


# -- what is no request -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_not_http_gets_an_error_object(live: Start, what: bytes) -> None:
    with connect(live()) as raw:
        raw.sock.sendall(what)
        status, body = raw.response()
        assert status == 400 and "not a valid HTTP request" in body["error"]["message"]


def test_a_head_that_never_ends(live: Start) -> None:
    with connect(live()) as raw:
        raw.sock.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * (MAX_HEAD + 1))
        status, body = raw.response()
        assert status == 431 and body["error"]["code"] == "request_head_too_large"


# -- bodies -----------------------------------------------------------------------------------------------------


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


BODY = json.dumps({"messages": MESSAGES}).encode()
PACKED = {
    "gzip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]),  # several members are one body
    "GZIP": gzip.compress(BODY),
    "deflate": zlib.compress(BODY),
    "deflate ": bare_deflate(BODY),
    "deflate, gzip": gzip.compress(zlib.compress(BODY)),
    "identity": BODY,
    "": BODY,
}


@pytest.mark.parametrize("encoding", PACKED)
def test_compressed_bodies(client: Client, engine: FakeEngine, encoding: str) -> None:
    reply = client.post(CHAT, PACKED[encoding], headers={"Content-Encoding": encoding})
    assert reply.status == 200
    assert engine.rendered == MESSAGES


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, br", "compress"])
def test_other_encodings_are_415(client: Client, encoding: str) -> None:
    reply = client.post(CHAT, BODY, headers={"Content-Encoding": encoding})
    assert reply.status == 415
    assert "gzip or deflate" in reply.error["message"] and reply.error["code"] == "unsupported_media_type"
    assert client.post(CHAT, BODY, headers={"Content-Encoding": "gzip," * 9 + "gzip"}).status == 415


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, bare_deflate])
def test_a_bomb_is_refused(client: Client, pack: Callable[[bytes], bytes]) -> None:
    name = "gzip" if pack is gzip.compress else "deflate"
    for size in (1 << 20, (1 << 20) + 1):  # the limit, which spaces fill
        padded = BODY + b" " * (size - len(BODY))
        reply = client.post(CHAT, pack(padded), headers={"Content-Encoding": name})
        assert reply.status == (200 if size == 1 << 20 else 413)
    bomb = pack(pack(b" " * (100 << 20)))
    reply = client.post(CHAT, bomb, headers={"Content-Encoding": f"{name}, {name}"})
    assert reply.status == 413 and "1048576" in reply.error["message"]


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_broken_compression_is_said(client: Client, name: str) -> None:
    for wrong in (BODY, PACKED[name][:-6], b"\x1f\x8b"):
        reply = client.post(CHAT, wrong, headers={"Content-Encoding": name})
        assert reply.status == 400 and name in reply.error["message"]


def test_compressed_bodies_under_internal(client: Client, engine: FakeEngine) -> None:
    body = gzip.compress(b'{"params": {"prefill_budget": 64}}')
    assert client.request(
        "PATCH", "/internal/scheduler", body, {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    ).status in (200, 400)
    assert engine.scheduler_calls[-1][2] == {"prefill_budget": 64}


def test_a_byte_order_mark_is_skipped(client: Client) -> None:
    assert client.post(CHAT, b"\xef\xbb\xbf" + BODY).status == 200
    assert client.post("/v1/completions", b'\xef\xbb\xbf{"prompt": "x"}').status == 200
    assert "empty" in client.post(CHAT, b"\xef\xbb\xbf").error["message"]


@pytest.mark.parametrize("text", [r"\ud83d", r"\ude00", r"\ud83dA", r"\ud83d\u0041", r"a\\\ud83d", r"\uD83D\uD83D"])
@pytest.mark.parametrize("field", ["content", "x_unknown"])
def test_half_a_surrogate_pair_is_called_that(client: Client, text: str, field: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "a", "{field}": "{text}"}}]}}'.encode()
    reply = client.post(CHAT, body)
    assert reply.status == 400
    assert "half a surrogate pair" in reply.error["message"]


def test_what_only_looks_like_half_a_pair(client: Client, engine: FakeEngine) -> None:
    for text, meant in ((r"\ud83d\ude00", "😀"), (r"\\ud83d", r"\ud83d"), (r"\\\ud83d\ude00", "\\😀")):
        body = f'{{"messages": [{{"role": "user", "content": "{text}"}}]}}'.encode()
        assert client.post(CHAT, body).status == 200
        assert engine.rendered[0]["content"] == meant
    assert "surrogate" not in client.post(CHAT, rb'{"a": "\\ud83d", oops').error["message"]
