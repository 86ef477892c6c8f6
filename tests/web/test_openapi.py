"""/openapi.json says what the server does: every route and schema, tried by schemathesis; /docs needs nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mullama.config import ARBITER_POLICIES, ServeConfig
from mullama.errors import InvalidRequest, ReferenceNotFound
from mullama.models.store.background_pulls import Pulls
from mullama.serving.manager import ModelManager
from mullama.web.app import App, create_app
from mullama.web.openai.sampling import RANGES
from mullama.web.openapi.document import build, served
from mullama.web.security import Access
from mullama.web.services import Services

from .conftest import Client, Live
from .fake_engine import FakeEngine
from .test_tells import TellingPlanning, TellingWeights

LONG = bool(os.environ.get("MULLAMA_LONG"))


@pytest.fixture
def app(client: Client) -> App:
    return client.app


@pytest.fixture
def document(app: App) -> dict[str, Any]:
    return build(app.routes)


def test_every_route_has_an_entry(app: App, document: dict[str, Any]) -> None:
    bare = [(one.method, one.path) for one in served(app.routes) if one.operation is None]
    assert bare == [], "give these resources `operations` (mullama/web/openapi/operation.py)"
    for one in served(app.routes):
        entry = document["paths"][one.path][one.method.lower()]
        assert entry["summary"]
        assert (entry["security"] == []) is (one.access is Access.OPEN)
    assert len({entry["operationId"] for of in document["paths"].values() for entry in of.values()}) == len(
        list(served(app.routes))
    )


def test_nothing_is_named_that_is_not_there(document: dict[str, Any]) -> None:
    refs = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    there = set(document["components"]["schemas"])
    assert refs <= there
    assert there - refs == set(), "components that nobody refers to"


def test_ranges_and_fields_are_those_that_are_checked(document: dict[str, Any]) -> None:
    for name in ("ChatBody", "CompletionBody"):
        properties = document["components"]["schemas"][name]["properties"]
        for field, allowed in RANGES.items():
            if field in properties and "max_" not in field and field != "n_predict":
                assert properties[field].items() >= allowed.schema().items()
    chat = document["components"]["schemas"]["ChatBody"]
    assert chat["required"] == ["messages"]
    assert "Ignored" in chat["properties"]["session_id"]["description"]


def test_errors_are_spelled_as_each_api_spells_them(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert set(schemas["OllamaError"]["properties"]) == {"error"}
    assert schemas["OllamaError"]["properties"]["error"] == {"type": "string"}
    assert set(schemas["AnthropicError"]["properties"]) == {"type", "error"}
    assert set(schemas["OpenAIError"]["properties"]["error"]["properties"]) == {"message", "type", "param", "code"}


def test_who_has_no_key_may_read_it_and_it_tells_nothing_of_the_server() -> None:
    found = []
    for options in ({}, {"api_key": ["alice-key"], "admin_key": "admin-key"}):
        config = ServeConfig(**options)  # type: ignore[arg-type]
        services = Services(config, ModelManager([("secret-name", FakeEngine())]))
        client = Client(create_app(config, services.models, services), services)
        result = client.get("/openapi.json")
        assert (result.status, result.headers["content-type"]) == (200, "application/json")
        found.append(result.body)
        assert client.get("/docs").status == 200
        services.close()
    assert found[0] == found[1] and b"secret-name" not in found[0] and b"-key" not in found[0]


def test_the_page_is_whole_in_itself(client: Client) -> None:
    page = client.get("/docs")
    text = page.body.decode()
    assert not re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", text)
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["openapi.json"]
    assert "innerHTML" not in text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and policy.count("'sha256-") == 2 and "unsafe" not in policy


# -- schemathesis ----------------------------------------------------------------------------------------------


class Planning(TellingPlanning):
    """With the checks of the real one."""

    def set_share(self, *, weight: float = 1.0, priority: int = 0) -> None:
        if not (0.01 <= weight <= 100 and -(2**31) <= priority < 2**31):
            raise InvalidRequest("a share is out of range")

    def set_arbiter_policy(self, policy: str) -> None:
        if policy not in ARBITER_POLICIES:
            raise InvalidRequest("there is no such policy", param="policy")


class Served(FakeEngine):
    def __init__(self, name: str = "fake") -> None:
        super().__init__(name)
        self.info = replace(self.info, can_shift=True)
        self.planning = Planning(self)
        self.weights = TellingWeights(self)
        self.loras["style"] = {"scale": 1.0, "path": "/srv/models/secret.gguf", "size_bytes": 10}

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def models() -> Iterator[ModelManager]:
    """Whatever model is named, it is there."""
    models = ModelManager(
        [("fake", Served())],
        load=lambda name, reference, progress: Served(name),  # type: ignore[arg-type, return-value]
        find=lambda name: None if "/" in name else name,
    )
    yield models


def refuse(*args: object, **kwargs: object) -> Any:
    raise ReferenceNotFound("nothing is fetched in a test")


#: An answer that does not end, and other paths of the same.
LEFT_OUT = ["/internal/kv/events", "/chat/completions", "/models", "/tokenize", "/detokenize", "/v1/health"]


@pytest.mark.timeout(1800 if LONG else 300)
def test_schemathesis_finds_nothing(
    live: Callable[..., Live], models: ModelManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pulls, "start", refuse)
    url = live(models=models).url
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--config-file",
        str(Path(__file__).with_name("schemathesis.toml")),
    ]
    command += ["run", f"{url}/openapi.json", "--no-color", "--continue-on-failure"]
    command += ["--checks", "all", "--exclude-checks", "ignored_auth", "--request-timeout", "20"]
    command += [word for path in LEFT_OUT for word in ("--exclude-path", path)]
    command += ["--seed", os.environ.get("MULLAMA_SEED", "1")]
    if LONG:
        command += ["--phases", "coverage,fuzzing", "--mode", "all", "--max-time", "900", "--no-shrink"]
    else:
        command += ["--phases", "coverage", "--mode", "negative", "--max-time", "50"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(result.stdout[-2000:])
    assert result.returncode == 0, result.stdout + result.stderr
