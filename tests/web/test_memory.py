"""/internal/memory: the sums, and who may ask."""

from __future__ import annotations

import pytest

from mullama.config import ServeConfig
from mullama.errors import EngineDead
from mullama.observe import process_memory
from mullama.observe.process_memory import ProcessMemory
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.services import Services

from .conftest import Client
from .fake_engine import FakeEngine

MEMORY = "/internal/memory"


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = ProcessMemory(rss=20_000, pss=18_000, anonymous=12_000, file=8_000, swapped=0)
    monkeypatch.setattr(process_memory, "process_memory", lambda: now)
    monkeypatch.setattr(process_memory, "baseline", lambda: 5_000)


@pytest.mark.usefixtures("process")
def test_the_parts_add_up(client: Client) -> None:
    body = client.get(MEMORY).json
    assert list(body["models"]) == ["fake", "other"]
    # Two engines of 3,000 of which 1,000 are pages of the model's file; the other 6,000 file pages are libraries.
    assert body["process"]["libraries_bytes"] == 6_000
    assert body["total_bytes"] == 2 * 3_000 + 6_000 + 5_000
    assert body["unaccounted_bytes"] == 20_000 - body["total_bytes"]
    assert (body["process"]["rss_bytes"], body["process"]["pss_bytes"]) == (20_000, 18_000)
    assert body["models"]["fake"]["kv"]["used_bytes"] == 70


@pytest.mark.usefixtures("process")
def test_one_model(client: Client) -> None:
    body = client.get(MEMORY, query="model=other").json
    assert list(body["models"]) == ["other"]
    assert (body["total_bytes"], body["unaccounted_bytes"], body["process"]["libraries_bytes"]) == (3_000, None, None)
    result = client.get(MEMORY, query="model=x")
    assert (result.status, result.error["code"]) == (404, "model_not_found")


def test_a_system_that_says_nothing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "process_memory", lambda: None)
    body = client.get(MEMORY).json
    assert (body["process"], body["unaccounted_bytes"], body["total_bytes"]) == (None, None, 6_000)


def test_a_model_that_goes_meanwhile_is_left_out(client: Client, engine: FakeEngine) -> None:
    engine.memory_error = EngineDead("the engine of 'fake' is not running")
    assert list(client.get(MEMORY).json["models"]) == ["other"]
    assert client.get(MEMORY, query="model=fake").status == 503


def test_file_names_have_no_folders(client: Client) -> None:
    process = client.get(MEMORY).json["process"]
    if process is None:
        pytest.skip("this system does not tell")
    assert 0 < len(process["mappings"]) <= 20
    assert not any("/" in mapping["file"] for mapping in process["mappings"])


def test_it_takes_a_key(engine: FakeEngine) -> None:
    config = ServeConfig(api_key=["k"])
    services = Services(config, ModelManager([("fake", engine)]))
    client = Client(create_app(config, services.models, services), services)
    assert client.get(MEMORY).status == 401
    assert client.get(MEMORY, headers={"Authorization": "Bearer k"}).status == 200
    services.close()
