"""POST /internal/models/pull: the answer, the events, sharing, leaving."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mullama.config import ServeConfig
from mullama.errors import QueueFull, StoreError
from mullama.models.parse import parse_reference
from mullama.models.sources import private_addresses
from mullama.models.sources.base import SOURCES, Fetched, FetchedFile, Job
from mullama.models.store import background_pulls
from mullama.models.store.background_pulls import Pulls
from mullama.models.store.store import Store
from mullama.web.internal import pull_routes
from mullama.web.internal.pull_routes import PullStream, Speed, Watch
from mullama.web.stream.event_stream import PING

from .conftest import Client

PATH = "/internal/models/pull"


class Controlled:
    """A source whose downloads wait for a test; ``started`` and ``go`` are set and awaited by name of the model."""

    data = b""
    started: dict[str, threading.Event]
    go: dict[str, threading.Event]
    cancelled: list[str]
    error: Exception | None = None

    def normalise(self, location: str) -> str:
        return location

    def locate(self, reference: Any) -> None:
        return None

    def obtain(self, reference: Any, job: Job) -> Fetched:
        name = reference.locations[0]
        job.progress("downloading", 0, len(self.data))
        self.started.setdefault(name, threading.Event()).set()
        go = self.go.setdefault(name, threading.Event())
        try:
            while not go.wait(0.01):
                job.progress("downloading", 10, len(self.data))
        except StoreError:
            self.cancelled.append(name)
            raise
        if self.error is not None:
            raise self.error
        path = job.folder / "m.gguf"
        path.write_bytes(self.data)
        job.progress("downloading", len(self.data), len(self.data))
        return Fetched((FetchedFile(path, f"{name}.gguf", background_hash(path)),))


def background_hash(path: Path) -> str:
    from mullama.models.store.digests import hash_file

    return hash_file(path)


@pytest.fixture(autouse=True)
def source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Callable[..., Path]
) -> Iterator[type[Controlled]]:
    """Of every test here, and before its app: nothing must reach the user's own store."""
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(private_addresses, "_allowed", None)
    monkeypatch.setattr(pull_routes, "GAP_SECONDS", 0.0)

    class Mine(Controlled):
        data = tiny_model().read_bytes()
        started = {}
        go = {}
        cancelled = []

    monkeypatch.setitem(SOURCES._builtins, "test", "nowhere:Mine")
    monkeypatch.setitem(SOURCES._loaded, "test", Mine)
    yield Mine
    for event in Mine.go.values():
        event.set()


@pytest.fixture
def store(source: type[Controlled], tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def let(source: type[Controlled], *names: str) -> None:
    """Let these downloads end."""
    for name in names:
        source.go.setdefault(name, threading.Event()).set()


def parse(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for text in body.decode().split("\n\n")[:-1]:
        if text != ": ping":
            kind, data = text.split("\n")
            found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_one_answer_when_it_is_done(client: Client, source: type[Controlled], store: Store) -> None:
    let(source, "a")
    reply = client.post(PATH, {"model": "Mine=test:a"})
    assert reply.status == 200
    entry = store.find("mine")
    assert entry is not None
    assert reply.json == {
        "name": "mine",
        "sha256": entry.sha256,
        "size": len(source.data),
        "license": None,
        "path": str(store.path_of(entry)),
        "quant": None,
        "downloaded": True,
    }
    assert client.post(PATH, {"model": "mine"}).json["downloaded"] is False


@pytest.mark.parametrize("how", [{"headers": {"Accept": "text/event-stream"}}, {"body": {"stream": True}}])
def test_events(client: Client, source: type[Controlled], how: dict[str, Any]) -> None:
    let(source, "a")
    reply = client.post(PATH, {"model": "test:a", **how.get("body", {})}, headers=how.get("headers"))
    assert (reply.status, reply.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    events = parse(reply.body)
    assert {kind for kind, _ in events[:-1]} <= {"progress"}
    assert (events[-1][0], events[-1][1]["name"]) == ("done", "test:a")
    for _, fields in events[:-1]:
        assert set(fields) == {"step", "done", "total", "bytes_per_second", "seconds_left"}


def test_the_page_lists_the_fields_of_an_event() -> None:
    from docs_support import ROOT, names

    page = ROOT / "docs" / "models.md"
    assert names(page, "Pulling over HTTP") == ["step", "done", "total", "bytes_per_second", "seconds_left"]


def test_a_stream_that_fails_says_why(client: Client, source: type[Controlled]) -> None:
    source.error = StoreError("the disk is full")
    let(source, "a")
    reply = client.post(PATH, {"model": "test:a", "stream": True})
    assert parse(reply.body)[-1] == ("error", StoreError("the disk is full").to_openai())
    assert client.post(PATH, {"model": "test:a"}).error["message"] == "the disk is full"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "./x.gguf"}, 400, "a file of the server"),
        ({"model": "file:/etc/passwd"}, 400, "a file of the server"),
        ({"model": "nosuch:thing"}, 404, "neither a file nor a model"),
        ({"model": "a b=test:a"}, 400, "cannot be the name"),
        ({"model": "smollm2:135m=test:a"}, 500, "is an alias"),
        ({"model": "http://10.0.0.1/x.gguf"}, 403, "--allow-private-sources"),
        ({"model": "test:a", "quant": "Q8 0"}, 400, "not a quantisation"),
        ({"modle": "test:a"}, 400, "modle"),
        ({}, 400, "model"),
        (b"{", 400, ""),
    ],
)
def test_what_is_refused(client: Client, source: type[Controlled], body: Any, status: int, says: str) -> None:
    reply = client.post(PATH, body)
    assert (reply.status, says in reply.error["message"]) == (status, True), reply.body


def test_it_is_a_write(client: Client, source: type[Controlled]) -> None:
    assert client.post(PATH, b"model=a", headers={"Content-Type": "application/x-www-form-urlencoded"}).status == 415
    assert client.get(PATH).status == 405


def test_it_needs_the_admin_key_where_there_is_one(
    config: ServeConfig, source: type[Controlled], request: pytest.FixtureRequest
) -> None:
    config.admin_key = "secret"
    client: Client = request.getfixturevalue("client")
    assert client.post(PATH, {"model": "test:a"}).status == 403
    let(source, "a")
    assert client.post(PATH, {"model": "test:a"}, headers={"Authorization": "Bearer secret"}).status == 200


# -- several clients


class Visitor:
    """A client of the class Watch, and what makes it leave."""

    def __init__(self, pulls: Pulls, name: str = "a", force: bool = False) -> None:
        self.gone = asyncio.Event()
        self.watch = Watch(pulls, parse_reference(f"test:{name}"), force, self._receive)

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


@asynccontextmanager
async def visits(pulls: Pulls, *names: str) -> Any:
    visitors = [Visitor(pulls, name) for name in names]
    try:
        yield visitors
    finally:
        for visitor in visitors:
            visitor.watch.close()
        await asyncio.sleep(0)
        for running in pulls.running():
            await asyncio.to_thread(running.join, 20)


def run(main: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 60))


def test_the_same_model_is_pulled_once(source: type[Controlled], store: Store) -> None:
    async def main() -> None:
        pulls = Pulls(store)
        async with visits(pulls, "a", "a", "b") as (one, two, other):
            assert one.watch.pull is two.watch.pull is not other.watch.pull
            let(source, "a", "b")
            assert await one.watch.result() == await two.watch.result() != await other.watch.result()
        assert pulls.running() == []

    run(main)


def test_one_who_leaves_does_not_end_what_another_waits_for(source: type[Controlled], store: Store) -> None:
    async def main() -> None:
        async with visits(Pulls(store), "a", "a") as (one, two):
            one.gone.set()
            with pytest.raises(Exception, match="given up"):
                await one.watch.result()
            assert not two.watch.pull.is_cancelled
            let(source, "a")
            assert (await two.watch.result()).key == "test:a"
        assert source.cancelled == []

    run(main)


def test_the_last_who_leaves_ends_it(source: type[Controlled], store: Store) -> None:
    async def main() -> None:
        async with visits(Pulls(store), "a", "a") as (one, two):
            pull = one.watch.pull
            started = source.started.setdefault("a", threading.Event())
            assert await asyncio.to_thread(started.wait, 20)
            one.gone.set()
            two.gone.set()
            await asyncio.to_thread(pull.join, 20)
            assert pull.is_finished
            assert getattr(pull.error, "code", None) == "pull_cancelled"
        assert source.cancelled == ["a"]
        assert store.list() == []

    run(main)


def test_one_who_comes_after_the_last_left_starts_anew(source: type[Controlled], store: Store) -> None:
    async def main() -> None:
        pulls = Pulls(store)
        async with visits(pulls, "a") as (one,):
            one.watch.close()
            async with visits(pulls, "a") as (two,):
                assert two.watch.pull is not one.watch.pull
                let(source, "a")
                assert (await two.watch.result()).key == "test:a"

    run(main)


def test_too_many_at_once(source: type[Controlled], store: Store) -> None:
    async def main() -> None:
        pulls = Pulls(store)
        async with visits(pulls, *(str(number) for number in range(background_pulls.MAX_PULLS))) as visitors:
            with pytest.raises(QueueFull, match="pulls are running"):
                Visitor(pulls, "more")
            Visitor(pulls, "0").watch.close()  # one that runs can be joined
            let(source, *(str(number) for number in range(background_pulls.MAX_PULLS)))
            for visitor in visitors:
                await visitor.watch.result()

    run(main)


def test_a_silent_stream_is_pinged_and_a_shutdown_ends_it(
    source: type[Controlled], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = threading.Event()

    def obtain(self: Controlled, reference: Any, job: Job) -> Fetched:
        self.started.setdefault("a", threading.Event()).set()
        silent.wait(30)
        raise StoreError("late")

    monkeypatch.setattr(source, "obtain", obtain)

    async def main() -> None:
        async with visits(Pulls(store), "a") as (one,):
            stream = PullStream(one.watch, 0.01)
            assert await anext(stream) == PING
            one.watch.end()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            await stream.close()
            silent.set()

    run(main)


def test_speed() -> None:
    speed = Speed()
    assert speed.of("downloading", 0, 10.0) is None
    assert speed.of("downloading", 1000, 11.0) == 1000
    assert speed.of("downloading", 3000, 12.0) == pytest.approx(1300)
    assert speed.of("verifying", 0, 13.0) is None
