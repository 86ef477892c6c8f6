"""Host allow-list, API key, admin key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mullama.config import ServeConfig
from mullama.errors import ConfigError
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.http.listening import is_loopback
from mullama.web.security import host_name
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


# -- spellings of paths and keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v1//models", "//v1/models", "/v1/models/", "/v1//models//", "///v1///models", "/v1//models/fake"]
)
def test_empty_segments_of_a_path_do_not_count(make: Callable[..., Client], path: str) -> None:
    assert make().get(path).status == 200
    closed = make(api_key=["client-key"])
    assert closed.get(path).status == 401
    assert closed.get(path, headers=bearer("client-key")).status == 200


def test_empty_segments_under_internal_ask_for_the_same(make: Callable[..., Client]) -> None:
    client = make(admin_key="admin-key")
    assert client.post("/internal//kv/drop", {}).status == 403
    assert client.post("//internal/kv//drop", {}, headers=bearer("admin-key")).status == 200
    assert make().post("/v1//chat/completions", {"messages": [{"role": "user", "content": "x"}]}).status == 200
    assert make().get("//").status == 404


@pytest.mark.parametrize("header", ["X-Api-Key", "api-key", "x-api-key", "API-Key"])
def test_keys_in_the_headers_of_other_makers(make: Callable[..., Client], header: str) -> None:
    client = make(api_key=["alice-key", "bob-key"], admin_key="admin-key")
    assert client.get(MODELS, headers={header: "bob-key"}).status == 200
    assert client.get(MODELS, headers={header: "bob-key", "Authorization": "Bearer "}).status == 200
    assert client.get(MODELS, headers={header: "wrong"}).status == 401
    assert client.get(MODELS, headers={header: "bob-key", "Authorization": "Bearer wrong"}).status == 401
    assert client.post(DROP, {}, headers={header: "admin-key"}).status == 200
    assert client.post(DROP, {}, headers={header: "bob-key"}).status == 403


# -- domains -------------------------------------------------------------------------------------------------------


def test_a_domain_is_allowed_with_all_below_it(make: Callable[..., Client]) -> None:
    for spelled in (".example.org", "*.example.org", ".EXAMPLE.org."):
        client = make(allowed_host=[spelled])
        for host in ("example.org", "a.example.org", "a.b.example.org:8080", "A.Example.Org."):
            assert client.get(MODELS, headers={"Host": host}).status == 200, host
        for host in ("badexample.org", "example.org.evil.example", "org", ".org", "example.com"):
            assert client.get(MODELS, headers={"Host": host}).status == 403, host
    assert make(allowed_host=["box"]).get(MODELS, headers={"Host": "a.box"}).status == 403


def test_an_allowed_host_that_is_a_url_is_refused(make: Callable[..., Client]) -> None:
    with pytest.raises(ConfigError, match=r"--allowed-host.*leave out http://"):
        make(allowed_host=["https://example.org"])


# -- other origins -------------------------------------------------------------------------------------------------

PAGE = "https://chat.example.org"
ASKED = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}


def preflight(client: Client, path: str, **more: str) -> Result:
    return client.request("OPTIONS", path, b"", {**ASKED, **more})


def test_options_never_ask_for_a_key(make: Callable[..., Client]) -> None:
    client = make(api_key=["alice-key"], admin_key="admin-key", host="0.0.0.0")
    for path in ("/v1/chat/completions", MODELS, DROP, "/internal/scheduler", "/health"):
        reply = client.request("OPTIONS", path, b"", {})
        assert reply.status == 200 and "OPTIONS" not in reply.headers["allow"].split(", ")[0] and not reply.body
    assert client.request("OPTIONS", MODELS, b"", {"Host": "evil.example"}).status == 403


def test_no_origin_is_allowed_without_the_option(make: Callable[..., Client]) -> None:
    client = make()
    assert not [name for name in preflight(client, MODELS).headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in client.get(MODELS, headers={"Origin": PAGE}).headers


@pytest.mark.parametrize("origin", [PAGE, "*", PAGE.upper() + "/"])
def test_preflights_and_answers_of_an_allowed_origin(make: Callable[..., Client], origin: str) -> None:
    client = make(cors_origin=[origin], api_key=["alice-key"])
    asked = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
    reply = preflight(client, "/v1/chat/completions", **asked)
    assert reply.status == 200 and not reply.body
    allowed = "*" if origin == "*" else PAGE
    assert reply.headers["access-control-allow-origin"] == allowed
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert reply.headers["access-control-allow-headers"] == asked["Access-Control-Request-Headers"]
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    for answer, status in (
        (client.post("/v1/chat/completions", body, headers={"Origin": PAGE, **bearer("alice-key")}), 200),
        (client.post("/v1/chat/completions", body, headers={"Origin": PAGE}), 401),
        (client.get("/nothing", headers={"Origin": PAGE}), 404),
    ):
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == allowed
        assert "X-Context-Dropped" in answer.headers["access-control-expose-headers"]
        assert (answer.headers.get("vary") == "Origin") == (origin != "*")


def test_another_origin_gets_no_permission(make: Callable[..., Client]) -> None:
    client = make(cors_origin=[PAGE, "http://localhost:3000"])
    for origin in ("https://evil.example", "https://chat.example.org:8443", "http://chat.example.org", "null"):
        reply = preflight(client, MODELS, Origin=origin)
        assert "access-control-allow-origin" not in reply.headers
        assert reply.headers["vary"] == "Origin"
    assert preflight(client, MODELS, Origin="http://localhost:3000").headers["access-control-allow-origin"]


def test_a_star_does_not_open_what_changes_the_server(make: Callable[..., Client]) -> None:
    """Without a key any page could otherwise drop the cache of whoever visits it."""
    for path in (DROP, "/internal/kv"):
        assert "access-control-allow-origin" not in preflight(make(cors_origin=["*"]), path).headers
        named = preflight(make(cors_origin=[PAGE]), path)
        assert named.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origin", ["chat.example.org", "https://", "https://a/b", "https://a, https://b", ""])
def test_what_is_no_origin_is_refused(make: Callable[..., Client], origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origin"):
        make(cors_origin=[origin])
