"""CPU time of the event-loop thread for one streamed token, without a model: ``python bench/micro_stream.py``.

The server is mullama's own (uvicorn, uvloop, Falcon, the ring's reader); only the core is a stand-in. Its wake-ups come
from another process, as often as a small model's steps, so that no Python thread competes for the GIL; each hands one
token to every stream. The client is a third process. ``--cold`` adds two that stream through memory, as compute threads
do: they take the caches away between two tokens, and the event loop preempts them.

What is counted is the thread's CPU time between two wake-ups (user and system; Linux only). It contains everything from
the wake-up to the socket, and the stand-in's own work (a few microseconds).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import random
import resource
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from mullama import abi
from mullama.config import ServeConfig
from mullama.engine.requests.generation import AsyncGeneration
from mullama.engine.requests.reader import Reader
from mullama.serving.manager import ModelManager
from mullama.types import ModelInfo, Request, SamplingParams
from mullama.web.server import Server, bind
from mullama.web.services import Services

TEXT, FINISH, LENGTH = 1, 2, 2
WORDS = (" the", " model", " of", " streams", ",", " and", "\n", ' "quoted"', " wörter", ".", " 42", "ing")
WARM_UP = 20  # tokens a stream, not counted
CHURN_BYTES = 64 << 20  # more than the last-level cache


class Ring:
    """The core's part that the reader sees: a descriptor, and a token for every stream at each wake-up."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.handles: list[int] = []
        self.expected = 0  # streams to wait for
        self.tokens = 0  # a stream's, after the warm-up
        self.result: dict[str, float] | None = None
        self._records: list[list[tuple[Any, ...]]] = []  # one list a word
        self._start: tuple[float, ...] = ()
        self._step = self._last = 0

    def wake_fd(self) -> int:
        return self.fd

    def wake_reader(self) -> None:
        os.eventfd_write(self.fd, 1)

    def begin(self, streams: int, tokens: int) -> None:
        self.result = None
        self.tokens, self.expected = tokens, streams

    def drain_records(self) -> list[tuple[Any, ...]]:
        """PERF: as little as can be on most steps; what it costs is measured with the rest."""
        os.eventfd_read(self.fd)  # nobody else reads, so it is never empty
        self._step = step = self._step + 1
        if step < self._last:
            return self._records[step % len(WORDS)]
        return self._change(step)

    def _change(self, step: int) -> list[tuple[Any, ...]]:
        """A step at which something begins or ends."""
        handles = self.handles
        if not handles or len(handles) < self.expected:
            return []
        if not self._records:
            self._records = [[(TEXT, handle, word, 1) for handle in handles] for word in WORDS]
            self._last = step + WARM_UP
            return []
        if not self._start:
            self._start = _thread_times()
            self._last = step + self.tokens
            return self._records[0]
        spent = [after - before for before, after in zip(self._start, _thread_times(), strict=True)]
        keys = ("total", "user", "system")
        self.result = {key: s * 1e6 / (self.tokens * len(handles)) for key, s in zip(keys, spent, strict=True)}
        self._forget()
        row = bytes(abi.Row())
        return [(FINISH, handle, LENGTH, -1, 0, row) for handle in handles]

    def _forget(self) -> None:
        self.handles, self._records, self._start = [], [], ()
        self._step = self._last = 0

    def cancel(self, handle: int) -> None:
        raise RuntimeError("a stream broke off")


def _thread_times() -> tuple[float, float, float]:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return time.thread_time(), usage.ru_utime, usage.ru_stime


class StandIn:
    """An ``EngineClient`` around the ring, as far as a stream asks for one."""

    def __init__(self, ring: Ring) -> None:
        self.info = ModelInfo(
            name="stand-in", path="", description="", architecture="", n_params=0, size_bytes=0, n_vocab=1000,
            n_ctx_train=1 << 20, n_ctx=1 << 20, n_parallel=64, n_layer=1, n_embd=1, n_swa=0, has_chat_template=False,
            is_recurrent=False, is_hybrid=False, created=0,
        )  # fmt: skip
        self.death = None
        self.ring = ring
        self.reader = Reader(ring, TEXT)  # type: ignore[arg-type]
        self._handles = itertools.count(1)

    def is_ready(self) -> bool:
        return True

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return [1]

    def render_chat(self, messages_json: bytes, *, add_generation_prompt: bool = True) -> str:
        return ""

    def prompt_tokens(self, text: str, **_: Any) -> list[int]:
        return [1]

    def prepare(self, sampling: SamplingParams) -> Any:
        return sampling

    def submit(self, request: Request) -> AsyncGeneration:
        loop = asyncio.get_running_loop()
        self.reader.attach_loop(loop)
        generation = AsyncGeneration(request.id, next(self._handles), self.ring.cancel, loop)
        self.reader.add(generation, ())
        self.ring.handles.append(generation.handle)
        return generation

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109
        return True

    def close(self) -> None:
        self.reader.close()


# -- the other processes


def tick(fd: int, period: float) -> None:
    """Wake the reader, a little irregularly: the system's clock ticks must not fall into step."""
    moment = time.monotonic()
    while True:
        moment += period * random.uniform(0.9, 1.1)
        time.sleep(max(0.0, moment - time.monotonic()))
        os.eventfd_write(fd, 1)


def churn() -> None:
    """Stream through memory for ever, in place of a compute thread."""
    source, target = ctypes.create_string_buffer(CHURN_BYTES), ctypes.create_string_buffer(CHURN_BYTES)
    while True:
        ctypes.memmove(target, source, CHURN_BYTES)


def read_streams(port: int, streams: int) -> int:
    """Ask for chats at once and read them to their ends; returns the number of events with text."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    received = [bytearray() for _ in range(streams)]
    with selectors.DefaultSelector() as selector:
        for index in range(streams):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(head + body)
            selector.register(sock, selectors.EVENT_READ, received[index])
        while selector.get_map():
            for key, _ in selector.select():
                sock = key.fileobj  # type: ignore[assignment]
                data = sock.recv(1 << 16)
                key.data.extend(data)
                if not data or key.data.endswith(b"0\r\n\r\n"):
                    selector.unregister(sock)
                    sock.close()
    if any(b"data: [DONE]" not in data for data in received):
        raise RuntimeError("a stream broke off")
    return sum(data.count(b'"finish_reason":null') - 1 for data in received)  # less the one with the role


@contextlib.contextmanager
def companion(*args: str, fds: Sequence[int] = ()) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, __file__, *args], pass_fds=fds)
    try:
        yield
    finally:
        process.kill()
        process.wait()


# -- the measurement


@contextlib.contextmanager
def serving(engine: StandIn, *, ordinary: bool) -> Iterator[int]:
    """The port of a server in a thread."""
    config = ServeConfig(port=0)
    sock = bind(config)
    services = Services(config, ModelManager([("stand-in", engine)]))  # type: ignore[list-item]
    server = Server(config, services, sock)
    if ordinary:
        app: Any = server.config.app

        async def plain(scope: Any, receive: Any, send: Any) -> None:
            scope.pop("extensions", None)
            await app(scope, receive, send)

        server.config.app = plain
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        services.close()


def measure(ring: Ring, port: int, streams: int, tokens: int) -> dict[str, float]:
    """One round: microseconds of CPU a token, and events a token (1 when none was merged)."""
    ring.begin(streams, tokens)
    command = [sys.executable, __file__, "--as", "client", str(port), str(streams)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    if ring.result is None:
        raise RuntimeError("the streams ended before they were measured")
    return ring.result | {"events": int(done.stdout) / (streams * (WARM_UP + tokens - 1))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="CPU time of the event loop for one streamed token.")
    parser.add_argument("--streams", default="1,8", help="numbers of streams at once")
    parser.add_argument("--tokens", type=int, default=300, help="tokens a stream and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--period-ms", type=float, default=7.0, help="time between two steps")
    parser.add_argument("--cold", action="store_true", help="beside two processes that stream through memory")
    parser.add_argument("--ordinary", action="store_true", help="every chunk through ASGI, as another server would")
    args = parser.parse_args(argv)
    print("| streams | µs/token | user | system | events/token |\n|---|---|---|---|---|")
    ring = Ring()
    engine = StandIn(ring)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(serving(engine, ordinary=args.ordinary))
        stack.enter_context(companion("--as", "ticker", str(ring.fd), str(args.period_ms / 1000), fds=[ring.fd]))
        for _ in range(2 if args.cold else 0):
            stack.enter_context(companion("--as", "churner"))
        for streams in map(int, args.streams.split(",")):
            rounds = [measure(ring, port, streams, args.tokens) for _ in range(args.rounds)]
            row = {key: value["median"] for key, value in common.median_by_key(rounds).items()}
            spread = common.summarize([one["total"] for one in rounds])["iqr"] / 2
            print(f"| {streams} | {row['total']:.1f} ± {spread:.1f} | {row['user']:.1f} | {row['system']:.1f} "
                  f"| {row['events']:.3f} |", flush=True)  # fmt: skip
    engine.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--as", "ticker", fd, period]:
            tick(int(fd), float(period))
        case ["--as", "churner"]:
            churn()
        case ["--as", "client", port, streams]:
            print(read_streams(int(port), int(streams)))
        case _:
            main()
