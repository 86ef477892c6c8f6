"""SIGHUP: keys are read again, the profile log is opened anew, and a wrong file changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mullama.config import ServeConfig
from mullama.errors import ConfigError
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.reload import Reload
from mullama.web.services import Services

from .conftest import Client
from .fake_engine import FakeEngine

PROMPT = {"prompt": "x"}


class Engine(FakeEngine):
    def counters(self) -> dict[str, int]:
        return {}


class World:
    """An app whose configuration can be changed: ``new`` is what its file says now."""

    def __init__(self, config: ServeConfig) -> None:
        self.new = config
        self.services = Services(replace(config), ModelManager([("fake", Engine())]))
        self.client = Client(create_app(self.services.config, self.services.models, self.services), self.services)
        self.reload = Reload(self.services, lambda: self.new)

    def status(self, key: str, path: str = "/v1/completions", body: object = PROMPT) -> int:
        return self.client.post(path, body, headers={"Authorization": f"Bearer {key}"}).status


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def world(**options: object) -> World:
        made.append(World(ServeConfig(profile_log=str(tmp_path / "p.jsonl"), **options)))  # type: ignore[arg-type]
        return made[-1]

    yield world
    for one in made:
        one.services.close()


def test_keys_come_and_go(make: Callable[..., World]) -> None:
    world = make(api_key=["old", "both"], admin_key="adm")
    assert (world.status("old"), world.status("new")) == (200, 401)
    world.new = replace(world.new, api_key=["both", "new"], admin_key="chief")
    world.reload()
    assert [world.status(key) for key in ("old", "both", "new")] == [401, 200, 200]
    pin = "/internal/models/fake/pin"
    assert [world.status(key, pin, {}) for key in ("adm", "chief")] == [403, 200]
    assert world.services.config.api_key == ["both", "new"]


def test_the_first_keys_close_an_open_server(make: Callable[..., World]) -> None:
    world = make()
    assert world.status("") == 200
    world.new = replace(world.new, api_key=["k"])
    world.reload()
    assert (world.status(""), world.status("k")) == (401, 200)


def test_a_tenant_more_keeps_kv_apart(make: Callable[..., World]) -> None:
    world = make(api_key=["a"])
    security = world.services.security
    assert security is not None and not security._ring.names_tenants
    world.new = replace(world.new, api_key=["a", "b"])
    world.reload()
    assert security._ring.names_tenants


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"api_key": []}, "no API key any more"),
        ({"admin_key": ""}, "no admin key any more"),
    ],
)
def test_a_file_that_lost_its_keys_does_not_open_the_server(
    make: Callable[..., World], caplog: pytest.LogCaptureFixture, change: dict[str, object], says: str
) -> None:
    world = make(api_key=["k"], admin_key="adm")
    world.new = replace(world.new, **change)  # type: ignore[arg-type]
    world.reload()
    assert says in caplog.text and "the keys stay as they are" in caplog.text
    assert (world.status("k"), world.status("")) == (200, 401)
    assert world.services.config.admin_key == "adm"


def test_a_file_that_is_wrong_changes_nothing(make: Callable[..., World], caplog: pytest.LogCaptureFixture) -> None:
    world = make(api_key=["k"])

    def fail() -> ServeConfig:
        raise ConfigError("x.toml is not valid TOML: line 3")

    Reload(world.services, fail)()
    assert "the keys stay as they are: x.toml is not valid TOML" in caplog.text
    assert world.status("k") == 200


def test_what_takes_a_restart_is_named_and_no_key_is_logged(
    make: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    world = make(api_key=["first-secret"])
    world.new = replace(world.new, api_key=["second-secret"], port=1234, max_queue=3)
    world.reload()
    assert "reloaded: api_key" in caplog.text
    assert "a restart is needed for what else has changed: port, max_queue" in caplog.text
    assert "secret" not in caplog.text


def test_the_profile_log_goes_on_in_a_new_file(make: Callable[..., World], tmp_path: Path) -> None:
    world = make()
    world.status("")
    (tmp_path / "p.jsonl").rename(tmp_path / "p.jsonl.1")
    world.status("")
    world.reload()
    world.status("")
    world.services.close()
    lines = [len((tmp_path / name).read_text().splitlines()) for name in ("p.jsonl.1", "p.jsonl")]
    assert lines == [2, 1]


def test_a_profile_log_that_cannot_be_had_goes_on_in_the_old_file(
    make: Callable[..., World], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = make()
    (tmp_path / "p.jsonl").rename(tmp_path / "old")
    (tmp_path / "p.jsonl").mkdir()
    world.reload()
    world.status("")
    world.services.close()
    assert json.loads((tmp_path / "old").read_text())["finish_reason"] == "stop"
    assert "goes on in its old file" in caplog.text
