"""Fixtures: a fake engine, Falcon's test client, and a real server on a loopback port."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import falcon.testing
import pytest
import uvicorn.server

from mullama.config import ServeConfig
from mullama.serving.manager import ModelManager
from mullama.web.app import App, create_app
from mullama.web.server import Server, bind
from mullama.web.services import Services

from .fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    return ServeConfig(max_body_bytes=1 << 20, files_dir=str(tmp_path / "files"))


@pytest.fixture
def services(engine: FakeEngine, config: ServeConfig) -> Iterator[Services]:
    services = Services(config, ModelManager([("fake", engine), ("other", FakeEngine("other"))]))
    yield services
    services.close()


class Client:
    """Calls the app on an event loop of its own, one request a call.

    Not Falcon's TestClient: that one reports a disconnect right after every request, and here a disconnect cancels.
    """

    def __init__(self, app: App, services: Services) -> None:
        self.app = app
        self._services = services

    def get(self, path: str, *, headers: dict[str, str] | None = None, query: str = "") -> Result:
        return self.request("GET", path, b"", headers or {}, query)

    def post(self, path: str, body: object = None, *, headers: dict[str, str] | None = None, query: str = "") -> Result:
        """``body`` is bytes as they are, or anything that becomes JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})}, query)

    def request(self, method: str, path: str, data: bytes, headers: dict[str, str], query: str = "") -> Result:
        headers = {"Host": "127.0.0.1:8080", "Content-Length": str(len(data)), **headers}
        headers = {name: value for name, value in headers.items() if value}
        scope = falcon.testing.create_scope(
            path=path, method=method, headers=headers, query_string=query, include_server=False
        )
        scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        return asyncio.run(self._call(scope, data))

    async def _call(self, scope: dict[str, Any], data: bytes) -> Result:
        events: list[dict[str, Any]] = [{"type": "http.request", "body": data, "more_body": False}]
        ended = asyncio.Event()
        collector = falcon.testing.ASGIResponseEventCollector()

        async def receive() -> dict[str, Any]:
            if events:
                return events.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(event: dict[str, Any]) -> None:
            await collector(event)
            if event["type"] == "http.response.body" and not event.get("more_body"):
                ended.set()

        await self.app(scope, receive, send)
        await self._services.settle()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.sleep(0)
        assert [task for task in left if not task.done()] == [], "a request left a task behind"
        status = collector.status
        assert isinstance(status, int)
        return Result(status, dict(collector.headers), b"".join(collector.body_chunks))


@dataclass
class Result:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, after a check of its shape."""
        assert set(self.json) == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The payloads of a stream, checked to be well-formed; ``[DONE]`` stays a string, comments are left out."""
        assert self.headers["content-type"].startswith("text/event-stream")
        return parse_events(self.body)


def parse_events(body: bytes) -> list[Any]:
    payloads: list[Any] = []
    assert body.endswith(b"\n\n")
    for event in body.decode().split("\n\n")[:-1]:
        while event.startswith(":"):
            event = event.partition("\n")[2]
        assert "\n" not in event
        assert event.startswith("data: ")
        data = event.removeprefix("data: ")
        payloads.append(data if data == "[DONE]" else json.loads(data))
    return payloads


@pytest.fixture
def client(config: ServeConfig, services: Services) -> Client:
    return Client(create_app(config, services.models, services), services)


@dataclass
class Live:
    """A server in a thread, with its own event loop."""

    port: int
    server: Server
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def without_extensions(app: Any) -> Any:
    async def plain(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scope.pop("extensions", None)
        await app(scope, receive, send)

    return plain


class Hurried:
    """uvicorn's asyncio: it looks ten times a second whether it should end, and waits as long for last bytes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 10)


@pytest.fixture
def live(engine: FakeEngine, config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Live]]:
    """Call it (after changing ``engine`` or ``config``) to start the server. Without ``direct`` every chunk goes
    through ASGI, as it does with another server."""
    started: list[tuple[Live, Services]] = []
    monkeypatch.setattr(uvicorn.server, "asyncio", Hurried())

    def start(*, ping_seconds: float = 15.0, direct: bool = True, models: ModelManager | None = None) -> Live:
        config.port = 0
        sock = bind(config)
        services = Services(config, models or ModelManager([("fake", engine)]), ping_seconds=ping_seconds)
        server = Server(config, services, sock)
        if not direct:
            server.config.app = without_extensions(server.config.app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        running = Live(sock.getsockname()[1], server, thread)
        thread.start()
        started.append((running, services))
        while not server.started:
            time.sleep(0.005)
        return running

    yield start
    for running, services in started:
        running.server.should_exit = running.server.force_exit = True
        running.thread.join(10)
        assert not running.thread.is_alive()
        services.close()
