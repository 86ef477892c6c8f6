"""LoRA adapters over changes of the weights and over sleep: requests go on with theirs, on the new weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
from core_support import greedy
from homes import home
from weights_support import PROMPTS, Streams, begins_alike, run

from mullama.engine.engine import Engine
from mullama.engine.weights.loras import Loras
from mullama.errors import AdapterMismatch, BadModelFile, ModelBusy, ModelLoadError, NeedsAnotherEngine
from mullama.types import LoraUse, MemoryLeft, Preempt, Request

GAP = MemoryLeft(beside=0, alone=1 << 40)  # a budget that does not hold both weights
A, B = LoraUse("a"), LoraUse("b", 0.5)
SETS: list[tuple[LoraUse, ...]] = [(A,), (), (B,), (A, B)]


@pytest.fixture
def make(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Engine]:
    """An engine with the adapters ``a`` and ``b``."""
    monkeypatch.setenv("MULLAMA_HOME", home(tmp_path / "home"))
    files = [adapters.build(tmp_path / f"{name}.gguf", tiny_model(), seed=ord(name)) for name in "ab"]

    def get(path: Path | None = None, **options: Any) -> Engine:
        engine = make_engine(path, **options)
        for file in files:
            engine.weights.load_lora(file)
        return engine

    return get


def requests(n: int = 440, **more: Any) -> list[Request]:
    return [
        Request(f"r{i}", list(prompt.encode()), greedy(n), lora=uses, **more)
        for i, (prompt, uses) in enumerate(zip(PROMPTS, SETS, strict=True))
    ]


def known(engine: Engine, path: Path) -> None:
    """Let it be remembered that the adapters fit a file: finding out takes longer than the streams of a test."""
    engine._loras.check_on(path)


def texts(engine: Engine, n: int = 20) -> list[str]:
    return Streams(engine, requests(n)).join()


@pytest.mark.parametrize("room", [None, GAP], ids=["beside", "gap"])
@pytest.mark.parametrize("kv", ["carry", "recompute"])
def test_twin_weights_change_nothing(make: Callable[..., Engine], twin: Path, kv: str, room: MemoryLeft | None) -> None:
    plain = run(make(deterministic=True), requests()).texts
    assert len(set(plain)) == 4
    engine = make(deterministic=True)
    known(engine, twin)
    reports: list[Any] = []
    streams = run(
        engine, requests(), lambda: reports.append(engine.weights.swap(twin, kv=kv, memory_left=room, label="new"))
    )
    assert streams.texts == plain if kv == "carry" else begins_alike(streams, plain)
    (report,) = reports
    assert (report.kv, report.mode) == (kv, "beside" if room is None else "gap")
    assert [[name for name, _ in spans][-1] for spans in streams.spans] == ["new"] * 4
    engine.call(lambda: None).result()  # what has ended is put away
    assert [(one["id"], one["requests"]) for one in engine.weights.loras()] == [("a", 0), ("b", 0)]
    assert texts(engine) == [text[:20] for text in plain] if kv == "carry" else texts(engine)
    assert engine.kv.audit() == []
    engine.weights.unload_lora("a")
    engine.weights.unload_lora("b")


def test_preempted_and_waiting_requests_go_on_with_theirs(make: Callable[..., Engine], twin: Path) -> None:
    """Room for two of four, so that two are out of their slots when the weights change."""
    for how in Preempt:
        options: dict[str, Any] = {"scheduler": "round_robin", "parallel": 2, "kv_host_bytes": 0, "deterministic": True}
        plain = run(make(**options), requests(200, preempt=how)).texts
        engine = make(**options)
        known(engine, twin)
        streams = run(engine, requests(200, preempt=how), lambda engine=engine: engine.weights.swap(twin))
        assert streams.texts == plain


def test_the_adapters_lie_on_the_new_weights(make: Callable[..., Engine], other: Path) -> None:
    fresh = texts(make(other))
    engine = make()
    before = texts(engine)
    for room in (None, GAP):
        engine.weights.swap(other, kv="recompute", memory_left=room)
        assert texts(engine) == fresh != before
    engine.weights.swap(str(engine.info.path), kv="carry")
    assert texts(engine) == fresh


def test_sleep_keeps_them(make: Callable[..., Engine]) -> None:
    engine = make()
    plain = texts(engine)
    for _ in range(2):
        engine.weights.sleep()
        assert [one["id"] for one in engine.weights.loras()] == ["a", "b"]
        assert engine.memory_report_sync()["adapters"] == []
        engine.weights.wake()
        assert texts(engine) == plain
    engine.weights.sleep()
    engine.weights.unload_lora("a")
    engine.weights.wake()
    assert [one["id"] for one in engine.weights.loras()] == ["b"]
    assert len(engine.memory_report_sync()["adapters"]) == 1


def test_a_file_that_has_gone_or_changed(
    make: Callable[..., Engine], tiny_model: Callable[..., Path], twin: Path, tmp_path: Path
) -> None:
    """The old weights stay with what lies on them, and an engine that sleeps sleeps on."""
    engine = make()
    plain = texts(engine)
    engine.weights.sleep()
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").unlink()
    with pytest.raises(ModelLoadError, match=r"a\.gguf"):
        engine.weights.wake()
    (tmp_path / "a.gguf").write_bytes(data)
    engine.weights.wake()
    assert texts(engine) == plain
    adapters.build(tmp_path / "a.gguf", tiny_model(), seed=77)
    for room in (None, GAP):
        with pytest.raises(BadModelFile, match="'a' has changed"):
            engine.weights.swap(twin, memory_left=room)
    assert texts(engine) == plain
    assert engine.counters()["weight_swaps"] == 0


def test_what_the_adapters_do_not_fit_is_refused(
    make: Callable[..., Engine], tiny_model: Callable[..., Path], twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of another shape gets an engine of its own, where whoever asks for one sees to the adapters."""
    engine = make()
    plain = texts(engine)
    with pytest.raises(NeedsAnotherEngine):
        engine.weights.swap(tiny_model("gemma3"))

    def mismatch(path: Path, base: Path) -> None:
        raise AdapterMismatch(f"{path}: it changes a tensor which the model does not have")

    monkeypatch.setattr("mullama.engine.weights.loras.check_adapter", mismatch)
    with pytest.raises(ModelBusy, match=r"'a' does not fit the new weights.*unload it first"):
        engine.weights.swap(twin)
    assert texts(engine) == plain


def test_a_swap_that_fails_leaves_them(
    make: Callable[..., Engine], twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    plain = texts(engine)

    def fails(self: Loras, model: Any) -> None:
        raise BadModelFile("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(Loras, "twins", fails)
        with pytest.raises(BadModelFile, match="no such luck"):
            engine.weights.swap(twin)
    calls = []
    load_all = Loras.load_all

    def fails_once(self: Loras, model: Any) -> None:
        calls.append(model)
        if len(calls) == 1:
            raise BadModelFile("no such luck")
        load_all(self, model)

    monkeypatch.setattr(Loras, "load_all", fails_once)
    with pytest.raises(ModelLoadError, match="no such luck; the old weights are in charge again"):
        engine.weights.swap(twin, memory_left=GAP)
    assert len(calls) == 2
    assert texts(engine) == plain
