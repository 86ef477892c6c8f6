"""Models, health, /internal, the profile log."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mullama.config import ServeConfig
from mullama.errors import ConfigError, ModelNotFound
from mullama.serving.manager import ModelManager
from mullama.types import Finish, FinishReason, Profile
from mullama.web.app import create_app
from mullama.web.profile_log import ProfileLog
from mullama.web.services import Services

from .conftest import Client
from .fake_engine import FakeEngine


def test_models_are_listed_in_order(client: Client) -> None:
    body = client.get("/v1/models").json
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["fake", "other"]
    model = body["data"][0]
    assert (model["object"], model["created"], model["owned_by"]) == ("model", 1_700_000_000, "mullama")
    assert model["max_model_len"] == model["meta"]["n_ctx"] == 4096


def test_one_model(client: Client) -> None:
    assert client.get("/v1/models/other").json["id"] == "other"
    result = client.get("/v1/models/nope")
    assert (result.status, result.error["code"]) == (404, "model_not_found")


def test_a_model_s_name_may_hold_slashes() -> None:
    models = ModelManager([("org/name:q4", FakeEngine())])
    services = Services(ServeConfig(), models)
    client = Client(create_app(services.config, models, services), services)
    assert client.get("/v1/models/org/name:q4").json["id"] == "org/name:q4"
    services.close()


def test_health_and_ready(client: Client, engine: FakeEngine) -> None:
    assert client.get("/health").json == {"status": "ok"}
    assert client.request("HEAD", "/ready", b"", {}).status == 200
    assert client.get("/ready").json == {"status": "ready", "models": {"fake": True, "other": True}}
    engine.is_up = False
    result = client.get("/ready")
    assert result.status == 503
    assert result.json == {"status": "not ready", "models": {"fake": False, "other": True}}
    assert result.headers["retry-after"] == "1"
    assert client.get("/health").status == 200


def test_without_models_nothing_is_ready() -> None:
    models = ModelManager()
    assert not models.ready
    with pytest.raises(ModelNotFound, match="no model"):
        models.resolve(None)


def test_a_name_is_served_once() -> None:
    with pytest.raises(ConfigError, match="two models"):
        ModelManager([("a", FakeEngine()), ("a", FakeEngine())])


def test_internal_views(client: Client) -> None:
    assert client.get("/internal/scheduler").json == {"model": "fake", "policy": "fcfs", "waiting": [], "running": []}
    assert client.get("/internal/kv", query="model=other").json["model"] == "other"
    dropped = client.post("/internal/kv/drop", {}).json
    assert (dropped["model"], dropped["cells_freed"]) == ("fake", 7)
    for result in (client.get("/internal/kv", query="model=x"), client.post("/internal/kv/drop", {}, query="model=x")):
        assert (result.status, result.error["code"]) == (404, "model_not_found")
    assert client.get("/internal/kv/drop").status == 405


def test_every_request_has_a_line_in_the_profile_log(tmp_path: Path, engine: FakeEngine) -> None:
    path = tmp_path / "profiles.jsonl"
    path.write_text('{"earlier": true}\n')
    config = ServeConfig(profile_log=str(path))
    services = Services(config, ModelManager([("fake", engine)]))
    client = Client(create_app(config, services.models, services), services)
    message = [{"role": "user", "content": "hi"}]
    headers = {"X-Request-ID": "mine"}
    reply = client.post("/v1/chat/completions", {"messages": message, "user": "ann"}, headers=headers).json
    client.post("/v1/completions", {"prompt": ["a", "b"], "stream": True})
    engine.fail_after, engine.failure = 1, ValueError("boom")
    client.post("/v1/completions", {"prompt": ["a", "b"]})
    services.close()
    services.close()
    earlier, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert earlier == {"earlier": True}
    assert len(lines) == 5
    first = lines[0]
    assert first["id"] == reply["id"]
    assert (first["model"], first["endpoint"], first["user"]) == ("fake", "chat.completions", "ann")
    assert (first["finish_reason"], first["stream"], first["completion_tokens"]) == ("stop", False, 4)
    assert first["time"] > 1_700_000_000
    assert first["request_id"] == "mine" and len({line["request_id"] for line in lines}) == 3
    assert [line["stream"] for line in lines[1:3]] == [True, True]
    assert lines[3]["finish_reason"] == "error" and lines[3]["error"] == "boom"
    assert len({line["id"] for line in lines}) == 5


def test_a_profile_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--profile-log: cannot write") as caught:
        ProfileLog(str(tmp_path / "no" / "folder.jsonl"))
    assert "\n" not in str(caught.value)


def test_the_profile_log_loses_nothing_at_close(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    log = ProfileLog(str(path))
    finish = Finish(FinishReason.STOP, Profile())

    def write() -> None:
        for _ in range(200):
            log.write({"id": "x"}, finish)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    log.close()
    log.write({"id": "late"}, finish)
    assert len(path.read_text().splitlines()) == 600


@pytest.mark.parametrize(
    ("method", "path", "asked", "body"),
    [
        ("GET", "/internal/kv", "kv.asnapshot", None),
        ("GET", "/internal/scheduler", "planning.snapshot", None),
        ("PUT", "/internal/scheduler", "planning.aset_policy", {"policy": "fair"}),
        ("POST", "/internal/kv/drop", "kv.adrop", {}),
    ],
)
def test_internal_endpoints_hold_the_engine(
    client: Client, services: Services, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch,
    method: str, path: str, asked: str, body: dict[str, Any] | None,
) -> None:  # fmt: skip
    """A model that is unloaded meanwhile is closed after the look."""
    resident = services.models.get("fake").resident
    assert resident is not None
    held: list[int] = []
    part, _, name = asked.partition(".")
    plain = getattr(getattr(engine, part), name)

    def watched(*args: Any, **options: Any) -> Any:
        held.append(resident.n_leases)
        return plain(*args, **options)

    monkeypatch.setattr(getattr(engine, part), name, watched)
    data = b"" if body is None else json.dumps(body).encode()
    result = client.request(method, path, data, {"Content-Type": "application/json"}, "")
    assert (result.status, held) == (200, [1])
    assert resident.n_leases == 0
    assert services.models.get("fake").n_requests == 0
