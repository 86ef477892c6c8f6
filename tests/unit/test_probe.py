"""How a child's end is read, and what is remembered; no child is started."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models_support import make_gguf

from mullama.errors import ModelLoadError
from mullama.models.child import probe
from mullama.models.child.probe import ProbeResult, Verdicts, check_model


def told(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def verdict(out: bytes, status: int, err: bytes = b"", late: float = 0) -> ProbeResult:
    return probe._verdict(*probe._told(out), status, err, 12, late)


GOOD = {"ok": True, "finite": True, "template": "ok", "wall_ms": 5}


def test_a_good_end() -> None:
    found = verdict(told({"stage": "loading"}, {"stage": "decoding one token"}, GOOD), 0)
    assert found == ProbeResult(True, "", "decoding one token", True, "ok", 12)


def test_the_reason_of_llama_cpp_comes_through_in_one_line() -> None:
    found = verdict(told({"stage": "loading"}, {"ok": False, "reason": "m.gguf: no\n tensors"}), 0)
    assert (found.ok, found.reason, found.lasting) == (False, "m.gguf: no tensors", True)


@pytest.mark.parametrize(
    ("status", "late", "words", "lasting"),
    [
        (-signal.SIGABRT, 0, "loading crashed a test process (SIGABRT): GGML_ASSERT(x) failed", True),
        (-signal.SIGSEGV, 0, "loading crashed a test process (SIGSEGV): GGML_ASSERT(x) failed", True),
        (-signal.SIGKILL, 9.0, "loading hung: a test process was stopped after 9 seconds: GGML_ASSERT", True),
        (-signal.SIGXCPU, 0, "loading hung: a test process was stopped for using too much processor time", True),
        (-signal.SIGKILL, 0, "loading in a test process was killed", False),
        (3, 0, "loading ended a test process with status 3", False),
    ],
)
def test_a_bad_end(status: int, late: float, words: str, lasting: bool) -> None:
    found = verdict(told({"stage": "loading"}), status, b"GGML_ASSERT(x)\n  failed\n", late)
    assert not found.ok and found.reason.startswith(words) and found.lasting is lasting


def test_memory() -> None:
    for out, status, err in (
        (told({"stage": "loading"}, {"ok": False, "reason": "x", "memory": True}), 0, b""),
        (told({"stage": "loading"}), 1, b"MemoryError"),
    ):
        found = verdict(out, status, err)
        assert found.reason == "loading needs more memory than a file of this size may take"


def test_a_good_word_before_a_crash_does_not_count() -> None:
    assert not verdict(told(GOOD), -signal.SIGSEGV).ok


@given(st.binary(max_size=200), st.integers(-64, 255), st.binary(max_size=600))
def test_any_end_is_a_verdict(out: bytes, status: int, err: bytes) -> None:
    found = verdict(out, status, err)
    assert not found.ok and found.reason and "\n" not in found.reason and len(found.reason) < 600


def test_last_words_do_not_steer_the_terminal() -> None:
    assert "\x1b" not in verdict(b"", -6, b"\x1b[2Jgone").reason


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.gguf"
    file.write_bytes(make_gguf())
    return file


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    versions: list[object] = [1, "0.1", "b1"]
    monkeypatch.setattr(probe, "_versions", lambda: list(versions))
    return versions


def test_verdicts_hold_as_long_as_the_file(path: Path, tmp_path: Path, version: list[object]) -> None:
    verdicts = Verdicts(tmp_path / "home")
    assert verdicts.find(path, None) is None
    good = ProbeResult(True, stage="x", finite=False, template="none", wall_ms=3)
    verdicts.note(path, None, good)
    assert verdicts.find(path, None) == good
    assert verdicts.find(path, "ab" * 32) is None, "a digest has a verdict of its own"
    version[2] = "b2"
    assert verdicts.find(path, None) is None
    version[2] = "b1"
    path.write_bytes(path.read_bytes() + b"\0")
    assert verdicts.find(path, None) is None


def test_a_replaced_verdict_is_whole(path: Path, tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "home")
    for reason in ("one", "two"):
        verdicts.note(path, None, ProbeResult(False, reason))
    (record,) = (tmp_path / "home" / "verdicts").iterdir()
    assert json.loads(record.read_text())["verdict"] == asdict(ProbeResult(False, "two"))


def test_what_does_not_last_is_not_remembered(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fake(path: Path, *, timeout_s: float | None = None) -> ProbeResult:
        calls.append("probe")
        return ProbeResult(False, "the machine was short of memory", lasting=False)

    monkeypatch.setattr(probe, "probe", fake)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="short of memory"):
            check_model(path, root=tmp_path)
    assert len(calls) == 2


def test_a_truncated_file_needs_no_child(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", None)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelLoadError, match="truncated"):
        check_model(path, root=tmp_path)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        check_model(tmp_path / "none.gguf", root=tmp_path)


def test_a_wrong_digest_needs_no_child(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", None)
    with pytest.raises(ModelLoadError, match="damaged or was replaced"):
        check_model(path, digest="0" * 64, root=tmp_path)
