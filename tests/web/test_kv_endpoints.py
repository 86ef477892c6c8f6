"""/internal/kv: views, what an operator may do, salts and tenants."""

from __future__ import annotations

import ast
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
import zmq
from docs_support import ROOT, names

from mullama.config import ServeConfig, load_config
from mullama.errors import ConfigError, DiskFull
from mullama.observe.kv_blocks import AllBlocksCleared, BlockRemoved, BlockStored
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.internal import kv_schemas
from mullama.web.internal.kv_routes import DEFAULT_NODES, MAX_NODES
from mullama.web.keys.key_ring import tenant_of
from mullama.web.security import salt_of
from mullama.web.services import LARGE_TEXT, Services

from .conftest import Client
from .fake_engine import BOS, N_VOCAB, FakeEngine

KV = "/internal/kv"
JSON = {"Content-Type": "application/json"}
PAGE = ROOT / "docs" / "kv-inspect.md"
ACTIONS = ("pin", "unpin", "drop", "save")


@pytest.fixture
def keyed(engine: FakeEngine) -> Iterator[Callable[..., Client]]:
    """``keyed(option=…)``: a client of an app with these options."""
    opened: list[Services] = []

    def make(**options: Any) -> Client:
        config = ServeConfig(**options)
        services = Services(config, ModelManager([("fake", engine)]))
        opened.append(services)
        return Client(create_app(config, services.models, services), services)

    yield make
    for services in opened:
        services.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def tokens_of(text: str) -> list[int]:
    return [BOS] + [ord(c) % N_VOCAB for c in text]


# -- views ----------------------------------------------------------------------------------------------


def test_tree_and_map(client: Client) -> None:
    assert client.get(f"{KV}/tree").json == {
        "model": "fake", "nodes": [], "n_nodes": 0, "truncated": False, "limit": 1000, "text": False,
    }  # fmt: skip
    assert client.get(f"{KV}/tree", query="limit=7&model=other").json["limit"] == 7
    (cache,) = client.get(f"{KV}/map").json["caches"]
    assert cache["streams"][0]["runs"] == [[0, 5, 0], [5, 3, -1]]


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1.5", "100001", "９", "9" * 5000])
def test_limits_of_the_tree(client: Client, limit: str) -> None:
    result = client.get(f"{KV}/tree", query=f"limit={limit}")
    assert (result.status, result.error["param"]) == (400, "limit")
    assert "between 1 and 100000" in result.error["message"]


@pytest.mark.parametrize("path", ["tree", "map", "events", "policy"])
def test_views_of_a_model_that_is_not_there(client: Client, path: str) -> None:
    result = client.get(f"{KV}/{path}", query="model=x")
    assert (result.status, result.error["code"]) == (404, "model_not_found")


# -- the policy -----------------------------------------------------------------------------------------


def put(client: Client, body: Any, **headers: str) -> Any:
    return client.request("PUT", f"{KV}/policy", orjson.dumps(body), {**JSON, **headers})


def test_the_policy_is_shown_and_changed(client: Client, engine: FakeEngine) -> None:
    assert client.get(f"{KV}/policy").json == {"model": "fake", "policy": "lru", "params": {}}
    result = put(client, {"policy": "lfu", "params": {"half_life": 3}})
    assert result.json == {"model": "fake", "policy": "lfu", "params": {"half_life": 3}}
    assert engine.kv_calls == [("policy", None, {"spec": "lfu", "params": {"half_life": 3}})]


@pytest.mark.parametrize("body", [{}, {"policy": ""}, {"policy": "mru"}, {"policy": 3}])
def test_policies_that_are_refused(client: Client, body: Any) -> None:
    result = put(client, body)
    assert (result.status, result.error["param"]) == (400, "policy")
    assert "scheduler" not in result.error["message"]


def test_a_policy_from_a_file_needs_the_admin_key(keyed: Callable[..., Client], engine: FakeEngine) -> None:
    body = {"policy": "./mine.py:Mine"}
    assert put(keyed(), body).status == 403
    assert put(keyed(admin_key="a"), body).status == 403
    assert engine.kv_calls == []
    put(keyed(admin_key="a"), body, **bearer("a"))
    assert engine.kv_calls[0][2]["spec"] == "./mine.py:Mine"


# -- prefixes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "Hi"}, tokens_of("Hi")),
        ({"prompt": [5, 6, 7]}, [5, 6, 7]),
        ({"prompt": "Hi", "messages": None, "cache_salt": None}, tokens_of("Hi")),
        ({"messages": [{"role": "system", "content": "Be"}]}, tokens_of("<system>Be")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            tokens_of("<user>a\nb"),
        ),
    ],
)
def test_a_prefix_reaches_the_engine(
    client: Client, engine: FakeEngine, action: str, body: Any, tokens: list[int]
) -> None:
    result = client.post(f"{KV}/{action}", body)
    assert result.status == 200
    ((name, given, options),) = engine.kv_calls
    assert (name, given, options["namespace"]) == (action, tokens, "")
    assert result.json["model"] == "fake"


def test_answers_and_errors_of_the_engine_come_through(client: Client) -> None:
    assert client.post(f"{KV}/pin", {"prompt": "Hi"}).json == {"model": "fake", "pinned_tokens": 3}
    assert client.post(f"{KV}/save", {"prompt": "Hi"}).json == {"model": "fake", "tokens": 3, "bytes": 30}
    result = client.post(f"{KV}/load", {"prompt": "Hi"})
    assert (result.status, result.error["message"]) == (400, "this engine has no disk tier")


def test_a_full_disk_is_told_as_one(client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(tokens: Any, *, namespace: str = "") -> Any:
        raise DiskFull("0 of 3 cached tokens are on disk: cannot keep KV in kv: the disk is full")

    monkeypatch.setattr(engine.kv, "asave", fail)
    result = client.post(f"{KV}/save", {"prompt": "Hi"})
    assert (result.status, result.error["code"]) == (507, "disk_full")
    assert "the disk is full" in result.error["message"]


def test_long_prefixes(client: Client, engine: FakeEngine) -> None:
    text = "x" * (2 * LARGE_TEXT)
    assert client.post(f"{KV}/save", {"prompt": text}).json["tokens"] == len(text) + 1
    messages = [{"role": "user", "content": text}]
    assert client.post(f"{KV}/save", {"messages": messages}).json["tokens"] == len(f"<user>{text}") + 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a"]}, "prompt[0]"),
        ({"prompt": [1, N_VOCAB]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pope", "content": "b"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "REFUSE"}]}, "messages"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "a", "cache_salt": "x" * 257}, "cache_salt"),
        ({"prompt": "a", "cache_salt": 3}, "cache_salt"),
        ({"prompt": "a", "namespace": ""}, "namespace"),
        ({"prompt": "a", "namespace": "x" * 513}, "namespace"),
        ({"prompt": "a", "namespace": "x", "cache_salt": "y"}, "namespace"),
        ({"promt": "a"}, None),
        ({"prompt": "a", "temperature": 1}, None),
        ([], None),
    ],
)
@pytest.mark.parametrize("action", (*ACTIONS, "load"))
def test_prefixes_that_are_refused(
    client: Client, engine: FakeEngine, action: str, body: Any, param: str | None
) -> None:
    if action == "drop" and body in ({}, {"prompt": None}):
        return  # that drops everything
    result = client.post(f"{KV}/{action}", body)
    assert (result.status, result.error["param"]) == (400, param)
    assert engine.kv_calls == []
    if param is None and isinstance(body, dict):
        assert "unknown field" in result.error["message"]


def test_a_prompt_without_tokens(client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "tokenize", lambda text, **options: [])
    result = client.post(f"{KV}/drop", {"prompt": "\u200b"})
    assert (result.status, result.error["param"]) == (400, "prompt")
    assert engine.kv_calls == []


def test_how_long_a_pin_holds(client: Client, engine: FakeEngine) -> None:
    client.post(f"{KV}/pin", {"prompt": "Hi"})
    client.post(f"{KV}/pin", {"prompt": "Hi", "ttl_s": 2})
    assert [options["ttl_s"] for _, _, options in engine.kv_calls] == [kv_schemas.DEFAULT_TTL_S, 2.0]
    for ttl_s in (0, -1, kv_schemas.MAX_TTL_S + 1, "1"):
        result = client.post(f"{KV}/pin", {"prompt": "Hi", "ttl_s": ttl_s})
        assert (result.status, result.error["param"]) == (400, "ttl_s")
    assert client.post(f"{KV}/unpin", {"prompt": "Hi", "ttl_s": 2}).status == 400
    assert len(engine.kv_calls) == 2


@pytest.mark.parametrize("body", [{}, b"", b" \n", {"prompt": None}, {"tiers": None}])
def test_drop_everything(client: Client, engine: FakeEngine, body: Any) -> None:
    assert client.post(f"{KV}/drop", body).json == {
        "model": "fake", "cells_freed": 7, "host_bytes_freed": 0, "disk_bytes_freed": 0,
    }  # fmt: skip
    assert engine.kv_calls == [("drop", None, {"namespace": "", "tiers": []})]


def test_drop_from_some_tiers(client: Client, engine: FakeEngine) -> None:
    client.post(f"{KV}/drop", {"tiers": ["host", "disk"], "prompt": [5], "cache_salt": "s"})
    assert engine.kv_calls == [("drop", [5], {"namespace": "s", "tiers": ["host", "disk"]})]
    for tiers in ([], ["gpu"], ["host", "gpu"], "host", [1]):
        result = client.post(f"{KV}/drop", {"tiers": tiers})
        assert (result.status, result.error["param"].removesuffix("[0]")) == (400, "tiers")
    assert len(engine.kv_calls) == 1


# -- salts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_s_salt(client: Client, engine: FakeEngine, path: str) -> None:
    body: dict[str, Any] = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "n": 2}
    assert client.post(path, body | {"cache_salt": "sälz"}).status == 200
    assert client.post(path, body | {"cache_salt": None}).status == 200
    assert [request.cache_salt for request in engine.requests] == ["sälz", "sälz", "", ""]
    for salt in ("", "x" * 257, 5, ["x"]):
        result = client.post(path, body | {"cache_salt": salt})
        assert (result.status, result.error["param"]) == (400, "cache_salt")


def test_no_salt_passes_for_another_tenant_s() -> None:
    one, two = tenant_of(b"one"), tenant_of(b"two")
    assert "\0" not in one
    assert salt_of(None, None) == "" and salt_of(None, "s") == "s"
    assert len({salt_of(tenant, salt) for tenant in (one, two) for salt in (None, "s", f"{one}\0s", "\0", "\0s")}) == 10


def test_an_operator_names_a_tenant_s_prefix_by_its_namespace(keyed: Callable[..., Client], engine: FakeEngine) -> None:
    client = keyed(api_key=["one", "two"], admin_key="a")
    own = f"{tenant_of(b'one')}\0"
    for body in ({"prompt": [5], "namespace": f"{own}s"}, {"prompt": [5], "cache_salt": "s"}, {"prompt": [5]}):
        assert client.post(f"{KV}/unpin", body, headers=bearer("one")).status == 403
        assert client.post(f"{KV}/unpin", body, headers=bearer("a")).status == 200
    client.post(f"{KV}/drop", {}, headers=bearer("a"))
    assert [options["namespace"] for *_, options in engine.kv_calls] == [f"{own}s", "s", "", ""]


# -- who may ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [f"{KV}/{action}" for action in (*ACTIONS, "load")])
def test_writes_need_json_and_the_admin_key(keyed: Callable[..., Client], engine: FakeEngine, path: str) -> None:
    body = {"prompt": "x"}
    assert keyed().post(path, body, headers={"Content-Type": "text/plain"}).status == 415
    client = keyed(api_key=["k"], admin_key="a")
    assert client.post(path, body, headers=bearer("k")).status == 403
    assert keyed(host="0.0.0.0").post(path, body).status == 403
    assert engine.kv_calls == []
    client.post(path, body, headers=bearer("a"))
    assert len(engine.kv_calls) == 1
    assert client.get(path, headers=bearer("a")).status == 405


@pytest.mark.parametrize("path", [f"{KV}/{view}" for view in ("tree", "map", "policy")])
def test_reads_that_show_everybody_s_take_the_admin_key(keyed: Callable[..., Client], path: str) -> None:
    client = keyed(api_key=["k"], admin_key="a")
    assert [client.get(path, headers=headers).status for headers in ({}, bearer("k"), bearer("a"))] == [401, 403, 200]
    assert keyed(api_key=["k"]).get(path, headers=bearer("k")).status == 200, "there is nobody else"


def test_tokens_of_events_are_for_operators(keyed: Callable[..., Client]) -> None:
    for options, key in (
        ({"admin_key": "a"}, ""),
        ({"admin_key": "a", "api_key": ["k"]}, "k"),
        ({"host": "0.0.0.0"}, ""),
        ({"host": "0.0.0.0", "api_key": ["k"]}, "k"),
    ):
        client = keyed(**options)
        for value in ("1", "true"):
            result = client.get(f"{KV}/events", query=f"tokens={value}", headers=bearer(key) if key else {})
            assert (result.status, result.error["type"]) == (403, "permission_error")
    assert keyed(api_key=["k"]).get(f"{KV}/events", query="tokens=1").status == 401


def test_texts_of_the_tree_are_for_operators(keyed: Callable[..., Client], client: Client) -> None:
    for options, key in (({"admin_key": "a"}, ""), ({"host": "0.0.0.0", "api_key": ["k"]}, "k")):
        result = keyed(**options).get(f"{KV}/tree", query="text=1", headers=bearer(key) if key else {})
        assert (result.status, result.error["type"]) == (403, "permission_error")
    assert keyed(admin_key="a").get(f"{KV}/tree", query="text=1", headers=bearer("a")).json["text"] is True
    assert client.get(f"{KV}/tree", query="text=1").json["text"] is True, "on loopback, without keys"
    assert client.get(f"{KV}/tree").json["text"] is False


@pytest.mark.parametrize(
    ("query", "header", "param"),
    [("since=x", "", "since"), ("since=-1", "3", "since"), ("", "1e3", "Last-Event-ID"), ("", "³", "Last-Event-ID")],
)
def test_wrong_places_to_begin(client: Client, query: str, header: str, param: str) -> None:
    result = client.get(f"{KV}/events", query=query, headers={"Last-Event-ID": header})
    assert (result.status, result.error["param"]) == (400, param)


# -- the publisher for routers --------------------------------------------------------------------------------


def publishers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "mullama-kv-publisher"]


def test_the_server_publishes_what_happens(engine: FakeEngine) -> None:
    config = ServeConfig(kv_events_endpoint="tcp://127.0.0.1:*", kv_events_topic="kv@{model}", kv_events_block_size=2)
    services = Services(config, ModelManager([("fake", engine), ("other", FakeEngine("other"))]))
    context = zmq.Context()
    try:
        assert services.kv_publisher is not None
        socket = context.socket(zmq.SUB)
        socket.connect(services.kv_publisher.endpoint)
        socket.subscribe("kv@fake")
        assert socket.poll(30_000)
        socket.recv_multipart()
        engine.store([5, 6, 7])
        assert socket.poll(30_000)
        topic, _, payload = socket.recv_multipart()
        assert topic == b"kv@fake"
        (event,) = msgspec.msgpack.decode(payload)[1]
        assert (event[0], event[3], event[4]) == ("BlockStored", [5, 6], 2)
    finally:
        context.destroy(linger=0)
        services.close()
        services.close()
    assert publishers() == [] and engine.kv.events._wakers == []


def test_it_does_not_publish_unasked(services: Services) -> None:
    assert services.kv_publisher is None and publishers() == []


@pytest.mark.parametrize(
    ("endpoint", "is_open"),
    [("tcp://127.0.0.1:*", False), ("ipc://{folder}/kv", False), ("tcp://*:*", True), ("tcp://0.0.0.0:*", True)],
)
def test_a_warning_off_loopback(endpoint: str, is_open: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    Services(ServeConfig(kv_events_endpoint=endpoint.format(folder=tmp_path)), ModelManager()).close()
    assert ("is open to other machines" in caplog.text) is is_open


def test_what_cannot_be_published_stops_the_server(tmp_path: Path) -> None:
    """One line before anything is started, and nothing stays behind."""
    log = str(tmp_path / "profiles.jsonl")
    two = ModelManager([("one", FakeEngine()), ("two", FakeEngine())])
    before = threading.active_count()
    for config in (
        ServeConfig(kv_events_endpoint="tcp://no.such.host:1", profile_log=log),
        ServeConfig(kv_events_endpoint="tcp://127.0.0.1:*", profile_log=log),
    ):
        with pytest.raises(ConfigError, match=r"^--kv-events-"):
            Services(config, two)
    assert threading.active_count() == before


@pytest.mark.parametrize("value", ["127.0.0.1:5557", "http://x:1", "tcp://127.0.0.1", "tcp://a b:1"])
def test_values_that_are_no_endpoint(value: str) -> None:
    with pytest.raises(ConfigError, match="must look like tcp://HOST:PORT"):
        load_config({"kv_events_endpoint": value}, env={})
    for right in ("", "tcp://*:5557", "tcp://[::1]:5557", "ipc:///run/kv"):
        assert load_config({"kv_events_endpoint": right}, env={}).kv_events_endpoint == right


# -- the page ---------------------------------------------------------------------------------------------


def test_the_page_lists_the_fields_of_bodies() -> None:
    fields = dict.fromkeys((*kv_schemas.PrefixPinBody.__struct_fields__, *kv_schemas.DropBody.__struct_fields__))
    assert names(PAGE, "Naming a prefix") == list(fields)
    text = PAGE.read_text(encoding="utf-8")
    assert f"at most {kv_schemas.MAX_TTL_S:.0f}; default {kv_schemas.DEFAULT_TTL_S:.0f}" in text
    assert "1,000 without it and at most 100,000" in text and (DEFAULT_NODES, MAX_NODES) == (1000, 100_000)


def test_the_page_lists_the_fields_of_nodes() -> None:
    """Of the real engine, read from its source: no compiled code here."""
    source = (ROOT / "mullama" / "kv" / "report.py").read_text(encoding="utf-8")
    (tree,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "tree"]
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    keys = [ast.literal_eval(key) for key in max(dicts, key=lambda one: len(one.keys)).keys if key is not None]
    assert names(PAGE, "GET /internal/kv/tree") == keys


def test_the_page_lists_the_events_for_routers() -> None:
    kinds = (BlockStored, BlockRemoved, AllBlocksCleared)
    assert names(PAGE, "Events for routers") == [kind.__struct_config__.tag for kind in kinds]
