"""A real ``mullama serve`` process, and what the tests say to it: plain HTTP, raw sockets, its /internal views."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import openai

NAME = "smollm2:135m"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
READY_SECONDS = 90.0  # of a loaded machine
STOP_SECONDS = 60.0

#: Every field an answer's profile has at least.
PROFILE_FIELDS = frozenset(
    (
        *("prompt_tokens", "completion_tokens", "kv_cache_hit", "kv_cache_miss", "kv_cache_evict"),
        *("time_to_first_token_ms", "total_ms", "queue_ms", "prefill_ms", "decode_ms", "sample_ms"),
        *("steps", "mean_batch_size"),
    )
)


def clean_env(**extra: str) -> dict[str, str]:
    """The environment without options of ours, so that a test says all that counts.

    The store stays; what else is in it is not served.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MULLAMA_") or k == "MULLAMA_HOME"}
    # PYTHONSAFEPATH: the checkout's own mullama folder, where tests may be started, has no compiled modules.
    ours = {"NO_COLOR": "1", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", "MULLAMA_STORE_MODELS": "0"}
    return {**kept, **ours, **extra}


def mullama(*args: str) -> list[str]:
    """The command line of the program under test."""
    return [sys.executable, "-m", "mullama", *args]


def run_mullama(*args: str, stdin: bytes | None = None, timeout: float = 60.0, **env: str) -> Any:
    """A command that ends by itself. With ``stdin`` None there is nothing to read."""
    given: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        mullama(*args), capture_output=True, timeout=timeout, env=clean_env(**env), check=False, **given
    )


def wait_until(condition: Callable[[], Any], seconds: float = 30.0, pause: float = 0.01) -> Any:
    """The first true value of ``condition``; a limit for a loaded machine, not a measure of speed."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"it did not happen within {seconds} s"
        time.sleep(pause)


class ServerProcess:
    """One ``mullama serve`` on a free port. ``with`` waits until it is ready and ends it by SIGTERM, exit code 0."""

    def __init__(self, folder: Path, args: Sequence[str], program: Sequence[str] = (), **env: str) -> None:
        """``program``: another command line in the place of ``mullama``."""
        self.page_dir = folder / "pages"
        self.stderr_file = folder / "stderr.txt"
        folder.mkdir(parents=True, exist_ok=True)
        folders = ["--page-dir", str(self.page_dir), "--files-dir", str(folder / "files")]
        with self.stderr_file.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*(program or mullama()), "serve", "--port", "0", *folders, *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=clean_env(**env),
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._drain = threading.Thread(target=self._read_stdout, daemon=True)
        self._drain.start()
        self.port = 0

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.decode())
        self._lines.put("")

    def wait_ready(self) -> Self:
        """Read the ready line, which says the port. Fails with what the process said instead."""
        try:
            line = self._lines.get(timeout=READY_SECONDS)
        except queue.Empty:
            line = "(nothing)"
        assert line.startswith("mullama ready on http://127.0.0.1:"), f"{line!r}, stderr: {self.stderr}"
        self.port = int(line.rsplit(":", 1)[1])
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text(errors="replace")

    def __enter__(self) -> Self:
        try:
            return self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, *exc: object) -> None:
        try:
            assert self.process.poll() is None, f"the server ended by itself: {self.stderr}"
            assert self.terminate() == 0, self.stderr
            assert "Traceback" not in self.stderr, self.stderr
            assert list(self.page_dir.glob("*.page")) == [], "a page outlived its server"
        finally:
            self.kill()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        return self.process.wait(seconds)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.signal()
        return self.wait()

    def kill(self) -> None:
        """For teardown after a failure: nothing of ours keeps running."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_SECONDS)
        self._drain.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()

    # -- plain HTTP ---------------------------------------------------------------------------------------------

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        """``body`` is bytes as they are, or anything that becomes JSON."""
        headers = {"Content-Type": "application/json", **kwargs.pop("headers", {})}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=content, headers=headers, timeout=120, **kwargs)

    def complete(self, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
        """A greedy completion with its profile; asserts that it succeeds."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 16, **fields}
        reply = self.post(COMPLETIONS, body, headers={"X-Profile": "true"})
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def chat(self, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
        """A greedy chat answer with its profile; asserts that it succeeds."""
        body = {"messages": messages, "temperature": 0, "max_tokens": 16, **fields}
        reply = self.post(CHAT, body, headers={"X-Profile": "true"})
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def sdk(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 120, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    # -- what it shows of itself ---------------------------------------------------------------------------------

    def scheduler(self, headers: dict[str, str] | None = None) -> dict[str, Any]:
        view: dict[str, Any] = self.get("/internal/scheduler", headers=headers).raise_for_status().json()
        return view

    def kv(self) -> dict[str, Any]:
        view: dict[str, Any] = self.get("/internal/kv").raise_for_status().json()
        return view

    def drop_kv(self) -> int:
        """Drop the retained prefixes; the number of cells freed."""
        freed: int = self.post("/internal/kv/drop", {}).raise_for_status().json()["cells_freed"]
        return freed

    def busy(self) -> int:
        """Requests that wait or run."""
        view = self.scheduler()
        return len(view["running"]) + len(view["waiting"])

    def wait_idle(self, seconds: float = 30.0) -> None:
        """Until nothing waits or runs. A cancelled request must get here, a finished one is here already."""
        wait_until(lambda: self.busy() == 0, seconds)

    def assert_serving(self) -> None:
        """It answers as if nothing had happened, and no request was left behind."""
        assert self.process.poll() is None, self.stderr
        answer = self.complete("One, two, three,", max_tokens=3)
        assert answer["usage"]["completion_tokens"] == 3
        self.wait_idle()

    def assert_kv_sound(self) -> dict[str, Any]:
        """The cells of an idle server: all of them belong to listed retained prefixes, and the audit is clean."""
        view = self.kv()
        assert view["audit"] == []
        assert view["cells_running"] == 0
        assert view["cells_used"] == view["cells_retained"] == sum(row["cells"] for row in view["slots"])
        assert view["cells_used"] + view["cells_free"] == view["cells_total"]
        return view


class Raw:
    """One connection, written and read by hand."""

    def __init__(self, port: int, timeout: float = 60.0) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.file = self.sock.makefile("rb")

    def send(self, path: str, body: Any, *, headers: str = "") -> None:
        self.sock.sendall(request_bytes(path, body, headers=headers))

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next response; (0, {}) when the connection was closed instead."""
        line = self.file.readline()
        if not line:
            return 0, {}
        headers = {}
        while field := self.file.readline().strip():
            name, _, value = field.decode().partition(":")
            headers[name.lower()] = value.strip()
        return int(line.split()[1]), headers

    def chunk(self) -> bytes:
        """The next piece of a chunked body; empty at its end."""
        line = self.file.readline()
        size = int(line, 16)
        data = self.file.read(size)
        self.file.readline()
        return data

    def rest(self) -> bytes:
        """The chunks that are left."""
        return b"".join(iter(self.chunk, b""))

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@contextlib.contextmanager
def connect(server: ServerProcess) -> Iterator[Raw]:
    raw = Raw(server.port)
    try:
        yield raw
    finally:
        raw.close()


def request_bytes(path: str, body: Any, *, headers: str = "") -> bytes:
    """A whole POST request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def events_of(body: bytes) -> list[Any]:
    """The payloads of an event stream; ``[DONE]`` stays a string, comments are left out."""
    payloads: list[Any] = []
    for event in body.decode().split("\n\n"):
        if event.startswith("data: "):
            data = event.removeprefix("data: ")
            payloads.append(data if data == "[DONE]" else json.loads(data))
    return payloads


def text_of(events: Sequence[Any], index: int = 0) -> str:
    """The text of one choice of a stream, chat or completion."""
    parts = []
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) and "choices" in event else ():
            if choice["index"] == index:
                parts.append(choice["text"] if "text" in choice else choice["delta"].get("content") or "")
    return "".join(parts)


def long_request(**fields: Any) -> dict[str, Any]:
    """A streamed completion that only its end of context ends: it runs until somebody stops it."""
    return {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True, "stream": True, **fields}
