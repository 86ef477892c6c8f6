"""Starting, watching and stopping the servers under test. Everything listens on loopback and is ended by its pid."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import progress

HOST = "127.0.0.1"
MULLAMA = "mullama"
LLAMA_SERVER = "llama-server"
READY_PATH = {MULLAMA: "/ready", LLAMA_SERVER: "/health"}


class ServerFailed(RuntimeError):
    """A server ended or was not ready in time; the message holds the end of its log."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def install_signal_cleanup() -> None:
    """SIGTERM unwinds the stack as Ctrl-C does, so that context managers stop the processes they started."""

    def stop(_signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def mullama_command(
    model: str, port: int, *, ctx: int, parallel: int, threads: int, extra: Sequence[str] = ()
) -> list[str]:
    """``-P`` keeps the working directory off sys.path: the installed mullama is measured, not a bare checkout."""
    return [
        *(sys.executable, "-P", "-m", "mullama", "serve", "--model", model, "--host", HOST, "--port", str(port)),
        *("--ctx-size", str(ctx), "--parallel", str(parallel), "--threads", str(threads)),
        *("--drain-timeout", "2", "--log-level", "warning", *extra),
    ]


def llama_server_command(
    binary: Path, model: str, port: int, *, ctx: int, parallel: int, threads: int, extra: Sequence[str] = ()
) -> list[str]:
    """llama-server with the same context for each slot. Its ``-c`` is the sum over the slots.

    An explicit ``-np`` selects the streams layout (one region a slot). The host-memory prompt cache is off
    (``-cram 0``): these prompts never return, and saving them would cost it time.
    """
    return [
        *(str(binary), "-m", model, "--host", HOST, "--port", str(port)),
        *("-np", str(parallel), "-c", str(ctx * parallel), "-t", str(threads), "-tb", str(threads)),
        *("--no-webui", "-cram", "0", "--fit", "off", "--offline", "-lv", "1", *extra),
    ]


@dataclass
class Server:
    """One server process. ``with server:`` starts it, waits until it is ready, and stops it at the end."""

    name: str  # as shown in tables
    kind: str  # MULLAMA or LLAMA_SERVER: which paths and which extra body fields
    command: list[str]
    port: int
    timeout: float = 120.0  # seconds to become ready
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    ready_s: float = float("nan")  # spawn to the first 200
    _log: Any = field(default=None, repr=False)

    def start(self) -> Server:
        """Raises ServerFailed. Starting twice is harmless."""
        if self.process is not None:
            return self
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        begun = time.monotonic()
        try:
            # its own session: Ctrl-C reaches this program alone, which then stops the server in order
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True
            )
        except OSError as error:
            raise ServerFailed(f"{self.name}: cannot start {self.command[0]}: {error.strerror}") from None
        try:
            while not is_ready(self.port, READY_PATH[self.kind]):
                if self.process.poll() is not None:
                    raise ServerFailed(f"{self.name} exited with {self.process.returncode}:\n{self.log_tail()}")
                if time.monotonic() - begun > self.timeout:
                    raise ServerFailed(f"{self.name} was not ready in {self.timeout:.0f} s:\n{self.log_tail()}")
                time.sleep(0.005)
            self.ready_s = time.monotonic() - begun
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after ten seconds. Idempotent."""
        if self.process is not None:
            stop_process(self.process)
            self.process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def log_tail(self, n_bytes: int = 4000) -> str:
        if self._log is None:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - n_bytes))
        return bytes(self._log.read()).decode("utf-8", "replace")

    def cpu_seconds(self) -> float | None:
        """Processor time it has used so far; None where /proc does not tell."""
        return None if self.process is None else cpu_seconds(self.process.pid)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def stop_process(process: subprocess.Popen[Any], grace: float = 10.0) -> None:
    """End one process that we started, by its pid."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(port: int, path: str, host: str = HOST) -> bool:
    """Does a GET of ``path`` answer 200?"""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def cpu_seconds(pid: int) -> float | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime


def post_json(
    port: int, path: str, body: Mapping[str, Any], *, host: str = HOST, timeout: float = 600.0
) -> tuple[int, dict[str, Any]]:
    """One blocking POST for set-up work; measured requests go through clients.py. Raises OSError."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        raw = response.read()
    finally:
        connection.close()
    with contextlib.suppress(ValueError):
        parsed = json.loads(raw)
        if isinstance(parsed, dict):
            return response.status, parsed
    return response.status, {"error": {"message": raw[:200].decode("utf-8", "replace")}}


def token_counter(server: Server, *, host: str = HOST) -> tuple[bool, Any]:
    """``(exact and free, counter)``: llama-server's /tokenize, else one-token completions and their usage."""
    if server.kind == LLAMA_SERVER:

        def by_tokenize(text: str) -> int:
            status, answer = post_json(server.port, "/tokenize", {"content": text, "add_special": True}, host=host)
            if status != 200:
                raise ServerFailed(f"/tokenize answered {status}: {answer}")
            return len(answer["tokens"])

        return True, by_tokenize

    def by_usage(text: str) -> int:
        body = {"prompt": text, "max_tokens": 1, "temperature": 0}
        status, answer = post_json(server.port, "/v1/completions", body, host=host)
        if status != 200:
            raise ServerFailed(f"/v1/completions answered {status}: {answer}")
        return int(answer["usage"]["prompt_tokens"])

    return False, by_usage


class Pool:
    """The servers of one run. ``use`` starts one when it is first needed.

    With ``restart`` only one is alive at a time; else the others stay loaded and idle, and ``idle_cpu`` tells
    whether they really were (a share of one core over the time since the last ``use``).
    """

    def __init__(self, servers: Sequence[Server], *, restart: bool = False) -> None:
        self.servers = {server.name: server for server in servers}
        self._restart = restart
        self._marks: dict[str, float] = {}
        self._marked_at = 0.0

    def use(self, name: str) -> Server:
        if self._restart:
            for other in self.servers.values():
                if other.name != name:
                    other.stop()
        server = self.servers[name]
        if server.process is None:
            progress(f"starting {name}")
            server.start()
        self._marked_at = time.monotonic()
        self._marks = {
            other.name: used
            for other in self.servers.values()
            if other.name != name and (used := other.cpu_seconds()) is not None
        }
        return server

    def idle_cpu(self) -> float:
        """Share of one core that the servers not in use took since ``use``; 0 when they slept."""
        elapsed = time.monotonic() - self._marked_at
        spent = 0.0
        for name, before in self._marks.items():
            now = self.servers[name].cpu_seconds()
            spent += 0.0 if now is None else now - before
        return spent / elapsed if elapsed > 0 else 0.0

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
