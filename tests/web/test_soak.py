"""Random requests of every API, many at once, whose clients leave when they like: afterwards nothing is left of them.

A real server on a Unix socket, with a fake engine and limited keys. 2,000 requests; 100,000 with ``MULLAMA_LONG=1``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mutating import MESSAGES, mutant

from mullama.config import ServeConfig
from mullama.engine.requests.generation import AsyncGeneration
from mullama.serving.manager import ModelManager
from mullama.web.keys.rate_limits import Permit, Reservation
from mullama.web.server import Server, bind
from mullama.web.services import Services
from mullama.web.stream.event_stream import EventStream
from mullama.web.stream.generations import Group

from .test_mutated import Whole

LONG = bool(os.environ.get("MULLAMA_LONG"))
COUNT = 100_000 if LONG else 2000
SEED = int(os.environ.get("MULLAMA_SEED", "1"))
AT_ONCE = 32
THINKS_S = 0.15  # between two requests of a client: the server is busy, and not behind
#: Objects of a request: none outlives it.
OF_A_REQUEST = (Group, EventStream, AsyncGeneration, Permit, Reservation)
KEYS = """
[[key]]
name = "free"
key = "free-key"
[[key]]
name = "limited"
key = "limited-key"
concurrent = 6
requests_per_minute = 100000
tokens_per_minute = 1000000
[[key]]
name = "root"
key = "root-key"
role = "admin"
"""
OLLAMA = {"model": "fake", "options": {"num_predict": 3}}
#: (path, body): what a program sends that uses a model.
USUAL: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 3}),
    ("/v1/completions", {"prompt": "Hello", "echo": True}),
    ("/v1/completions", {"prompt": [[5, 6], [7]]}),
    ("/v1/messages", {"messages": [MESSAGES[1]], "max_tokens": 9}),
    ("/v1/responses", {"input": "Hello", "store": False}),
    ("/api/chat", {**OLLAMA, "messages": MESSAGES}),
    ("/api/generate", {**OLLAMA, "prompt": "a"}),
]


class Forgetful(Whole):
    """Remembers little of what was asked of it, and is loaded again as what it was."""

    def __init__(self) -> None:
        super().__init__()
        for notes in ("requests", "generations", "prepared", "kv_calls", "scheduler_calls"):
            setattr(self, notes, deque(maxlen=16))
        self.delay = self.first_delay = 0.001

    def forget(self) -> None:
        for notes in (self.requests, self.generations):
            notes.clear()

    def close(self) -> None:
        pass


class World:
    """The server in its thread, with a task on its loop that notes for how long it was held up."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "s"
        keys = folder / "keys.toml"
        keys.write_text(KEYS)
        keys.chmod(0o600)
        config = ServeConfig(host=f"unix:{self.path}", key_file=str(keys), max_body_bytes=1 << 20)
        self.engine = Forgetful()
        self.models = ModelManager([("fake", self.engine)], load=lambda *_: self.engine)  # type: ignore[list-item, arg-type, return-value]
        self.services = Services(config, self.models)
        sock = bind(config)
        self.server = Server(config, self.services, sock)
        self.held: list[float] = []  # seconds
        self._sock = sock
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": sock.all})
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)
        assert self.server._loop is not None
        self.loop = self.server._loop
        asyncio.run_coroutine_threadsafe(self._watch(), self.loop)

    async def _watch(self) -> None:
        """Counted is what the loop's own thread computed: what a loaded machine keeps from it says nothing of it."""
        every = 0.005
        while True:
            due, ran = time.monotonic() + every, time.thread_time()
            await asyncio.sleep(every)
            self.held.append(max(min(time.monotonic() - due, time.thread_time() - ran), 0.0))

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._sock.close()
        self.services.close()

    def ask(self, look: Callable[[], Any]) -> Any:
        """``look`` on the server's loop."""

        async def run() -> Any:
            return look()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)

    def busy(self) -> dict[str, int]:
        """What is held for requests that have not ended."""
        security, workers = self.services.security, self.services.workers
        assert security is not None
        resident = self.models.get("fake").resident
        return {
            "open": self.services.n_open,
            "running": len(self.engine.running),
            "leases": 0 if resident is None else resident.n_leases,
            "permits": sum(key.usage.n_open for key in security._ring.holders()),
            "background": len(self.services._tasks),
            "errands": len(workers._errands) + workers._running.total() + len(workers._waiting),
            "connections": len(self.server.server_state.connections),
            "answers": len(self.server.server_state.tasks),
        }

    def left(self) -> dict[str, int]:
        """What there is once all is quiet."""
        end = time.monotonic() + 20
        while any(self.ask(self.busy).values()) and time.monotonic() < end:
            time.sleep(0.02)
        assert self.ask(self.busy) == dict.fromkeys(self.ask(self.busy), 0)

        def look() -> dict[str, int]:
            self.engine.forget()
            gc.collect()
            alive = Counter(type(one).__name__ for one in gc.get_objects() if isinstance(one, OF_A_REQUEST))
            assert not alive, alive
            return {
                "tasks": len(asyncio.all_tasks()),
                "descriptors": len(list(Path("/proc/self/fd").iterdir())),
                "threads": threading.active_count(),
                "objects": len(gc.get_objects()),
                "resident": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            }

        found: dict[str, int] = self.ask(look)
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    logging.disable(logging.WARNING)  # pytest keeps every line
    world = World(tmp_path)
    yield world
    world.close()
    logging.disable(logging.NOTSET)


def request_of(rng: random.Random) -> tuple[bytes, bool]:
    """The bytes of a request, and whether its answer has an end."""
    key, query = rng.choice(["free-key", "limited-key"]), ""
    if rng.random() < 0.03:
        key = "wrong"
    if rng.random() < 0.7:
        path, body = rng.choice(USUAL)
        method, data = "POST", json.dumps({**body, "stream": rng.random() < 0.6}).encode()
    else:
        one = mutant(rng, "fake")
        key = "root-key" if "internal" in one.path else key
        method, path, query, data = one.method, one.path, one.query, one.body or b""
    path = "".join(c if 33 <= ord(c) < 127 else "%3F" for c in path)
    head = (
        f"{method} {path}?{query} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    )
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data, "events" not in path


async def one_request(path: Path, rng: random.Random, statuses: Counter[str]) -> None:
    """Ask, and read the answer to its end or leave before: while the request is sent, or at any time after it."""
    data, has_end = request_of(rng)
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        leaves = rng.random() < 0.5 or not has_end
        if leaves and rng.random() < 0.1:
            writer.write(data[: rng.randrange(len(data))])
            statuses["cut"] += 1
            return
        writer.write(data)
        if leaves:
            with_answer = await wait_for(reader.read(64), rng.expovariate(1 / 0.003))
            statuses["left with a piece" if with_answer else "left with nothing"] += 1
            return
        answer = await asyncio.wait_for(reader.read(), 30)
        statuses[answer[9:12].decode()] += 1
        assert not answer.startswith(b"HTTP/1.1 5") or answer[9:12] in (b"501", b"503"), (data[:500], answer[:1000])
    finally:
        writer.transport.abort()


async def wait_for(what: Awaitable[bytes], seconds: float) -> bytes:
    try:
        return await asyncio.wait_for(what, seconds)
    except (TimeoutError, ConnectionError):
        return b""


async def many(path: Path, count: int, seed: int, statuses: Counter[str]) -> None:
    async def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        for _ in range(count // AT_ONCE):
            await asyncio.sleep(rng.expovariate(1 / THINKS_S))
            await one_request(path, rng, statuses)

    await asyncio.gather(*map(client, range(AT_ONCE)))


@pytest.mark.timeout(3000 if LONG else 300)
def test_nothing_is_left_of_many_requests(world: World) -> None:
    statuses: Counter[str] = Counter()
    asyncio.run(many(world.path, COUNT // 4, SEED, statuses))
    before = world.left()
    world.held.clear()
    rounds = 3
    for number in range(rounds):
        asyncio.run(many(world.path, COUNT // 4, SEED + 1 + number, statuses))
    held = sorted(world.held)
    after = world.left()
    p99 = held[int(0.99 * (len(held) - 1))] * 1e3
    print(f"{sum(statuses.values())} requests: {dict(statuses.most_common())}")
    print(f"before {before}\nafter  {after}")
    print(f"{len(held)} looks at the event loop, held up: p99 {p99:.2f} ms, worst {held[-1] * 1e3:.1f} ms")
    assert {"200", "400", "401", "left with a piece", "left with nothing", "cut"} <= statuses.keys()
    for what in ("tasks", "descriptors"):
        assert after[what] == before[what], what
    assert after["threads"] <= before["threads"] + 2  # of pools, which keep them
    assert after["objects"] - before["objects"] <= 3000
    assert after["resident"] - before["resident"] <= 48 << 20
    assert p99 <= (5 if LONG else 10)
