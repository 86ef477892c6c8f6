"""Stopping: SIGTERM drains and exits 0, a deadline cuts, and nothing is left behind."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .support import (
    COMPLETIONS,
    Raw,
    ServerProcess,
    clean_env,
    connect,
    events_of,
    long_request,
    mullama,
    request_bytes,
    text_of,
    wait_until,
)

Spawn = Callable[..., ServerProcess]


def is_draining(server: ServerProcess) -> bool:
    """It says so itself, on a new connection."""
    answer = server.get("/ready")
    if answer.status_code == 200:
        return False
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["status"] == "shutting down"
    return True


def check_clean_exit(server: ServerProcess) -> None:
    assert server.wait() == 0, server.stderr
    assert "Traceback" not in server.stderr
    assert list(server.page_dir.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server(spawn: Spawn, number: signal.Signals) -> None:
    running = spawn("--parallel", "1", "--ctx-size", "256")
    with connect(running) as idle:  # a kept-alive connection holds up nothing
        idle.sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.head()[0] == 200
        running.signal(number)
        assert running.wait(20) == 0
    check_clean_exit(running)


def test_running_requests_are_finished(spawn: Spawn) -> None:
    running = spawn("--parallel", "1", "--ctx-size", "1024")
    with connect(running) as raw, connect(running) as waiting:
        raw.send(COMPLETIONS, long_request(max_tokens=250))
        assert raw.head()[0] == 200
        first = raw.chunk()
        waiting.send(COMPLETIONS, long_request(max_tokens=5))
        wait_until(lambda: len(running.scheduler()["waiting"]) == 1)
        running.signal()
        wait_until(lambda: is_draining(running))
        late = running.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert int(late.headers["retry-after"]) > 0 and late.headers["connection"] == "close"
        assert running.get("/health").status_code == 200
        events = events_of(first + raw.rest())
        assert events[-1] == "[DONE]"
        assert events[-2]["choices"][0]["finish_reason"] == "length"
        assert len(text_of(events)) > 100
        # What had been accepted before is finished too, from the queue.
        assert waiting.head()[0] == 200
        assert events_of(waiting.rest())[-1] == "[DONE]"
    check_clean_exit(running)


def test_requests_that_take_too_long_are_cut(spawn: Spawn) -> None:
    running = spawn("--parallel", "1", "--ctx-size", "8192", "--drain-timeout", "1")
    with connect(running) as raw, connect(running) as waiting, connect(running) as whole:
        raw.send(COMPLETIONS, long_request())
        assert raw.head()[0] == 200
        first = raw.chunk()
        waiting.send(COMPLETIONS, long_request())
        whole.send(COMPLETIONS, long_request(stream=False))
        wait_until(lambda: len(running.scheduler()["waiting"]) == 2)
        start = time.monotonic()
        running.signal()
        for stream, head in ((raw, first), (waiting, b"")):
            if stream is waiting:
                assert stream.head()[0] == 200
            events = events_of(head + stream.rest())
            assert events[-1]["error"]["code"] == "shutting_down"
        status, headers = whole.head()
        assert status == 503 and "retry-after" in headers
        assert b"shutting_down" in whole.file.read(int(headers["content-length"]))
        assert time.monotonic() - start >= 0.9, "they had their second"
    check_clean_exit(running)


def test_no_new_request_on_an_old_connection(spawn: Spawn) -> None:
    """A kept-alive connection that asks during the drain is told so, and then closed; it does not start anything."""
    running = spawn("--parallel", "2", "--ctx-size", "8192", "--drain-timeout", "10")
    with connect(running) as raw, connect(running) as old:
        old.sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, headers = old.head()
        old.file.read(int(headers["content-length"]))
        raw.send(COMPLETIONS, long_request())
        raw.head()
        raw.chunk()
        running.signal()
        wait_until(lambda: is_draining(running))
        old.send(COMPLETIONS, {"prompt": "x", "max_tokens": 1})
        status, headers = old.head()
        assert (status, headers["connection"]) == (503, "close")
        assert b"shutting_down" in old.file.read()
        raw.rest()
    check_clean_exit(running)


def test_a_second_sigint_does_not_wait(spawn: Spawn) -> None:
    running = spawn("--parallel", "1", "--ctx-size", "8192", "--drain-timeout", "600")
    raw = Raw(running.port)
    raw.send(COMPLETIONS, long_request())
    raw.head()
    raw.chunk()
    running.signal(signal.SIGINT)
    wait_until(lambda: is_draining(running))
    running.signal(signal.SIGINT)
    running.wait(30)
    raw.close()
    check_clean_exit(running)


def test_clients_that_do_not_read_or_write_cannot_hold_up_the_end(spawn: Spawn) -> None:
    running = spawn("--parallel", "1", "--ctx-size", "8192", "--drain-timeout", "0")
    with connect(running) as deaf, connect(running) as mute, connect(running) as slow:
        deaf.send(COMPLETIONS, long_request())
        slow.sock.sendall(request_bytes(COMPLETIONS, {"prompt": "x"})[:-1])
        mute.sock.sendall(b"POST ")
        wait_until(lambda: running.busy() >= 1)
        running.signal()
        check_clean_exit(running)


def test_a_hang_up_before_and_after_the_server_is_ready(smollm2: Path, tmp_path: Path) -> None:
    """A terminal that closes, or a log rotation: it goes on, with the keys that its file has now."""
    file = tmp_path / "c.toml"
    file.write_text('api_key = ["old"]\n')
    args = ["--model", f"m={smollm2}", "--threads", "1", "--ctx-size", "256", "--parallel", "1", "--config", str(file)]
    running = ServerProcess(tmp_path / "server", args)
    try:
        wait_until(lambda: running.page_dir.exists())  # it loads
        running.signal(signal.SIGHUP)
        running.wait_ready()
        file.write_text('api_key = ["new"]\n')
        running.signal(signal.SIGHUP)
        new = {"Authorization": "Bearer new"}
        wait_until(lambda: running.get("/v1/models", headers=new).status_code == 200)
        assert running.get("/v1/models", headers={"Authorization": "Bearer old"}).status_code == 401
        running.signal()
        check_clean_exit(running)
        assert "reloaded: api_key" in running.stderr
    finally:
        running.kill()


def test_a_signal_before_the_server_is_ready(smollm2: Path) -> None:
    """SIGTERM while it loads ends the process, and is no failure. (In the middle of a C call: test_interrupt.py.)"""
    process = subprocess.Popen(
        mullama("serve", "--port", "0", "--model", str(smollm2)),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_env(),
    )  # fmt: skip
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    try:
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert b"Traceback" not in stderr
