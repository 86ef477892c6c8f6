"""``mullama batch`` against a server of the fake engine."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mullama.cli.main import main
from mullama.cli.server import batch as command

from .conftest import Live
from .fake_engine import FakeEngine
from .test_batches import jsonl, line


@pytest.fixture
def url(live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(command, "LOOK_S", 0.01)
    return live().url


def entries(data: str) -> dict[str, Any]:
    return {one["custom_id"]: one for one in map(json.loads, data.splitlines())}


def test_a_file_goes_up_and_its_answers_come_down(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked, answers, failed = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "failed.jsonl"
    asked.write_bytes(jsonl([*(line(f"n{i}") for i in range(5)), line("bad", temperature=9)]))
    assert main(["batch", str(asked), "-o", str(answers), "--errors", str(failed), "--url", url]) == 0
    assert set(entries(answers.read_text())) == {f"n{i}" for i in range(5)}
    assert set(entries(failed.read_text())) == {"bad"}
    told = capsys.readouterr()
    assert told.out == ""
    assert "completed, 5 answered, 1 failed of 6" in told.err
    assert [one.name for one in tmp_path.glob(".*")] == []


def test_answers_go_to_stdout_and_the_batch_is_json_on_demand(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(jsonl([line("a")]))))
    assert main(["batch", "-", "--url", url]) == 0
    assert set(entries(capsys.readouterr().out)) == {"a"}
    asked = tmp_path / "in.jsonl"
    asked.write_bytes(jsonl([line("b")]))
    assert main(["batch", str(asked), "--detach", "--json", "--url", url]) == 0
    begun = json.loads(capsys.readouterr().out)
    out = tmp_path / "out.jsonl"
    assert main(["batch", begun["id"], "-o", str(out), "--json", "--url", url]) == 0
    assert json.loads(capsys.readouterr().out)["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert set(entries(out.read_text())) == {"b"}


def test_what_is_wrong_is_one_line(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: FakeEngine
) -> None:
    asked = tmp_path / "in.jsonl"
    asked.write_bytes(b"nonsense\n")
    assert main(["batch", str(asked), "--url", url]) == 1
    assert "the batch is failed: this line is no request" in capsys.readouterr().err
    assert main(["batch", str(tmp_path / "none.jsonl"), "--url", url]) == 1
    assert main(["batch", "batch_0", "--url", url]) == 1
    assert "there is no batch" in capsys.readouterr().err
    assert engine.requests == []
