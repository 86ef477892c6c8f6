"""Host allow-list, API key, admin key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mullama.config import ServeConfig
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.security import host_name, is_loopback
from mullama.web.services import Services

from .conftest import Client, Result
from .fake_engine import FakeEngine

MODELS = "/v1/models"
DROP = "/internal/kv/drop"


@pytest.fixture
def make() -> Iterator[Callable[..., Client]]:
    opened: list[Services] = []

    def make(**options: object) -> Client:
        config = ServeConfig(**options)  # type: ignore[arg-type]
        services = Services(config, ModelManager([("fake", FakeEngine())]))
        opened.append(services)
        return Client(create_app(config, services.models, services), services)

    yield make
    for services in opened:
        services.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8080", "localhost.", "127.0.0.1", "127.0.0.1:9", "127.1.2.3", "[::1]:8080", "[::1]"],
)
def test_loopback_hosts_are_allowed(make: Callable[..., Client], host: str) -> None:
    client = make()
    for _ in range(2):
        assert client.get(MODELS, headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.5"),
        *("[fe80::1]", "localhost@evil.example", "localhost,evil.example", "evil.example:127.0.0.1"),
    ],
)
def test_other_hosts_are_403(make: Callable[..., Client], host: str) -> None:
    client = make()
    for path in (MODELS, "/health", "/nothing"):
        result = client.get(path, headers={"Host": host})
        assert (result.status, result.error["type"]) == (403, "permission_error")
        assert "--allowed-host" in result.error["message"]


def test_a_missing_host_is_403(make: Callable[..., Client]) -> None:
    assert make().get(MODELS, headers={"Host": ""}).status == 403


def test_allowed_hosts(make: Callable[..., Client]) -> None:
    client = make(allowed_host=["llm.example:8080", "[fd00::1]"])
    assert client.get(MODELS, headers={"Host": "llm.example"}).status == 200
    assert client.get(MODELS, headers={"Host": "[fd00::1]:80"}).status == 200
    assert client.get(MODELS, headers={"Host": "evil.example"}).status == 403
    assert make(allowed_host=["*"]).get(MODELS, headers={"Host": "evil.example"}).status == 200


def test_off_loopback_addresses_are_allowed_but_names_are_not(make: Callable[..., Client]) -> None:
    client = make(host="0.0.0.0")
    assert client.get(MODELS, headers={"Host": "192.168.1.5:8080"}).status == 200
    assert client.get(MODELS, headers={"Host": "evil.example"}).status == 403
    assert make(host="box.example").get(MODELS, headers={"Host": "box.example:80"}).status == 200


@pytest.mark.parametrize("path", [MODELS, "//v1/models", "/v1/models/", "/v1/models/fake"])
def test_the_api_key_guards_v1(make: Callable[..., Client], path: str) -> None:
    client = make(api_key=["sésame"])
    for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": "sésame"}, {"Authorization": "Basic sésame"}):
        result = client.get(path, headers=headers)
        assert (result.status, result.error["code"]) == (401, "invalid_api_key")
        assert result.headers["www-authenticate"] == "Bearer"
    assert client.get(path, headers=bearer("sésame")).status == 200
    assert client.get(path, headers={"Authorization": "bearer  sésame"}).status == 200


def test_the_api_key_guards_generation_before_the_body_is_read(make: Callable[..., Client]) -> None:
    client = make(api_key=["k"])
    assert client.post("/v1/chat/completions", b"{").status == 401
    assert client.post("/v1/completions", b"{").status == 401
    assert client.post("/v1/completions", b"{", headers=bearer("k")).status == 400


def test_health_needs_no_key(make: Callable[..., Client]) -> None:
    client = make(api_key=["k"], admin_key="a")
    assert client.get("/health").status == 200
    assert client.get("/ready").status == 200


def test_internal_reads_take_either_key(make: Callable[..., Client]) -> None:
    assert make(admin_key="a").get("/internal/kv").status == 200
    client = make(api_key=["k"], admin_key="a")
    assert client.get("/internal/kv").status == 401
    assert client.get("/internal/kv", headers=bearer("k")).status == 200
    assert client.get("/internal/kv", headers=bearer("a")).status == 200
    assert make(api_key=["k"]).get("/internal/kv", headers=bearer("")).status == 401


def test_internal_writes_need_json(make: Callable[..., Client]) -> None:
    client = make()
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        result = client.post(DROP, {}, headers={"Content-Type": media_type})
        assert (result.status, result.error["code"]) == (415, "unsupported_media_type")
    assert client.post(DROP, {}, headers={"Content-Type": "Application/JSON; charset=utf-8"}).status == 200


def test_internal_writes_off_loopback_need_the_admin_key(make: Callable[..., Client]) -> None:
    def drop(client: Client, key: str = "") -> Result:
        return client.post(DROP, {}, headers=bearer(key) if key else {})

    assert drop(make(host="0.0.0.0")).status == 403
    assert drop(make(host="0.0.0.0", api_key=["k"]), "k").status == 403
    client = make(host="0.0.0.0", admin_key="a", api_key=["k"])
    assert drop(client).status == 403
    assert drop(client, "k").status == 403
    assert drop(client, "a").status == 200


def test_internal_writes_on_loopback(make: Callable[..., Client]) -> None:
    assert make().post(DROP, {}).status == 200
    assert make(admin_key="a").post(DROP, {}).status == 403
    assert make(admin_key="a").post(DROP, {}, headers=bearer("a")).status == 200
    assert make(api_key=["k"]).post(DROP, {}).status == 401
    assert make(api_key=["k"]).post(DROP, {}, headers=bearer("k")).status == 200


def test_host_names() -> None:
    assert host_name("[::1]:80") == "::1"
    assert host_name("::1") == "::1"
    assert host_name(" A.b.:8 ") == "a.b"
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and is_loopback("127.9.9.9")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("box") and not is_loopback("")
