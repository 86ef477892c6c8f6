"""``mullama ps``, ``swap``, ``sleep`` and ``wake`` against a small server on the loopback."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mullama.cli.main import main

ROW = {
    "name": "smollm2:135m", "state": "ready", "pinned": True, "weights": "Q8_0", "memory_bytes": 145_000_000,
    "in_use": 2, "requests": 17, "tokens_per_second": 98.6, "idle_s": 0.0, "keep_alive_s": 300.0,
}  # fmt: skip
UNLOADED = {
    "name": "b", "state": "unloaded", "pinned": False, "memory_bytes": None, "in_use": 0, "requests": 0,
    "idle_s": None, "keep_alive_s": None,
}  # fmt: skip
ADAPTER = {"id": "x", "scale": 0.5, "rank": 8, "size_bytes": 1_200_000, "requests": 3, "path": "/f/x.gguf"}
REPORT = {
    "model": "a/b", "weights_from": "Q8_0", "weights_to": "Q4_0", "total_ms": 300.4, "kv": "carry", "pause_ms": 7.25,
    "sequences_moved": 4, "sequences_recomputed": 0,
}  # fmt: skip


class Remote(http.server.ThreadingHTTPServer):
    """Answers everything with ``status`` and ``body``; keeps what it was asked."""

    status = 200
    body = b"{}"
    kind = "application/json"

    def __init__(self, path: Path | None = None) -> None:
        """``path``: of a Unix socket, in place of a port on the loopback."""
        self.asked: list[tuple[str, str, Any, str | None]] = []
        if path is None:
            super().__init__(("127.0.0.1", 0), Handler)
            self.url = f"http://127.0.0.1:{self.server_port}"
        else:
            self.address_family = socket.AF_UNIX
            super().__init__(str(path), Handler)  # type: ignore[arg-type]
            self.url = f"unix:{path}"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # http.server asks for the address's name
        self.server_port = self.socket.getsockname()[1] if self.address_family != socket.AF_UNIX else 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        remote = self.server
        assert isinstance(remote, Remote)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = json.loads(data) if data else None
        remote.asked.append((self.command, self.path, asked, self.headers["Authorization"]))
        self.send_response(remote.status)
        self.send_header("Content-Length", str(len(remote.body)))
        self.send_header("Content-Type", remote.kind)
        self.end_headers()
        self.wfile.write(remote.body)

    do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
        pass


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    with answering(Remote(), monkeypatch) as server:
        yield server


@contextlib.contextmanager
def answering(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    with remote as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("MULLAMA_URL", server.url)
        monkeypatch.delenv("MULLAMA_ADMIN_KEY", raising=False)
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_ps_is_a_table(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    remote.body = json.dumps({"models": [ROW, UNLOADED]}).encode()
    assert main(["ps"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["NAME", "STATE", "WEIGHTS"]
    for text in ("smollm2:135m", "ready (pinned)", "Q8_0", "145 MB", "17", "99", "0 s", "300 s"):
        assert text in first
    assert second.split()[:2] == ["b", "unloaded"]
    assert second.rstrip().endswith("for ever")
    assert remote.asked == [("GET", "/internal/models", None, None)]


def test_ps_as_json_with_a_key(
    remote: Remote, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.body = json.dumps({"models": []}).encode()
    assert main(["ps", "--json", "--url", remote.url + "/", "--key", "k1"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": []}
    monkeypatch.setenv("MULLAMA_ADMIN_KEY", "k2")
    assert main(["ps"]) == 0
    assert capsys.readouterr().out == "no models\n"
    assert [asked[3] for asked in remote.asked] == ["Bearer k1", "Bearer k2"]


def events(*sent: tuple[str, dict[str, Any]]) -> bytes:
    return b": ping\n\n" + b"".join(f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode() for kind, data in sent)


def test_a_swap_tells_what_it_makes_and_how_far_it_is(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    note = "making Q8_0 out of Q4_1, which loses more than out of F16"
    running = {"state": "running", "done": 0, "total": None}
    remote.kind = "text/event-stream"
    remote.body = events(
        ("progress", {**running, "phase": note, "note": note}),
        ("progress", {**running, "phase": "quantising", "note": note, "done": 5, "total": 10}),
        ("progress", {**running, "phase": "loading", "note": note}),
        ("done", REPORT),
    )
    assert main(["swap", "a", "Q8_0"]) == 0
    out, err = capsys.readouterr()
    assert "a/b: Q8_0 -> Q4_0 in 300 ms" in out
    assert err.count(f"note: {note}\n") == 1
    assert [line for line in err.splitlines() if line.startswith("a to Q8_0: ")][1:] == [
        "a to Q8_0: quantising", "a to Q8_0: loading",
    ]  # fmt: skip
    remote.body = events(("error", {"state": "failed", "error": {"message": "the disk is full"}}))
    assert main(["swap", "a", "Q8_0"]) == 1
    assert "the disk is full" in capsys.readouterr().err
    remote.body = events(("progress", {**running, "phase": "loading"}))
    assert main(["swap", "a", "Q8_0"]) == 1
    assert "stopped before it was done" in capsys.readouterr().err
    remote.body = b"data: {nonsense\n\n"
    assert main(["swap", "a", "Q8_0"]) == 1
    assert "does not answer like a mullama server" in capsys.readouterr().err


def test_swap(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    remote.body = json.dumps(REPORT).encode()
    assert main(["swap", "a/b c", "Q4_0", "--kv", "carry"]) == 0
    out = capsys.readouterr().out
    assert "a/b: Q8_0 -> Q4_0 in 300 ms" in out
    assert "a pause of 7.2 ms, 4 sequences went on, 0 are computed again" in out
    body = {"to": "Q4_0", "kv": "carry", "gap": "auto", "kl": False}
    assert remote.asked == [("POST", "/internal/models/a/b%20c/swap", body, None)]
    remote.body = json.dumps(REPORT | {"pause_ms": None}).encode()
    assert main(["swap", "a", "Q4_0"]) == 0
    assert "nothing ran" in capsys.readouterr().out
    remote.body = json.dumps(REPORT | {"mode": "gap", "gap_ms": 412.3}).encode()
    assert main(["swap", "a", "Q4_0", "--gap", "never"]) == 0
    assert "a gap of 412 ms without weights" in capsys.readouterr().out
    assert remote.asked[-1][2] == {"to": "Q4_0", "kv": "auto", "gap": "never", "kl": False}
    remote.body = json.dumps(REPORT | {"pause_ms": None}).encode()
    assert main(["swap", "a", "Q4_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pause_ms"] is None
    detail = {"carried": 0.0062, "recomputed": 0.03, "same_top": 0.958, "tokens": 72}
    remote.body = json.dumps(REPORT | {"kl": 0.0062, "kl_detail": detail}).encode()
    assert main(["swap", "a", "Q4_0", "--kl"]) == 0
    expected = "0.0062 nats from the old weights on carried KV, the same best token at 96% of 72 places"
    assert expected in capsys.readouterr().out
    assert remote.asked[-1][2] == {"to": "Q4_0", "kv": "auto", "gap": "auto", "kl": True}
    remote.body = json.dumps(REPORT | {"kl": 0.03, "kl_detail": detail | {"carried": None}}).encode()
    assert main(["swap", "a", "Q4_0", "--kl"]) == 0
    assert "0.0300 nats from the old weights on KV of their own" in capsys.readouterr().out


def test_lora(remote: Remote, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    remote.body = json.dumps({"model": "a/b", "adapters": [ADAPTER]}).encode()
    assert main(["lora", "list", "a/b"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["ID", "SCALE", "RANK", "SIZE", "REQUESTS", "FILE"]
    assert row.split() == ["x", "0.5", "8", "1.2", "MB", "3", "/f/x.gguf"]
    assert main(["lora", "unload", "a/b", "x y"]) == 0
    assert capsys.readouterr().out == "a/b+x y: unloaded\n"
    remote.body = json.dumps(ADAPTER).encode()
    file = tmp_path / "x.gguf"
    file.touch()
    assert main(["lora", "load", "a/b", str(file), "--scale", "0.5"]) == 0
    assert capsys.readouterr().out == "a/b+x: 1.2 MB, rank 8, /f/x.gguf\n"
    assert main(["lora", "load", "a/b", "hf:o/r/x.gguf", "--id", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ADAPTER
    remote.body = b'{"adapters": []}'
    assert main(["lora", "list", "a"]) == 0
    assert capsys.readouterr().out == "no adapters\n"
    path = "/internal/models/a/b/adapters"
    assert [asked[:3] for asked in remote.asked[:-1]] == [
        ("GET", path, None),
        ("DELETE", f"{path}/x%20y", {}),
        ("POST", path, {"path": str(file), "scale": 0.5}),
        ("POST", path, {"reference": "hf:o/r/x.gguf", "scale": 1.0, "id": "x"}),
    ]


def test_a_gap_is_told(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    remote.body = json.dumps(REPORT | {"gap_ms": 812.3}).encode()
    assert main(["swap", "a", "Q4_0", "--gap", "never"]) == 0
    assert "a gap of 812 ms without weights" in capsys.readouterr().out
    assert remote.asked[0][2] == {"to": "Q4_0", "kv": "auto", "gap": "never", "kl": False}


def test_sleep_and_wake(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    held = {"level": "disk", "tokens": 900, "host_bytes": 0, "disk_bytes": 41_000_000}
    remote.body = json.dumps(ROW | {"state": "asleep", "asleep": held, "pinned": True}).encode()
    assert main(["sleep", "a/b c", "--level", "disk"]) == 0
    assert "asleep (disk), 900 tokens of KV kept, 0 MB in host memory, 41 MB on disk" in capsys.readouterr().out
    assert main(["sleep", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asleep"] == held
    remote.body = json.dumps(ROW | {"asleep": None}).encode()
    assert main(["wake", "a"]) == 0
    assert capsys.readouterr().out == "smollm2:135m: ready\n"
    assert [(path, body) for _, path, body, _ in remote.asked] == [
        ("/internal/models/a/b%20c/sleep", {"level": "disk"}),
        ("/internal/models/a/sleep", {}),
        ("/internal/models/a/wake", {}),
    ]
    remote.body = json.dumps({"models": [ROW | {"state": "asleep", "asleep": held}]}).encode()
    assert main(["ps"]) == 0
    assert "asleep (disk, 900 tokens) (pinned)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ("ps",),
        ("swap", "a", "Q4_0"),
        ("sleep", "a"),
        ("wake", "a"),
        ("lora", "list", "a"),
        ("lora", "unload", "a", "b"),
    ],
)
@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (404, b'{"error": {"message": "the model is not served here"}}', "the model is not served here"),
        (500, b"{}", "status 500"),
        (502, b"[]", "status 502"),
        (200, b"<html>", "does not answer like a mullama server"),
        (200, b"[]", "does not answer like a mullama server"),
    ],
)
def test_errors_are_one_line(
    remote: Remote, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], status: int, body: bytes, text: str
) -> None:
    remote.status, remote.body = status, body
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and text in line


def test_nobody_there(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as sock:  # bound, and nobody listens
        sock.bind(("127.0.0.1", 0))
        assert main(["ps", "--url", f"http://127.0.0.1:{sock.getsockname()[1]}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no server answers at" in line and "mullama serve" in line


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")
def test_a_server_on_a_unix_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(Remote(tmp_path / "s"), monkeypatch) as remote:
        remote.body = json.dumps({"models": [ROW]}).encode()
        assert main(["ps", "--key", "k1"]) == 0
        assert main(["ps", "--url", f"unix://{tmp_path}/s"]) == 0, "as curl and Docker spell it"
        assert capsys.readouterr().out.count("smollm2:135m") == 2
        remote.body = json.dumps(REPORT).encode()
        assert main(["swap", "a/b", "Q4_0"]) == 0
        remote.kind = "text/event-stream"
        remote.body = f"event: done\ndata: {json.dumps(REPORT)}\n\n".encode()
        assert main(["swap", "a/b", "Q4_0"]) == 0
        assert capsys.readouterr().out.count("300 ms") >= 2
        remote.kind, remote.body = "application/json", json.dumps({"adapters": []}).encode()
        assert main(["lora", "unload", "m", "x"]) == 0
        assert [asked[:2] for asked in remote.asked] == [
            ("GET", "/internal/models"),
            ("GET", "/internal/models"),
            ("POST", "/internal/models/a/b/swap"),
            ("POST", "/internal/models/a/b/swap"),
            ("DELETE", "/internal/models/m/adapters/x"),
        ]
        assert remote.asked[0][3] == "Bearer k1"


@pytest.mark.parametrize(("url", "why"), [("unix:/nowhere/s", "mullama serve"), ("unix:", "unix:/path")])
def test_no_unix_socket_there(url: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--url", url]) == 1
    told = capsys.readouterr().err
    assert url in told
    assert why in told
    assert len(told.splitlines()) == 1


def test_a_kv_mode_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swap", "a", "Q4_0", "--kv", "keep"]) == 2
    assert "keep" in capsys.readouterr().err
