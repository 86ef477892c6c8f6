"""The process: binding, the ready line, signals, draining."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mullama.config import ServeConfig
from mullama.errors import ConfigError
from mullama.serving.manager import ModelManager
from mullama.web.server import bind, run_server, url_of

from .fake_engine import FakeEngine

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_engine import FakeEngine
from pathlib import Path
from mullama.config import load_config
from mullama.serving.manager import ModelManager
from mullama.web.server import run_server
engine = FakeEngine(reply=["x"] * int(sys.argv[2]))
engine.delay = 0.02
models = ModelManager([("fake", engine)])
options = dict(drain_timeout=float(sys.argv[3]), profile_log=sys.argv[4], drain_delay=float(sys.argv[5]))
read = lambda: load_config({"port": 0, **options}, env={}, file=Path(sys.argv[6]))
run_server(read(), models, read_config=read)
"""


@contextmanager
def process(
    tmp_path: Path, *, num_tokens: int, drain_timeout: float, drain_delay: float = 0.0
) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A server in a process of its own, and a connection to it."""
    (tmp_path / "c.toml").touch()
    arguments = [str(Path(__file__).parent), str(num_tokens), str(drain_timeout), str(tmp_path / "p.jsonl")]
    arguments += [str(drain_delay), str(tmp_path / "c.toml")]
    server = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.fullmatch(r"mullama ready on http://127\.0\.0\.1:(\d+)\n", server.stdout.readline())
        assert found and found[1] != "0"
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=10) as client:
            yield server, client
    finally:
        server.kill()
        server.wait()
        server.stdout.close()  # type: ignore[union-attr]


def start_stream(client: socket.socket) -> None:
    body = json.dumps({"prompt": "x", "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall((head + body).encode())
    received = b""
    while b'"text":"x' not in received:
        received += client.recv(65536)


def ask(server_at: tuple[str, int] | socket.socket, method: str, path: str, key: str = "") -> tuple[int, str, bytes]:
    """One request, on a connection of its own or on the one given: (status, head, body)."""
    given = isinstance(server_at, socket.socket)
    connection = server_at if isinstance(server_at, socket.socket) else socket.create_connection(server_at, timeout=10)
    try:
        body = b'{"prompt": "x"}' if method == "POST" else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        head, _, data = received.partition(b"\r\n\r\n")  # type: ignore[assignment]
        text = bytes(head).decode().lower()  # type: ignore[arg-type]
        size = re.search(r"content-length: (\d+)", text)
        while size and len(data) < int(size[1]):
            data += connection.recv(65536)
        return int(text.split()[1]), text, data
    finally:
        if not given:
            connection.close()


def until_status(server_at: tuple[str, int], path: str, status: int) -> str:
    """Ask until it answers so; the head of that answer."""
    end = time.monotonic() + 20
    while True:
        found, head, _ = ask(server_at, "GET", path)
        if found == status:
            return head
        assert time.monotonic() < end, f"{path} still says {found}"
        time.sleep(0.01)


def rest(client: socket.socket) -> bytes:
    received = b""
    while data := client.recv(65536):
        received += data
    return received


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    (tmp_path / "c.toml").touch()
    arguments = [str(Path(__file__).parent), "1", "1", str(tmp_path / "p.jsonl"), "0", str(tmp_path / "c.toml")]
    with Path("/dev/full").open("wb") as full:
        server = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"mullama ready on http://127\.0\.0\.1:(\d+) \(stdout: No space left on device\)", line)
        assert found, line
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=10) as client:
            start_stream(client)
            server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0, "not the 120 of an interpreter that cannot flush"
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_end(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path, num_tokens=100, drain_timeout=30) as (server, client):
        at = client.getpeername()
        with socket.create_connection(at, timeout=10) as old:
            assert ask(old, "GET", "/ready")[0] == 200
            start_stream(client)
            server.send_signal(number)
            head = until_status(at, "/ready", 503)
            assert "retry-after: " in head and "connection: close" in head
            for where in (at, old):  # on a new connection as on one that was kept alive
                status, head, body = ask(where, "POST", "/v1/completions")
                assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
                assert "retry-after: " in head and "connection: close" in head
            assert old.recv(10) == b"", "and then that one is closed"
        assert ask(at, "GET", "/health")[0] == 200, "it lives, and must not be killed"
        assert json.loads(ask(at, "GET", "/ready")[2])["status"] == "shutting down"
        data = rest(client)
        assert b"data: [DONE]" in data
        assert server.wait(5) == 0
    assert json.loads((tmp_path / "p.jsonl").read_text())["finish_reason"] == "stop"


def test_a_balancer_gets_time_to_look_elsewhere(tmp_path: Path) -> None:
    """With --drain-delay it is not ready, and takes requests all the same."""
    with process(tmp_path, num_tokens=2, drain_timeout=10, drain_delay=1.0) as (server, client):
        at = client.getpeername()
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        until_status(at, "/ready", 503)
        if time.monotonic() - start < 0.5:  # else the machine is too slow to tell
            status, head, _ = ask(at, "POST", "/v1/completions")
            assert (status, "connection: close" in head) == (200, True)
        assert server.wait(20) == 0
        assert time.monotonic() - start >= 1.0


def test_an_interrupt_ends_the_delay_too(tmp_path: Path) -> None:
    with process(tmp_path, num_tokens=2, drain_timeout=30, drain_delay=600) as (server, client):
        server.send_signal(signal.SIGINT)
        until_status(client.getpeername(), "/ready", 503)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal")
def test_a_hang_up_reloads(tmp_path: Path) -> None:
    with process(tmp_path, num_tokens=2, drain_timeout=10) as (server, client):
        at = client.getpeername()
        assert ask(at, "POST", "/v1/completions")[0] == 200
        (tmp_path / "c.toml").write_text('api_key = ["k"]\n')
        (tmp_path / "p.jsonl").rename(tmp_path / "old.jsonl")
        server.send_signal(signal.SIGHUP)
        end = time.monotonic() + 20
        while ask(at, "POST", "/v1/completions")[0] != 401:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert ask(at, "POST", "/v1/completions", "k")[0] == 200
        server.terminate()
        assert server.wait(20) == 0
    assert json.loads((tmp_path / "p.jsonl").read_text().splitlines()[-1])["finish_reason"] == "stop"
    assert (tmp_path / "old.jsonl").exists()


def test_the_drain_has_a_deadline(tmp_path: Path) -> None:
    with process(tmp_path, num_tokens=10_000, drain_timeout=0.3) as (server, client):
        start_stream(client)
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        data = rest(client)
        assert b"shutting_down" in data and b"[DONE]" not in data
        assert server.wait(5) == 0
        assert time.monotonic() - start < 3
    assert json.loads((tmp_path / "p.jsonl").read_text())["finish_reason"] == "cancelled"


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    with process(tmp_path, num_tokens=10_000, drain_timeout=30) as (server, client):
        start_stream(client)
        server.send_signal(signal.SIGINT)
        until_status(client.getpeername(), "/ready", 503)
        assert server.poll() is None
        server.send_signal(signal.SIGINT)
        assert server.wait(5) == 0


def test_a_port_in_use_is_one_line_before_anything_starts() -> None:
    with bind(ServeConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        for attempt in (
            lambda: bind(ServeConfig(port=port)),
            lambda: run_server(ServeConfig(port=port), ModelManager()),
        ):
            with pytest.raises(ConfigError) as caught:
                attempt()
            assert caught.value.message.startswith(f"cannot listen on 127.0.0.1:{port}: the port is in use")
            assert "\n" not in caught.value.message


def test_addresses_that_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on no such host:80: .*not an address"):
        bind(ServeConfig(host="no such host", port=80))
    with pytest.raises(ConfigError, match="does not have that address"):
        bind(ServeConfig(host="192.0.2.1", port=0))


def test_a_bound_socket_already_listens() -> None:
    with bind(ServeConfig(port=0)) as sock:
        socket.create_connection(sock.getsockname(), timeout=1).close()


def test_urls() -> None:
    with bind(ServeConfig(port=0)) as sock:
        port = sock.getsockname()[1]
        assert url_of(ServeConfig(host="127.0.0.1"), sock) == f"http://127.0.0.1:{port}"
        assert url_of(ServeConfig(host="0.0.0.0"), sock) == f"http://localhost:{port}"
        assert url_of(ServeConfig(host="::1"), sock) == f"http://[::1]:{port}"
        assert url_of(ServeConfig(host="box"), sock) == f"http://box:{port}"


def test_a_profile_log_that_cannot_be_opened_frees_the_port(tmp_path: Path) -> None:
    sock = bind(ServeConfig(port=0))
    port = sock.getsockname()[1]
    with pytest.raises(ConfigError, match="--profile-log"):
        run_server(ServeConfig(profile_log=str(tmp_path / "no" / "x")), ModelManager([("fake", FakeEngine())]), sock)
    bind(ServeConfig(port=port)).close()
