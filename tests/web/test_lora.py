"""LoRA adapters over HTTP: the names of requests, the field, and the administration."""

from __future__ import annotations

from pathlib import Path

import pytest

from mullama.config import ServeConfig
from mullama.errors import AdapterBusy, AdapterMismatch, NeedsAnotherEngine
from mullama.serving.hot_swap import Swaps
from mullama.serving.manager import ModelManager
from mullama.serving.targets import Target
from mullama.types import LoraUse
from mullama.web.app import create_app
from mullama.web.services import Services

from .conftest import Client
from .fake_engine import FakeEngine

ADMIN = {"Authorization": "Bearer secret"}
ADAPTERS = "/internal/models/fake/adapters"


@pytest.fixture
def loaded(engine: FakeEngine) -> FakeEngine:
    engine.loras = {"a": {"path": "/x/a.gguf", "scale": 1.0}, "b": {"path": "/x/b.gguf", "scale": 0.5}}
    return engine


@pytest.fixture
def client(loaded: FakeEngine, services: Services, config: ServeConfig) -> Client:
    return Client(create_app(config, services.models, services), services)


def ask(client: Client, kind: str, body: dict[str, object]) -> object:
    if kind == "chat":
        return client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **body})
    return client.post("/v1/completions", {"prompt": "hi", **body})


both = pytest.mark.parametrize("kind", ["chat", "completion"])


@both
@pytest.mark.parametrize(
    ("body", "uses", "answers_as"),
    [
        ({"model": "fake"}, (), "fake"),
        ({"model": "fake", "lora": []}, (), "fake"),
        ({"model": "fake", "lora": None}, (), "fake"),
        ({"model": "fake+a"}, (LoraUse("a"),), "fake+a"),
        ({"model": "fake+b+a"}, (LoraUse("b"), LoraUse("a")), "fake+b+a"),
        ({"lora": [{"id": "a", "scale": 0.25}]}, (LoraUse("a", 0.25),), "fake"),
        ({"model": "fake+a", "lora": [{"id": "b"}]}, (LoraUse("a"), LoraUse("b")), "fake+a"),
    ],
)
def test_requests_name_adapters(
    client: Client, loaded: FakeEngine, kind: str, body: dict[str, object], uses: tuple[LoraUse, ...], answers_as: str
) -> None:
    answer = ask(client, kind, body)
    assert (answer.status, answer.json["model"]) == (200, answers_as)
    assert loaded.requests[-1].lora == uses


@both
@pytest.mark.parametrize("name", ["fake+nosuch", "fake+a+nosuch", "fake+", "fake+a+"])
def test_unknown_adapters_in_the_name_are_404(client: Client, loaded: FakeEngine, kind: str, name: str) -> None:
    answer = ask(client, kind, {"model": name})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert "loaded adapters: a, b" in answer.error["message"]
    assert loaded.requests == [] and not loaded.running


@both
def test_unknown_adapters_in_the_field_are_400(
    client: Client, services: Services, loaded: FakeEngine, kind: str
) -> None:
    answer = ask(client, kind, {"lora": [{"id": "nosuch"}]})
    assert (answer.status, answer.error["param"]) == (400, "lora")
    assert services.models.get("fake").in_use == 0


@pytest.mark.parametrize("lora", ["a", [1], [{"scale": 1}], [{"id": 1}], [{"id": "a", "scale": "much"}], {"id": "a"}])
def test_bad_fields(client: Client, lora: object) -> None:
    answer = ask(client, "chat", {"lora": lora})
    assert answer.status == 400 and answer.error["param"].startswith("lora")


@pytest.mark.parametrize("name", ["nosuch+a", "+a", "+", "+" * 500])
def test_unknown_models_with_a_plus(client: Client, name: str) -> None:
    assert ask(client, "chat", {"model": name}).status == 404


def test_a_served_name_with_a_plus_is_itself(config: ServeConfig) -> None:
    plain, plus = FakeEngine("fake"), FakeEngine("fake+a")
    plus.loras = {"b": {}}
    services = Services(config, ModelManager([("fake", plain), ("fake+a", plus)]))
    client = Client(create_app(config, services.models, services), services)
    assert ask(client, "chat", {"model": "fake+a"}).json["model"] == "fake+a"
    assert plus.requests[-1].lora == ()
    assert ask(client, "chat", {"model": "fake+a+b"}).status == 200
    assert plus.requests[-1].lora == (LoraUse("b"),)
    assert plain.requests == []
    services.close()


def test_models_are_listed_with_their_adapters(client: Client) -> None:
    data = client.get("/v1/models").json["data"]
    assert [(one["id"], one.get("parent")) for one in data] == [
        ("fake", None),
        ("fake+a", "fake"),
        ("fake+b", "fake"),
        ("other", None),
    ]
    assert client.get("/v1/models/fake+a+b").json.items() >= {"id": "fake+a+b", "parent": "fake"}.items()
    assert client.get("/v1/models/fake+c").status == 404


def test_list_and_show(client: Client) -> None:
    found = client.get(ADAPTERS).json
    assert (found["model"], [one["id"] for one in found["adapters"]]) == ("fake", ["a", "b"])
    assert client.get(f"{ADAPTERS}/b").json["scale"] == 0.5
    assert client.get(f"{ADAPTERS}/c").error["code"] == "adapter_not_found"
    assert client.get("/internal/models/nosuch/adapters").status == 404


def delete(client: Client, path: str, headers: dict[str, str] | None = None) -> object:
    return client.request("DELETE", path, b"{}", {"Content-Type": "application/json", **(headers or {})})


def test_unload(client: Client, loaded: FakeEngine, services: Services) -> None:
    assert [one["id"] for one in delete(client, f"{ADAPTERS}/a").json["adapters"]] == ["b"]
    assert delete(client, f"{ADAPTERS}/a").error["code"] == "adapter_not_found"
    assert delete(client, ADAPTERS).status == 405
    assert delete(client, "/internal/models/fake").status == 405
    loaded.lora_error = AdapterBusy("2 requests use the adapter 'b' now", param="id")
    answer = delete(client, f"{ADAPTERS}/b")
    assert (answer.status, answer.error["code"]) == (409, "adapter_busy")
    assert services.models.get("fake").resident.n_leases == 0


@pytest.fixture
def admin(config: ServeConfig, client: Client, services: Services) -> Client:
    """The same with an admin key, so that files of the server may be named."""
    config.admin_key = "secret"
    return Client(create_app(config, services.models, services), services)


def test_load_a_file(admin: Client, loaded: FakeEngine, services: Services, tmp_path: Path) -> None:
    path = str(tmp_path / "new.gguf")
    answer = admin.post(ADAPTERS, {"path": path, "id": "new", "scale": 0.5}, headers=ADMIN)
    assert (answer.status, answer.json) == (200, {"id": "new", "path": path, "scale": 0.5})
    assert loaded.loras["new"]["path"] == path
    assert ask(admin, "chat", {"model": "fake+new"}).status == 200
    assert services.models.get("fake").resident.n_leases == 0
    loaded.lora_error = AdapterMismatch("new.gguf: it is for the architecture 'x', the model's is 'fake'")
    answer = admin.post(ADAPTERS, {"path": path}, headers=ADMIN)
    assert (answer.status, answer.error["code"]) == (400, "adapter_mismatch")
    assert services.models.get("fake").resident.n_leases == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"path": "/x", "reference": "y"}, 400),
        ({"path": "relative.gguf"}, 400),
        ({"path": "/x", "scales": 1}, 400),
        ({"path": "/x", "scale": "much"}, 400),
        ({"path": "/x\0"}, 400),
        ({"reference": "/no/such/file.gguf"}, 404),
    ],
)
def test_bad_bodies(admin: Client, loaded: FakeEngine, body: dict[str, object], status: int) -> None:
    assert admin.post(ADAPTERS, body, headers=ADMIN).status == status
    assert set(loaded.loras) == {"a", "b"}


def test_files_take_the_admin_key(client: Client, loaded: FakeEngine) -> None:
    for body in ({"path": "/x/y.gguf"}, {"reference": "/x/y.gguf"}):
        answer = client.post(ADAPTERS, body)
        assert (answer.status, answer.error["type"]) == (403, "permission_error")
    assert set(loaded.loras) == {"a", "b"}


def test_writes_take_the_admin_key(admin: Client, loaded: FakeEngine) -> None:
    assert admin.post(ADAPTERS, {"path": "/x/y.gguf"}).status in (401, 403)
    assert delete(admin, f"{ADAPTERS}/a").status in (401, 403)
    assert set(loaded.loras) == {"a", "b"}
    assert delete(admin, f"{ADAPTERS}/a", ADMIN).status == 200


def test_another_engine_does_not_take_over_under_adapters(
    client: Client, loaded: FakeEngine, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path, **options: object) -> None:
        raise NeedsAnotherEngine("another model")

    monkeypatch.setattr(loaded.weights, "swap", refuses, raising=False)
    services.swaps = Swaps(services.models, lambda *_: Target(Path("x"), "x", "x"), lambda *_: FakeEngine())
    for kv in ("auto", "drain"):
        answer = client.post("/internal/models/fake/swap", {"to": "Q4_0", "kv": kv})
        assert (answer.status, answer.error["code"]) == (409, "model_busy")
        assert "unload them before" in answer.error["message"]


def test_adapters_in_the_name_are_found_in_any_case(client: Client, engine: FakeEngine) -> None:
    engine.loras = {"SQL": {}, "b": {}}
    answer = client.post("/v1/completions", {"model": "FAKE+sql+B", "prompt": "x"})
    assert answer.status == 200 and answer.json["model"] == "fake+SQL+b"
    assert engine.requests[-1].lora == (LoraUse("SQL"), LoraUse("b"))
    assert client.get("/v1/models/fake+sql").json["id"] == "fake+SQL"


def test_a_name_with_capitals_in_every_place(config: ServeConfig) -> None:
    services = Services(config, ModelManager([("MyModel", FakeEngine("MyModel"))]))
    client = Client(create_app(config, services.models, services), services)
    for asked in ("mymodel", "MyModel", "MYMODEL"):
        assert client.post("/v1/completions", {"model": asked, "prompt": "x"}).json["model"] == "MyModel"
        assert client.get(f"/v1/models/{asked}").json["id"] == "MyModel"
        assert client.get(f"/internal/models/{asked}/adapters").json["model"] == "MyModel"
        assert client.get("/internal/kv", query=f"model={asked}").json["model"] == "MyModel"
    services.close()
