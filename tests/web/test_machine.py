"""/internal/machine: the same object as ``mullama doctor --json``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mullama.config import ServeConfig
from mullama.installation import libraries
from mullama.serving.readiness import look_around
from mullama.web.app import create_app
from mullama.web.services import Services

from .conftest import Client

MACHINE = "/internal/machine"


def test_the_machine(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "faults", list)
    body = client.get(MACHINE).json
    assert body["threads"]["online"] == os.cpu_count()
    assert body["threads"]["used"] >= 1
    assert body["processor"]["architecture"]
    assert body["memory"]["free_bytes"] is None or body["memory"]["free_bytes"] > 0
    assert set(body["folders"]) == {"store", "pages"}
    assert body["ways"] == [] or all(isinstance(way, dict) for way in body["ways"])
    assert body["faults"] == []


def test_it_has_what_doctor_has(client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "store"))
    _, report = look_around(ServeConfig())
    assert client.get(MACHINE).json.keys() == report.keys()
    assert not (tmp_path / "store").exists()  # it was tried, and nothing is left


def test_what_goes_wrong_while_it_runs_is_told(services: Services, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    client = Client(create_app(ServeConfig(page_dir=str(in_the_way)), services.models, services), services)
    (fault,) = [line for line in client.get(MACHINE).json["faults"] if "page folder" in line]
    assert fault.startswith(f"nothing can be written to the page folder {in_the_way}: ")
