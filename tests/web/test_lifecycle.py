"""Loading on demand, unloading, pins, swaps and their history over HTTP, with fake engines."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mullama.config import ServeConfig
from mullama.engine.client import EngineClient
from mullama.errors import (
    ClientLeft,
    InvalidRequest,
    MemoryTooSmall,
    ModelLoadError,
    NeedsAnotherEngine,
    ReferenceNotFound,
)
from mullama.serving.hot_swap import Swaps
from mullama.serving.manager import ModelManager
from mullama.serving.states import ModelState
from mullama.serving.targets import Target
from mullama.web.app import create_app
from mullama.web.services import Services

from .conftest import Client
from .fake_engine import FakeEngine, FakeWeights

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
NAME = "hf:owner/repo:q4"


class Weights(FakeWeights):
    def sleep(self, level: str) -> Any:
        if level == "disk":
            raise InvalidRequest("there is no disk tier", param="level")
        return SimpleNamespace(level=level, tokens=3, host_bytes=5, disk_bytes=0, sleep_ms=1.0)

    def wake(self) -> float:
        return 1.0

    def swap(
        self,
        path: Path,
        *,
        label: str = "",
        kv: str = "auto",
        gap: str = "auto",
        memory_left: Any = None,
        kl: bool = False,
        on_phase: Any = None,
    ) -> Any:
        on_phase("copying")

        class Report:
            def to_dict(self) -> dict[str, Any]:
                return {"kv": "carry", "pause_ms": 1.0, "weights_to": label, "kl": 0.01 if kl else None}

        return Report()


class Engine(FakeEngine):
    def __init__(self, name: str = "fake") -> None:
        super().__init__(name)
        self.weights = Weights(self)

    def counters(self) -> dict[str, int]:
        return {"busy_ns": 2_000_000_000, "sampled_tokens": 100, "running": 1, "waiting": 2, "cells_used": 7}


class World:
    def __init__(self, config: ServeConfig) -> None:
        self.error: Exception | None = None
        self.loads: list[str] = []
        self.models = ModelManager(
            [("fake", cast(EngineClient, Engine()))], load=self.load, others=lambda: [("stored", "stored")]
        )
        self.models.add(NAME, "ref")
        self.may_read: list[bool] = []
        self.services = Services(config, self.models, Swaps(self.models, self.find, lambda *_: None))  # type: ignore[arg-type]
        self.client = Client(create_app(config, self.models, self.services), self.services)

    def load(self, name: str, reference: str, progress: Any) -> EngineClient:
        self.loads.append(name)
        if self.error:
            raise self.error
        return cast(EngineClient, Engine(name))

    def find(self, to: str, reference: str, progress: Any, may_read_files: bool) -> Target:
        self.may_read.append(may_read_files)
        if self.error:
            raise self.error
        progress("fetching", 1, 2)
        return Target(Path("x.gguf"), to, to)


@pytest.fixture
def world(config: ServeConfig) -> Iterator[World]:
    world = World(config)
    yield world
    world.services.close()


def test_the_table(world: World) -> None:
    found = world.client.get("/internal/models").json
    assert set(found) == {"models", "max_models", "memory_budget", "clients_left"}
    loaded, other = found["models"]
    assert loaded.items() >= {"name": "fake", "state": "ready", "tokens_per_second": 50.0, "kv_tokens": 7}.items()
    assert other.items() >= {"name": NAME, "state": "unloaded", "idle_s": None, "keep_alive_s": None}.items()
    assert world.client.get(f"/internal/models/{NAME}").json["name"] == NAME
    assert world.client.get("/internal/models/nosuch").status == 404


def test_load_and_unload(world: World) -> None:
    assert world.client.post(f"/internal/models/{NAME}/load").json["state"] == "ready"
    assert world.client.post(f"/internal/models/{NAME}/load").json["state"] == "ready"
    assert world.loads == [NAME]
    assert world.client.post(f"/internal/models/{NAME}/unload", {}).json["state"] == "unloaded"
    assert world.client.get(f"/internal/models/{NAME}").json["memory_bytes"] is None
    world.error = ModelLoadError("truncated")
    assert "truncated" in world.client.post(f"/internal/models/{NAME}/load").error["message"]
    row = world.client.get(f"/internal/models/{NAME}").json
    assert (row["state"], row["error"], row["memory_bytes"]) == ("failed", "truncated", None)
    ready = world.client.get("/ready")
    assert (ready.status, ready.headers["retry-after"]) == (503, "1")


def test_a_model_that_does_not_fit(world: World) -> None:
    world.error = MemoryTooSmall("it does not fit: 9.0 GB of memory, 1.0 GB are free", param="model", missing=1 << 60)
    for path, body in (("/v1/chat/completions", {**CHAT, "model": NAME}), (f"/internal/models/{NAME}/load", {})):
        answer = world.client.post(path, body)
        assert (answer.status, answer.error["code"]) == (409, "memory_too_small")
        assert answer.error["message"] == world.error.message
    row = world.client.get(f"/internal/models/{NAME}").json
    assert (row["state"], row["error"]) == ("unloaded", world.error.message)
    assert world.client.get("/ready").status == 200
    assert [one["state"] for one in world.client.get("/internal/models").json["models"]] == ["ready", "unloaded"]
    world.error = None
    assert world.client.post("/v1/chat/completions", {**CHAT, "model": NAME}).status == 200
    assert world.loads == [NAME] * 3


@pytest.mark.parametrize("kv", ["drain", "auto"])
def test_a_swap_that_does_not_fit_beside(world: World, monkeypatch: pytest.MonkeyPatch, kv: str) -> None:
    def load(name: str, target: Target) -> Any:
        raise MemoryTooSmall("it does not fit: 9.0 GB of memory, 1.0 GB are free", param="model", missing=1)

    def another(*_: Any, **__: Any) -> Any:
        raise NeedsAnotherEngine("another architecture")

    monkeypatch.setattr(world.services.swaps, "_load", load)
    engine = world.models.get("fake").engine
    monkeypatch.setattr(engine.weights, "swap", another)
    answer = world.client.post("/internal/models/fake/swap", {"to": "x", "kv": kv})
    assert (answer.status, answer.error["code"]) == (409, "memory_too_small")
    assert "1.0 GB are free" in answer.error["message"]
    assert world.models.get("fake").engine is engine
    assert world.client.post("/v1/chat/completions", {**CHAT, "model": "fake"}).status == 200


def test_unload_of_a_busy_model(world: World) -> None:
    lease = world.models.try_lease("fake")
    assert lease is not None
    answer = world.client.post("/internal/models/fake/unload", {})
    assert (answer.status, answer.error["code"]) == (409, "model_busy")
    lease.release()
    assert world.client.post("/internal/models/fake/unload", {"force": True, "timeout_s": 0}).status == 200


def test_sleep_and_wake(world: World) -> None:
    lease = world.models.try_lease("fake")
    assert lease is not None
    answer = world.client.post("/internal/models/fake/sleep", {})
    assert (answer.status, answer.error["code"]) == (409, "model_busy")
    lease.release()
    answer = world.client.post("/internal/models/fake/sleep", {"level": "disk"})
    assert (answer.status, answer.error["message"]) == (400, "there is no disk tier")
    row = world.client.post("/internal/models/fake/sleep", {"level": "host"}).json
    held = {"level": "host", "tokens": 3, "host_bytes": 5, "disk_bytes": 0}
    assert (row["state"], row["asleep"], row["memory_bytes"]) == ("asleep", held, 5)
    world.models.get("fake").keep_alive_s = 600.0
    row = world.client.get("/internal/models/fake").json
    assert 0 < row["expires_in_s"] <= 600 and row["idle_s"] < 600, "its keep-alive goes on"
    world.models.get("fake").keep_alive_s = -1.0
    assert world.client.get("/ready").status == 200
    assert world.client.get("/internal/kv").error["code"] == "model_not_loaded"
    assert "fake" in world.client.get("/internal/memory").json["models"]
    assert world.client.post(f"/internal/models/{NAME}/sleep", {}).error["code"] == "model_not_loaded"
    row = world.client.post("/internal/models/fake/wake").json
    assert (row["state"], row["asleep"]) == ("ready", None)
    world.client.post("/internal/models/fake/sleep", {})
    assert world.client.post("/v1/chat/completions", {**CHAT, "model": "fake"}).status == 200
    assert world.models.get("fake").state == "ready"


def test_pins(world: World) -> None:
    row = world.client.post("/internal/models/fake/pin", {}).json
    assert (row["pinned"], row["keep_alive_s"]) == (True, None)
    assert world.client.post("/internal/models/fake/unpin", {}).json["pinned"] is False
    assert world.client.post("/internal/models/fake/pin", {"keep_alive": "soon"}).status == 400
    assert world.models.get("fake").pinned is False


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("unload", {"forced": True}),
        ("unload", {"timeout_s": -1}),
        ("sleep", {"level": "deep"}),
        ("sleep", {"depth": 1}),
        ("pin", {"keep_alive": []}),
        ("swap", {}),
        ("swap", {"to": ""}),
        ("swap", {"to": "Q4_0", "kv": "keep"}),
        ("swap", {"to": "Q4_0", "gap": "maybe"}),
        ("swap", {"to": "Q4_0", "kl": "yes"}),
        ("swap", b"{"),
        ("share", {"weight": "much"}),
    ],
)
def test_bad_bodies_are_400(world: World, action: str, body: object) -> None:
    answer = world.client.post(f"/internal/models/fake/{action}", body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


def test_an_unknown_action_is_404(world: World) -> None:
    assert world.client.post("/internal/models/fake/explode", {}).status == 404


@pytest.mark.parametrize(
    ("method", "path", "takes"),
    [
        ("POST", "fake", "GET"),
        ("POST", "load", "GET"),
        ("DELETE", "fake/load", "POST"),
        ("DELETE", "fake/adapters", "GET, POST"),
        ("POST", "fake/adapters/x", "GET, DELETE"),
        ("GET", "fake/load", "POST"),
    ],
)
def test_what_a_path_does_not_take_is_405(world: World, method: str, path: str, takes: str) -> None:
    answer = world.client.request(method, f"/internal/models/{path}", b"", {})
    assert answer.status == 405
    assert answer.headers["allow"].removesuffix(", OPTIONS") == takes


def test_options_name_what_a_path_takes(world: World) -> None:
    for path, takes in (("fake", "GET"), ("fake/load", "POST"), ("fake/adapters/x", "GET, DELETE")):
        answer = world.client.request("OPTIONS", f"/internal/models/{path}", b"", {})
        assert (answer.status, answer.headers["allow"]) == (200, f"{takes}, OPTIONS")


@pytest.mark.parametrize("action", ["load", "unload", "pin", "unpin", "swap", "share"])
def test_actions_take_the_admin_key(config: ServeConfig, action: str) -> None:
    config.admin_key = "secret"
    world = World(config)
    try:
        path, body = f"/internal/models/fake/{action}", {"to": "x"} if action == "swap" else {}
        assert world.client.post(path, body).status in (401, 403)
        assert world.client.post(path, body, headers={"Authorization": "Bearer wrong"}).status in (401, 403)
        assert world.models.get("fake").pinned is False
        assert not world.services.swaps.history
        if action == "swap":
            assert world.client.post(path, body, headers={"Authorization": "Bearer secret"}).status == 200
            assert world.may_read == [True]
    finally:
        world.services.close()


def test_swap_and_history(world: World) -> None:
    found = world.client.post("/internal/models/fake/swap", {"to": "Q4_0", "kv": "carry"}).json
    assert found.items() >= {"state": "done", "kv": "carry", "weights_to": "Q4_0", "way": "in_place"}.items()
    assert found["kl"] is None and world.may_read == [False]
    assert world.client.post("/internal/models/fake/swap", {"to": "Q4_0", "kl": True}).json["kl"] == 0.01
    world.error = ReferenceNotFound("no such thing")
    failed = world.client.post("/internal/models/fake/swap", {"to": "x"})
    assert (failed.status, failed.error["message"]) == (404, "no such thing")
    history = world.client.get("/internal/swaps").json["swaps"]
    assert [one["state"] for one in history] == ["failed", "done", "done"]
    assert world.client.get(f"/internal/swaps/{found['id']}").json == found
    assert world.client.get("/internal/swaps/nosuch").status == 404
    assert world.models.get("fake").n_requests == 0


def test_swap_progress_as_events(world: World) -> None:
    answer = world.client.post("/internal/models/fake/swap", {"to": "Q4_0"}, headers={"Accept": "text/event-stream"})
    events = [part.split("\n") for part in answer.body.decode().split("\n\n") if part and not part.startswith(":")]
    kinds = [lines[0].removeprefix("event: ") for lines in events]
    assert kinds[-1] == "done" and set(kinds[:-1]) <= {"progress"}
    assert json.loads(events[-1][1].removeprefix("data: "))["state"] == "done"


def test_a_chat_loads_its_model(world: World) -> None:
    listed = {one["id"]: one["state"] for one in world.client.get("/v1/models").json["data"]}
    assert listed == {"fake": "ready", NAME: "unloaded", "stored": "unloaded"}
    answer = world.client.post("/v1/chat/completions", CHAT | {"model": NAME})
    assert (answer.status, world.loads, world.models.get(NAME).state) == (200, [NAME], ModelState.READY)
    assert world.models.get(NAME).in_use == 0
    assert world.client.get("/ready").json["models"] == {"fake": True, NAME: True}
    bad = world.client.post("/v1/chat/completions", CHAT | {"model": "fake", "keep_alive": "soon"})
    assert (bad.status, bad.error["param"]) == (400, "keep_alive")
    assert world.models.get("fake").in_use == 0


def test_a_client_that_leaves_while_its_model_loads(world: World) -> None:
    may_load = threading.Event()
    load = world.models.loads.load
    assert load is not None

    def slow(name: str, reference: str, progress: Any) -> EngineClient:
        assert may_load.wait(20)
        return load(name, reference, progress)

    world.models.loads.load = slow

    class Leaving:
        async def receive(self) -> dict[str, str]:
            return {"type": "http.disconnect"}

    async def test() -> None:
        with pytest.raises(ClientLeft):
            await world.services.lease(cast(Any, Leaving()), NAME)
        await asyncio.sleep(0)
        assert world.models.get(NAME).waiters == []
        may_load.set()
        (await world.models.lease(NAME)).release()
        assert world.models.get(NAME).in_use == 0

    asyncio.run(test())


def test_a_swap_that_nobody_waits_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def settle() -> None:  # the test's client has one loop a request: the swap ends before it does
        await asyncio.gather(*world.services.swaps._tasks)

    monkeypatch.setattr(world.services, "settle", settle)
    answer = world.client.post("/internal/models/fake/swap", {"to": "Q4_0"}, query="wait=false")
    assert (answer.status, answer.json["state"]) == (202, "running")
    assert world.client.get(f"/internal/swaps/{answer.json['id']}").json["state"] == "done"


def test_a_failed_swap_keeps_nothing_of_who_asked(world: World) -> None:
    """The record stays; a traceback in it would keep the frames of the request, and with them its connection."""
    world.error = ReferenceNotFound("no such thing")
    assert world.client.post("/internal/models/fake/swap", {"to": "x"}).status == 404
    error = world.services.swaps.history[-1].error
    assert error is not None and error.__traceback__ is None
