"""Work on long texts: it ends when nobody waits for it, and one client does not take all threads (web/work.py)."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mullama.errors import ClientLeft, ShuttingDown
from mullama.web.services import Services
from mullama.web.work import PER_CLIENT, THREADS, Errand, Workers

from .conftest import Client
from .fake_engine import FakeEngine

TIMEOUT = 30


def play(test: Callable[[Workers], Coroutine[Any, Any, None]]) -> None:
    workers = Workers()

    async def limited() -> None:
        await asyncio.wait_for(test(workers), TIMEOUT)

    try:
        asyncio.run(limited())
    finally:
        workers.close()


class Leaves:
    """A client's ``receive``: it reports that the client leaves once ``now`` was called."""

    def __init__(self) -> None:
        self._left = asyncio.Event()

    async def __call__(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    def now(self) -> None:
        self._left.set()


class Task:
    """Work that goes on until its checkpoint ends it; ``started`` and ``ended`` say where it is."""

    def __init__(self, errand: Errand) -> None:
        self._errand = errand
        self.started, self.ended = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.started.set()
        try:
            while True:
                self._errand.checkpoint()
                time.sleep(0.001)
        finally:
            self.ended.set()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_work_for_a_client_that_left_ends() -> None:
    async def test(workers: Workers) -> None:
        receive = Leaves()
        errand = Errand(workers, "a", receive, lambda: False)
        task = Task(errand)
        waiting = asyncio.ensure_future(errand.run(True, task))
        await until(task.started.is_set)
        receive.now()
        with pytest.raises(ClientLeft):
            await waiting
        await until(task.ended.is_set)
        await until(lambda: not workers._running)

    play(test)


def test_work_for_a_server_that_ends_ends_and_nothing_new_begins() -> None:
    async def test(workers: Workers) -> None:
        errands = [Errand(workers, client, Leaves(), lambda: False) for client in "aaabc"]
        tasks = [Task(errand) for errand in errands]
        waiting = [asyncio.ensure_future(errand.run(True, task)) for errand, task in zip(errands, tasks, strict=True)]
        await until(lambda: sum(task.started.is_set() for task in tasks) == 4)
        workers.end()
        for one in waiting:
            with pytest.raises(ShuttingDown):
                await one
        await until(lambda: sum(task.ended.is_set() for task in tasks) == 4)
        with pytest.raises(ShuttingDown):
            await Errand(workers, "d", None, lambda: False).run(True, lambda: 1)
        assert not tasks[2].started.is_set(), "whoever waited for a thread never gets one"

    play(test)


def test_no_client_takes_the_threads_of_others() -> None:
    async def test(workers: Workers) -> None:
        greedy = [Errand(workers, "greedy", Leaves(), lambda: False) for _ in range(20)]
        tasks = [Task(errand) for errand in greedy]
        waiting = [asyncio.ensure_future(errand.run(True, task)) for errand, task in zip(greedy, tasks, strict=True)]
        await until(lambda: sum(task.started.is_set() for task in tasks) == PER_CLIENT)
        for other in range(3 * THREADS):
            assert await Errand(workers, other, Leaves(), lambda: False).run(True, lambda: 7) == 7
        assert sum(task.started.is_set() for task in tasks) == PER_CLIENT
        for errand in greedy:
            errand.end()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until(lambda: not workers._running and not workers._waiting)

    play(test)


def test_whoever_has_no_thread_is_served_before_one_who_has_some() -> None:
    async def test(workers: Workers) -> None:
        small = Workers(threads=2, per_client=2)
        gates = [threading.Event() for _ in range(5)]
        order: list[str] = []

        def work(name: str, gate: threading.Event) -> Callable[[], None]:
            def run() -> None:
                order.append(name)
                assert gate.wait(TIMEOUT)

            return run

        names = ["a", "a", "a", "a", "b"]
        waiting = [
            asyncio.ensure_future(Errand(small, name, None, lambda: False).run(True, work(name, gate)))
            for name, gate in zip(names, gates, strict=True)
        ]
        await until(lambda: len(order) == 2)
        gates[0].set()
        await until(lambda: len(order) == 3)
        assert order == ["a", "a", "b"], "though two of a's have waited longer"
        for gate in gates:
            gate.set()
        await asyncio.gather(*waiting)
        small.close()

    play(test)


def test_a_thread_is_its_client_s_until_its_work_has_really_ended() -> None:
    async def test(workers: Workers) -> None:
        gate = threading.Event()
        for _ in range(PER_CLIENT):
            receive = Leaves()
            waiting = asyncio.ensure_future(
                Errand(workers, "a", receive, lambda: False).run(True, lambda: gate.wait(TIMEOUT))
            )
            await asyncio.sleep(0.01)
            receive.now()
            with pytest.raises(ClientLeft):
                await waiting
        late = asyncio.ensure_future(Errand(workers, "a", None, lambda: False).run(True, lambda: 1))
        assert await Errand(workers, "b", None, lambda: False).run(True, lambda: 2) == 2
        assert not late.done(), "native code cannot be stopped: it still has the threads"
        gate.set()
        assert await late == 1

    play(test)


def test_small_work_is_done_here_and_exits_do_not_end_the_loop() -> None:
    async def test(workers: Workers) -> None:
        errand = Errand(workers, "a", None, lambda: False)
        assert await errand.run(False, threading.current_thread) is threading.current_thread()
        assert (await errand.run(True, threading.current_thread)).name.startswith("mullama-web")

        def exits() -> None:
            raise SystemExit(3)

        with pytest.raises(RuntimeError, match="told to end by SystemExit"):
            await errand.run(True, exits)
        with pytest.raises(ZeroDivisionError):
            await errand.run(True, lambda: 1 / 0)
        assert await errand.run(True, lambda: 5) == 5

    play(test)


# -- what is refused changes nothing ----------------------------------------------------------------------------------

REFUSED: list[dict[str, Any]] = [
    {"lora": [{"id": "unknown"}]},
    {"prompt": "x" * 5000},
    {"prompt": [10**6]},
    {"context_policy": "nonsense"},
    {"temperature": 99},
    {"dry_multiplier": 1, "dry_sequence_breakers": [""]},
    {"context_policy": "shift"},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_refused_request_changes_no_keep_alive(
    client: Client, services: Services, path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"prompt": "x", **fields}
    if isinstance(fields["prompt"], str):
        fields["messages"] = [{"role": "user", "content": fields["prompt"]}]
    else:
        fields["messages"] = [{"role": "nobody", "content": "x"}]
    result = client.post(path, {**fields, "keep_alive": 5})
    assert result.status == 400, result.body
    assert services.models.get("fake").keep_alive_s == -1
    monkeypatch.setattr(services.models.idle, "_watch", lambda: asyncio.sleep(0))  # it would outlive this loop
    assert (
        client.post(path, {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "keep_alive": 5}).status
        == 200
    )
    assert services.models.get("fake").keep_alive_s == 5


@pytest.mark.parametrize("value", [-2.5, "soon", "5 parsecs", 1e300])
def test_a_keep_alive_that_is_none_refuses_the_request(
    client: Client, engine: FakeEngine, services: Services, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.models.idle, "_watch", lambda: asyncio.sleep(0))
    result = client.post("/v1/completions", {"prompt": "x", "keep_alive": value})
    if result.status == 200:
        assert value == -2.5, "less than nothing is for ever"
    else:
        assert (result.status, result.error["param"]) == (400, "keep_alive") and engine.requests == []
        assert services.models.get("fake").keep_alive_s == -1


# -- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_counted_and_nobody_is_warned(
    engine: FakeEngine, services: Services, client: Client, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine.hang = True

    async def go() -> None:
        import falcon.testing

        body = b'{"prompt": "x", "stream": %s}' % (b"true" if stream else b"false")
        headers = {"Host": "127.0.0.1:8080", "Content-Type": "application/json", "Content-Length": str(len(body))}
        scope = falcon.testing.create_scope(path="/v1/completions", method="POST", include_server=False)
        scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        events = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if events:
                return events.pop()
            await until(lambda: bool(engine.running))
            return {"type": "http.disconnect"}

        async def send(event: dict[str, Any]) -> None:
            pass

        await asyncio.wait_for(client.app(scope, receive, send), TIMEOUT)
        await services.settle()

    with caplog.at_level(logging.INFO):
        for _ in range(3):
            asyncio.run(go())
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
    assert "shutting down" not in caplog.text
    assert services.n_left == 3
