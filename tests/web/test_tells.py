"""What each kind of key is shown: every route, against the table of docs/security.md; and that nothing else leaks."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mullama.config import ServeConfig
from mullama.errors import ConfigError, ModelBusy, ModelLoadError, PluginError, StoreError
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.internal import views
from mullama.web.keys.key_ring import tenant_of
from mullama.web.openapi.document import served
from mullama.web.security import Access
from mullama.web.services import Services

from .conftest import Client, Result
from .fake_engine import FakeEngine, FakeKv, FakePlanning, FakeWeights

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
KEYS = {"api_key": ["alice-key", "bob-key"], "admin_key": "admin-key"}
ALICE, BOB, ADMIN = ({"Authorization": f"Bearer {key}"} for key in ("alice-key", "bob-key", "admin-key"))
#: What belongs to Alice or to the machine, as the fake engine shows it to whom it shows everything.
SECRETS = ("cmpl-alice", "alice-user", tenant_of(b"alice-key"), "/srv/models/secret.gguf", "weight of alice-user")


class TellingKv(FakeKv):
    async def asnapshot(self) -> dict[str, Any]:
        rows = [
            {"slot": 0, "request": "cmpl-alice", "tenant": tenant_of(b"alice-key"), "cells": 70},
            {"slot": 1, "request": "cmpl-bob", "tenant": tenant_of(b"bob-key"), "cells": 9},
            {"slot": 2, "request": None, "tenant": None, "cells": 33},
        ]
        return {
            "layout": "streams",
            "slots": rows,
            "policy": {"policy": "lru", "params": {"of": "alice-user"}},
            "audit": ["cmpl-alice"],
        }


class TellingPlanning(FakePlanning):
    def set_share(self, *, weight: float = 1.0, priority: int = 0) -> None:
        self._engine.share = {"weight": weight, "priority": priority}

    def share(self) -> tuple[str, dict[str, Any]]:
        return self._engine.arbiter_policy, self._engine.share

    def snapshot(self) -> dict[str, Any]:
        names = ("prompt_tokens", "prompt_tokens_done", "kv_cache_hit", "tokens_left", "completion_tokens")
        done = dict(zip(names, (9, 9, 4, 5, 2), strict=True))
        own = {"id": "cmpl-bob", "user": "bob-user", "tenant": tenant_of(b"bob-key"), "slot": 1, **done}
        other = {"id": "cmpl-alice", "user": "alice-user", "tenant": tenant_of(b"alice-key"), "slot": 0, **done}
        return {
            "policy": "fair",
            "params": {"weights": "weight of alice-user"},
            "fallback": {"reason": "KeyError: 'alice-user'"},
            "shadow": {"waiting": ["cmpl-alice"]},
            "plan": {"tokens": {"cmpl-alice": 1}},
            "running": [other, own],
            "waiting": [dict(other, slot=None)],
        }


class TellingWeights(FakeWeights):
    def sleep(self, *more: Any) -> Any:
        raise ModelBusy("a request runs")


class Telling(FakeEngine):
    """Its views hold one request of each tenant, and everything that an engine's views may hold besides."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = TellingKv(self)
        self.planning = TellingPlanning(self)
        self.weights = TellingWeights(self)

    def counters(self) -> dict[str, int]:
        return {"busy_ns": 2_000_000_000, "sampled_tokens": 100}


@pytest.fixture
def make() -> Iterator[Callable[..., Client]]:
    opened: list[Services] = []

    def make(engine: FakeEngine | None = None, **options: Any) -> Client:
        engine = engine or Telling()
        engine.loras["style"] = {"scale": 1.0, "path": "/srv/models/secret.gguf", "size_bytes": 10}
        config = ServeConfig(**options)
        models = ModelManager([("fake", engine)])
        models.get("fake").reference = "/srv/models/secret.gguf"
        models.get("fake").error = "/srv/models/secret.gguf: it is cut short"
        services = Services(config, models)
        opened.append(services)
        return Client(create_app(config, models, services), services)

    yield make
    for services in opened:
        services.close()


def routes(client: Client) -> list[tuple[str, str, Access]]:
    """(method, path as the documentation writes it, access) of all that the server answers."""
    spelled = {"{name}/adapters/{id}": "NAME/adapters/ID", "{name}": "NAME"}
    found = []
    for one in served(client.app.routes):
        path = re.sub(r"\{\w+_id\}", "{id}", one.path)
        for braces, word in spelled.items():
            path = path.replace(braces, word)
        found.append((one.method, path, getattr(one.resource, "access", Access.OPERATOR)))
    return found


def table() -> dict[tuple[str, str], tuple[str, str, str]]:
    rows = re.findall(r"^\| `(\w+) (\S+)` \| (\S+) \| (\S+) \| (\S+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {(method, path): (anybody, client, admin) for method, path, anybody, client, admin in rows}


def ask(client: Client, method: str, path: str, headers: dict[str, str]) -> Result:
    """A request that is valid as far as may be: who may not, is refused before anybody looks at it."""
    path = path.replace("/v1/models/{id}", "/v1/models/fake").replace("{id}", "x").replace("NAME", "fake")
    path = path.replace("/ID", "/style" if method == "GET" else "/none")
    if path.endswith("/events"):
        return client.request(method, path, b"", {"Last-Event-ID": "x", **headers})  # refused at once, not followed
    body = b"" if method == "GET" else b'{"to": "/none"}' if path.endswith(("/swap", "/adapters")) else b"{}"
    return client.request(method, path, body, {"Content-Type": "application/json", **headers})


def test_the_page_names_every_route(make: Callable[..., Client]) -> None:
    told, served = table(), routes(make(**KEYS))
    assert {(method, path) for method, path, _ in served} == set(told), "docs/security.md has a row for each endpoint"
    columns = {Access.OPEN: {("all",) * 3}, Access.CLIENT: {("–", "own", "–"), ("–", "all", "–")}}
    for method, path, access in served:
        may_read = access is Access.INTERNAL and method == "GET"
        right = columns.get(access, {("–", "own", "all")} if may_read else {("–", "–", "all")})
        assert told[method, path] in right, (method, path)


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    """The same keys by name; Bob's has every limit there is, and may use the model there is."""
    path = tmp_path / "keys.toml"
    path.write_text(
        '[[key]]\nname = "alice"\nkey = "alice-key"\n[[key]]\nname = "root"\nkey = "admin-key"\nrole = "admin"\n'
        '[[key]]\nname = "bob"\nkey = "bob-key"\nmodels = ["fake"]\nrequests_per_minute = 1000\nconcurrent = 9\n'
        "tokens_per_minute = 100000\npriority_floor = 0\n"
    )
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize("by_file", [False, True])
def test_every_route_by_every_kind_of_key(make: Callable[..., Client], key_file: str, by_file: bool) -> None:
    for (method, path), allowed in table().items():
        client = make(**({"key_file": key_file} if by_file else KEYS))  # an operator's request changes it
        for name, headers, cell in zip(("none", "client", "admin"), ({}, BOB, ADMIN), allowed, strict=True):
            result = ask(client, method, path, headers)
            case = (method, path, name, result.status, result.body[:200])
            if cell != "–":
                assert result.status not in (401, 403), case
            elif name == "none" and (method == "GET" or path.startswith("/v1")):
                assert result.status == 401, case
            else:
                assert result.status in (401, 403), case
        wrong = ask(client, method, path, {"Authorization": "Bearer wrong"})
        assert (wrong.status in (401, 403)) is (allowed[0] == "–"), (method, path, wrong.status)


@pytest.mark.parametrize("more", [{}, {"host": "0.0.0.0"}])
def test_without_an_admin_key_nobody_is_an_operator_of_tenants(make: Callable[..., Client], more: Any) -> None:
    client = make(api_key=KEYS["api_key"], **more)
    for (method, path), (_, allowed, _) in table().items():
        result = ask(client, method, path, BOB)
        assert (result.status == 403) is (allowed == "–"), (method, path, result.status)
        if result.status == 403:
            assert "--admin-key" in result.body.decode()


@pytest.mark.parametrize("more", [{"host": "0.0.0.0"}, {"admin_key": "admin-key"}])
def test_who_has_no_key_where_none_is_needed_is_a_client(make: Callable[..., Client], more: Any) -> None:
    client = make(**more)
    for (method, path), (_, allowed, _) in table().items():
        result = ask(client, method, path, {})
        assert (result.status == 403) is (allowed == "–"), (method, path, result.status)
        assert "/srv/models" not in result.body.decode()


def test_no_route_tells_a_client_of_another_or_of_the_machine(make: Callable[..., Client]) -> None:
    shown: set[str] = set()
    for method, path in table():
        client = make(**KEYS)
        whole = ask(client, method, path, ADMIN)
        assert whole.status != 500, (method, path)
        shown |= {secret for secret in SECRETS if secret in whole.body.decode()}
        cut = ask(client, method, path, BOB).body.decode()
        assert [secret for secret in SECRETS if secret in cut] == [], (method, path, cut)
    assert shown == set(SECRETS), "what this test looks for is there to be found"


def test_a_client_sees_its_own(make: Callable[..., Client]) -> None:
    client = make(**KEYS)
    for headers, who in ((ALICE, "alice"), (BOB, "bob")):
        view = client.get("/internal/scheduler", headers=headers).json
        assert [one["id"] for one in view["running"]] == [f"cmpl-{who}"]
        assert [one["user"] for one in view["running"]] == [f"{who}-user"]
        assert len(view["waiting"]) == (who == "alice")
        rows = client.get("/internal/kv", headers=headers).json["slots"]
        assert [row["request"] for row in rows] == [f"cmpl-{who}"]
    view = client.get("/internal/scheduler", headers=ADMIN).json
    assert len(view["running"]) == 2 and "plan" in view
    assert len(client.get("/internal/kv", headers=ADMIN).json["slots"]) == 3
    (row,) = client.get("/internal/models", headers=BOB).json["models"]
    assert row["error"] == views.LOAD_FAILED and "reference" not in row
    assert client.get("/internal/models/fake/adapters/style", headers=BOB).json == {
        "id": "style",
        "scale": 1.0,
        "size_bytes": 10,
    }


@pytest.mark.parametrize("error", [ModelLoadError, StoreError, PluginError])
def test_errors_that_name_files_are_for_the_log(
    make: Callable[..., Client], error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    words = "/srv/models/secret.gguf: it is cut short"
    for headers, is_told in ((BOB, False), (ADMIN, None)):
        engine = Telling()
        engine.submit_errors = [error(words)]
        with caplog.at_level(logging.WARNING):
            result = make(engine, **KEYS).post("/v1/completions", {"prompt": "x"}, headers=headers)
        assert "/srv" not in result.body.decode()
        assert (words in caplog.text) is (is_told is False), "the admin key does not generate"
        caplog.clear()
    engine = Telling()
    engine.submit_errors = [error(words)]
    alone = make(engine).post("/v1/completions", {"prompt": "x"})
    assert alone.error["message"] == words, "who is alone with the server is its operator"


def test_keys_have_caches_of_their_own_unless_they_share(make: Callable[..., Client]) -> None:
    engine = Telling()
    body = {"prompt": "x", "cache_salt": f"{tenant_of(b'bob-key')}\0"}
    for client in (make(engine, **KEYS), make(engine, **KEYS, cache_shared_by_keys=True)):
        for headers in (ALICE, BOB):
            for sent in ({"prompt": "x"}, body):
                assert client.post("/v1/completions", sent, headers=headers).status == 200
    salts = [request.cache_salt for request in engine.requests]
    apart, shared = salts[:4], salts[4:]
    assert len(set(apart)) == 4
    assert shared == ["", body["cache_salt"]] * 2
    assert [request.shares_cache for request in engine.requests] == [False] * 4 + [True] * 4
    assert {request.tenant for request in engine.requests} == {tenant_of(b"alice-key"), tenant_of(b"bob-key")}
    alone = Telling()
    make(alone, api_key=["alice-key"]).post("/v1/completions", {"prompt": "x"}, headers=ALICE)
    assert (alone.requests[0].cache_salt, alone.requests[0].tenant, alone.requests[0].shares_cache) == ("", None, False)
    with pytest.raises(ConfigError, match="needs several --api-key"):
        make(api_key=["alice-key"], cache_shared_by_keys=True)


def test_an_open_server_off_loopback_is_said_aloud(
    make: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    make(), make(host="0.0.0.0", api_key=["alice-key"])
    assert caplog.text == ""
    make(host="0.0.0.0")
    assert "there is no --api-key" in caplog.text
