"""Clients that are too many, and those that take too long to send a request."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mullama.web.http import connections
from mullama.web.http.connections import FALTERING, Limits

SCRIPT = """
import resource, sys
if int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(int(sys.argv[2]), 40), int(sys.argv[2])))
sys.path.insert(0, sys.argv[1])
from fake_engine import FakeEngine
from mullama.config import ServeConfig
from mullama.serving.manager import ModelManager
from mullama.web.server import run_server
engine = FakeEngine(reply=["x"] * 3)
config = ServeConfig(port=0, request_timeout=float(sys.argv[3]))
run_server(config, ModelManager([("fake", engine)]))
"""

REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHAT = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()


@contextlib.contextmanager
def serving(limit: int = 0, request_timeout: float = 30.0) -> Iterator[int]:
    """The port of a server of its own; ``limit``: descriptors that it may have."""
    arguments = [str(Path(__file__).parent), str(limit), str(request_timeout)]
    server = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.fullmatch(r"mullama ready on http://127\.0\.0\.1:(\d+)\n", server.stdout.readline())
        assert found
        yield int(found[1])
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.communicate()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def answer(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(65536):
            received += data
    return received


def reply(client: socket.socket) -> bytes:
    """One answer whose body is an object of one level, or its beginning when the client is refused."""
    received = b""
    while not received.endswith(b"}") and (data := client.recv(65536)):
        received += data
    return received


def ask(port: int) -> bytes:
    with connect(port) as client:
        client.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        return answer(client)


def test_whoever_is_one_too_many_is_told() -> None:
    with serving(limit=150) as port, contextlib.ExitStack() as stack:
        idle: list[socket.socket] = []
        while len(idle) < 150:  # until one is refused
            client = stack.enter_context(connect(port))
            client.sendall(REQUEST)
            first = reply(client)
            if not first.startswith(b"HTTP/1.1 200"):
                break
            idle.append(client)
        assert 20 <= len(idle) < 150 - FALTERING, "some are kept for the server's own work"
        assert first.startswith(b"HTTP/1.1 503") and b"retry-after: 1\r\n" in first.lower()
        body = json.loads((first + answer(client)).partition(b"\r\n\r\n")[2])
        assert body["error"]["code"] == "too_many_connections" and body["error"]["type"] == "overloaded_error"
        for client in idle:  # those that were there go on
            client.sendall(REQUEST)
            assert reply(client).startswith(b"HTTP/1.1 200")
        for client in idle[:5]:
            client.close()
        deadline = time.monotonic() + 30
        while not ask(port).startswith(b"HTTP/1.1 200"):
            assert time.monotonic() < deadline, "there is room again"


def test_a_flood_of_idle_clients_leaves_the_server_alive() -> None:
    """More than there are descriptors, and none of them says anything."""
    with serving(limit=72, request_timeout=2.0) as port, contextlib.ExitStack() as stack:
        for _ in range(120):
            stack.enter_context(connect(port))
        deadline = time.monotonic() + 60
        while not ask(port).startswith(b"HTTP/1.1 200"):  # once the silent ones have been given up
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize(
    "said",
    [
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" + CHAT[:10],
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n" + CHAT[:5],
    ],
)
def test_a_request_that_drips_is_given_up(said: bytes) -> None:
    """One byte at a time is no progress."""
    with serving(request_timeout=0.5) as port, connect(port) as client:
        client.sendall(said)
        client.settimeout(0.05)
        received, deadline = b"", time.monotonic() + 30
        while b"\r\n\r\n" not in received:
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                data = client.recv(65536)
                if not data:
                    break
                received += data
            with contextlib.suppress(OSError):
                client.sendall(b"a" if b"chunked" not in said else b"")
        assert received.startswith(b"HTTP/1.1 408"), received
        assert b"request_timeout" in received
        assert ask(port).startswith(b"HTTP/1.1 200")


def test_whoever_says_nothing_is_left() -> None:
    with serving(request_timeout=0.5) as port, connect(port) as client:
        assert answer(client) == b""


def test_a_client_that_is_slow_between_requests_stays() -> None:
    with serving(request_timeout=0.5) as port, connect(port) as client:
        for _ in range(2):
            client.sendall(REQUEST)
            assert reply(client).startswith(b"HTTP/1.1 200")
            time.sleep(1.2)
        client.sendall(REQUEST)
        assert reply(client).startswith(b"HTTP/1.1 200")


# -- the limits themselves -----------------------------------------------------------------------------------------


class Client:
    def __init__(self) -> None:
        self.transport = self
        self.aborted = self.late = self.given_up = False

    def abort(self) -> None:
        self.aborted = True

    def is_late(self, now: float, limits: Limits) -> bool:
        return self.late

    def give_up(self, limits: Limits) -> None:
        self.given_up = True


def test_the_refused_do_not_count_and_do_not_stay() -> None:
    limits = Limits(30.0, 2)
    clients = [Client() for _ in range(2 + FALTERING + 1)]
    verdicts = [limits.refuses(client, n, 0.0) for n, client in enumerate(clients, 1)]
    assert verdicts == [False, False, *[True] * FALTERING, None]
    assert limits.n_refused == FALTERING + 1
    limits.look(clients, 1.0)
    assert not any(client.aborted for client in clients)
    limits.look(clients, 3.0)
    assert [client.aborted for client in clients] == [False, False, *[True] * FALTERING, False]
    for client in clients[2:]:
        limits.lost(client)
    assert limits.refuses(Client(), 2, 4.0) is False


def test_the_late_are_given_up_once_each() -> None:
    limits = Limits(30.0, None)
    late, good = Client(), Client()
    late.late = True
    limits.look({late, good}, 0.0)
    assert (late.given_up, good.given_up, limits.n_late) == (True, False, 1)


def test_some_descriptors_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_n_open", lambda: 20)
    for soft, expected in ((1024, 1024 - 20 - FALTERING - 64), (72, 18), (30, 1), (10, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert connections.room() == expected
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert connections.room() is None


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, 4096),
        (4096, 4096, None),
        (1024, resource.RLIM_INFINITY, connections.MOST),
        (1024, 1 << 30, 1 << 20),
    ],
)
def test_the_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, expected: int | None) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: told.append(limits))
    connections.raise_limit()
    assert told == ([] if expected is None else [(expected, hard)])

    def refuse(_: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    connections.raise_limit()
