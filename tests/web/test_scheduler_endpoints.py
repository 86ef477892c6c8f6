"""PUT and PATCH of /internal/scheduler, its shadow, and what requests say to a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from mullama.config import ServeConfig
from mullama.serving.manager import ModelManager
from mullama.types import Preempt
from mullama.web.app import create_app
from mullama.web.keys.key_ring import tenant_of
from mullama.web.services import Services

from .conftest import Client, Result
from .fake_engine import FakeEngine

VIEW = "/internal/scheduler"
JSON = {"Content-Type": "application/json"}


def send(client: Client, method: str, body: Any, path: str = VIEW, **headers: str) -> Result:
    return client.request(method, path, orjson.dumps(body), {**JSON, **headers})


@pytest.fixture
def keyed(engine: FakeEngine) -> Callable[..., Client]:
    """``keyed(option=…)``: a client of an app with these options."""

    def make(**options: Any) -> Client:
        config = ServeConfig(**options)
        services = Services(config, ModelManager([("fake", engine)]))
        return Client(create_app(config, services.models, services), services)

    return make


def test_put_and_patch_reach_the_engine(client: Client, engine: FakeEngine) -> None:
    put = send(client, "PUT", {"policy": "fair", "params": {"chunk": 3}})
    assert put.json == {"model": "fake", "policy": "fair", "params": {"chunk": 3}, "handed_over": 0}
    assert send(client, "PATCH", {"params": {"chunk": 4}}).json["params"] == {"chunk": 4}
    assert send(client, "PUT", {"policy": "srpt"}, f"{VIEW}/shadow").json == {"model": "fake", "shadow": "srpt"}
    assert send(client, "DELETE", {}, f"{VIEW}/shadow").json["shadow"] is None
    assert engine.scheduler_calls == [
        ("set", "fair", {"chunk": 3}), ("configure", "", {"chunk": 4}), ("shadow", "srpt", {}), ("shadow", "", {}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "body", "param"),
    [
        ("PUT", {"policy": "fare"}, "policy"),
        ("PUT", {}, "policy"),
        ("PUT", {"policy": ""}, "policy"),
        ("PUT", {"policy": 3}, "policy"),
        ("PUT", {"policy": "fair", "params": []}, "params"),
        ("PUT", [], None),
        ("PATCH", {"policy": "fair"}, "policy"),
        ("PATCH", {"params": 1}, "params"),
    ],
)
def test_what_is_refused(client: Client, method: str, body: Any, param: str | None) -> None:
    result = send(client, method, body)
    assert (result.status, result.error["param"]) == (400, param)


@pytest.mark.parametrize("path", [VIEW, f"{VIEW}/shadow"])
def test_files_need_the_admin_key(keyed: Callable[..., Client], engine: FakeEngine, path: str) -> None:
    body = {"policy": "./mine.py:Mine"}
    assert send(keyed(), "PUT", body, path).status == 403
    client = keyed(admin_key="a")
    assert send(client, "PUT", body, path).status == 403
    assert engine.scheduler_calls == []
    send(client, "PUT", body, path, Authorization="Bearer a")
    assert engine.scheduler_calls[0][1] == "./mine.py:Mine"


@pytest.mark.parametrize(("method", "policy"), [("PUT", "srpt"), ("PATCH", None)])
def test_code_that_a_parameter_names_needs_it_as_well(
    keyed: Callable[..., Client], engine: FakeEngine, method: str, policy: str | None
) -> None:
    body = {"policy": policy, "params": {"predictor": "/tmp/mine.py:Mine"}}
    result = send(keyed(), method, body)
    assert (result.status, engine.scheduler_calls) == (403, [])
    assert "--admin-key" in result.error["message"]
    send(keyed(admin_key="a"), method, body, Authorization="Bearer a")
    assert len(engine.scheduler_calls) == 1


def test_a_request_says_how_it_wants_to_be_scheduled(client: Client, engine: FakeEngine) -> None:
    body = {"prompt": "x", "priority": -3, "slo_ms": 250, "preempt": "recompute", "user": "me"}
    assert client.post("/v1/completions", body).status == 200
    client.post("/v1/completions", {"prompt": "x", "slo_ms": None, "preempt": None})
    first, second = engine.requests
    assert (first.priority, first.slo_ms, first.preempt, first.user) == (-3, 250.0, Preempt.RECOMPUTE, "me")
    assert (second.priority, second.slo_ms, second.preempt, second.user) == (0, None, Preempt.AUTO, None)


@pytest.mark.parametrize(("field", "value"), [("slo_ms", 0), ("slo_ms", "soon"), ("preempt", "kill"), ("preempt", 1)])
def test_wrong_wishes(client: Client, field: str, value: Any) -> None:
    result = client.post("/v1/completions", {"prompt": "x", field: value})
    assert (result.status, result.error["param"]) == (400, field)


def test_keys_tell_tenants_apart(keyed: Callable[..., Client], engine: FakeEngine) -> None:
    client = keyed(api_key=["one", "two"])
    for key, more in (("one", {}), ("two", {}), ("two", {"user": "me"})):
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post("/v1/completions", {"prompt": "x", **more}, headers=headers).status == 200
    assert client.post("/v1/completions", {"prompt": "x"}, headers={"Authorization": "Bearer three"}).status == 401
    assert [request.user for request in engine.requests] == [tenant_of(b"one"), tenant_of(b"two"), "me"]
    assert "one" not in tenant_of(b"one")


def test_a_single_key_is_no_tenant(keyed: Callable[..., Client], engine: FakeEngine) -> None:
    client = keyed(api_key=["one"])
    client.post("/v1/completions", {"prompt": "x"}, headers={"Authorization": "Bearer one"})
    assert engine.requests[0].user is None
