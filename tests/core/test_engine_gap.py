"""A change of weights where memory does not hold both: a pause, and nothing is dropped, whatever fails on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_support import greedy
from weights_support import PROMPTS, Streams, begins_alike, request, requests, run, say, wait_for_tokens

from mullama.engine.engine import Engine
from mullama.engine.memory import fits
from mullama.engine.weights import change_with_gap, load
from mullama.engine.weights.change_with_gap import Needs, decide
from mullama.errors import (
    EngineDead,
    InvalidRequest,
    LoadCancelled,
    MemoryTooSmall,
    ModelLoadError,
    NeedsAnotherEngine,
    ShuttingDown,
)
from mullama.machine import memory
from mullama.models.files.estimate import Estimate
from mullama.types import FinishReason, GapMode, KvMode, MemoryLeft, Preempt, Request

ONE = MemoryLeft(beside=0, alone=1 << 40)  # a budget that holds one only


@pytest.mark.parametrize("kv", ["carry", "recompute", "auto"])
def test_twin_weights_change_nothing(make_engine: Callable[..., Engine], twin: Path, kv: str) -> None:
    plain = run(make_engine(), requests()).texts
    engine = make_engine()
    reports: list[Any] = []
    streams = run(
        engine, requests(), lambda: reports.append(engine.weights.swap(twin, kv=kv, label="twin", memory_left=ONE))
    )
    (report,) = reports
    assert streams.texts == plain if kv != "recompute" else begins_alike(streams, plain)
    assert (report.mode, report.kv) == ("gap", "recompute" if kv == "recompute" else "carry")
    assert report.gap_ms >= report.load_ms > 0
    assert report.pause_ms >= report.load_ms
    assert (report.sequences_moved, report.sequences_recomputed) == ((0, 4) if kv == "recompute" else (4, 0))
    assert (report.bytes_moved > 0) is (kv != "recompute")
    assert engine.info.weights == "twin"
    assert Path(engine.info.path) == twin == Path(engine.model.path)
    assert engine.counters()["weight_swaps"] == 1
    for spans in streams.spans:
        assert [name for name, _ in spans] == [report.weights_from, "twin"]
        assert spans[0][1] == 0 < spans[1][1] < 440


def test_with_room_for_both_there_is_no_gap(make_engine: Callable[..., Engine], twin: Path) -> None:
    report = make_engine().weights.swap(twin, memory_left=MemoryLeft(1 << 40, 1 << 40))
    assert (report.mode, report.gap_ms) == ("beside", None)


def test_short_memory_is_seen(make_engine: Callable[..., Engine], twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    needs = engine.call(lambda: change_with_gap.needs_of(engine._core)).result()
    new = fits.expected(twin, engine.config, n_ctx=512, n_parallel=4)
    assert new is not None
    monkeypatch.setattr(memory, "available_memory", lambda: change_with_gap.beside_bytes(new) - 1)
    assert needs.own > 1
    assert engine.weights.swap(twin).mode == "gap"
    with pytest.raises(MemoryTooSmall, match="with a gap"):
        engine.weights.swap(twin, gap="never")
    monkeypatch.setattr(memory, "available_memory", lambda: new.total - needs.own - (1 << 20))
    with pytest.raises(MemoryTooSmall, match="without the old weights"):
        engine.weights.swap(twin)
    assert engine.counters()["weight_swaps"] == 1


def estimate_of(total: int) -> Estimate:
    return Estimate(512, 4, 0, total, {}, 0, 0)


@pytest.mark.parametrize(
    ("total", "kv_bytes", "kv", "free", "room", "expected"),
    [
        (50, 10, KvMode.AUTO, 100, None, None),
        (50, 10, KvMode.AUTO, None, None, None),
        (50, 10, KvMode.AUTO, None, MemoryLeft(49, 100), KvMode.AUTO),
        (50, 10, KvMode.CARRY, 49, MemoryLeft(99, 99), KvMode.CARRY),
        (50, 50, KvMode.AUTO, 49, None, KvMode.RECOMPUTE),  # what is saved does not fit beside the old weights
        (75, 10, KvMode.AUTO, 49, None, KvMode.RECOMPUTE),  # nor beside the new ones
        (75, 10, KvMode.RECOMPUTE, 49, None, KvMode.RECOMPUTE),
        (75, 10, KvMode.CARRY, 49, None, "save 0 MiB of KV"),
        (80, 0, KvMode.AUTO, 49, None, "without the old weights"),
        (50, 0, KvMode.AUTO, 1000, MemoryLeft(0, 49), "without the old weights"),
    ],
)
def test_the_decision(
    total: int, kv_bytes: int, kv: KvMode, free: int | None, room: MemoryLeft | None, expected: KvMode | str | None
) -> None:
    """The old weights are 30 bytes of the process's own."""

    def asked() -> KvMode | None:
        return decide("x.gguf", estimate_of(total), Needs(30, kv_bytes), free, room, GapMode.AUTO, kv)

    if isinstance(expected, str) and not isinstance(expected, KvMode):
        with pytest.raises(MemoryTooSmall, match=expected):
            asked()
    else:
        assert asked() is expected


def test_what_nobody_can_estimate_is_loaded_beside() -> None:
    assert decide("x.gguf", None, Needs(1, 1), 0, MemoryLeft(0, 0), GapMode.AUTO, KvMode.AUTO) is None


def test_many_gaps_with_requests_coming_and_going(make_engine: Callable[..., Engine], twin: Path) -> None:
    plain = {prompt: say(make_engine(), list(prompt.encode()), 60) for prompt in PROMPTS}
    engine = make_engine(parallel=3, scheduler="round_robin")
    old = Path(engine.info.path)
    stop, failures = threading.Event(), []

    def client(seed: int) -> None:
        turn = seed
        while not stop.is_set():
            prompt, how = PROMPTS[turn % len(PROMPTS)], list(Preempt)[turn % len(Preempt)]
            generation = engine.submit_sync(request("r", prompt, 60, preempt=how))
            text = "".join(delta.text for delta in generation)
            if text != plain[prompt]:
                failures.append(f"{generation.finish}: {text} instead of {plain[prompt]}")
            turn += 1

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for i in range(12):
        engine.weights.swap([twin, old][i % 2], kv="carry", memory_left=ONE)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert engine.counters()["weight_swaps"] == 12
    assert engine.kv.audit() == []


@pytest.mark.parametrize("kv", ["carry", "recompute"])
def test_new_weights_that_fail_bring_the_old_ones_back(
    make_engine: Callable[..., Engine], twin: Path, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(make_engine(), requests()).texts
    engine = make_engine()
    old, right = engine.info.path, load.load_model
    tried: list[str] = []

    def loads(path: Any, *args: Any) -> Any:
        tried.append(str(path))
        if Path(path) == twin:
            raise ModelLoadError("no such luck")
        return right(path, *args)

    def try_it() -> None:
        with pytest.raises(ModelLoadError, match="no such luck; the old weights are in charge again, after a gap of"):
            engine.weights.swap(twin, kv=kv, memory_left=ONE)

    monkeypatch.setattr(load, "load_model", loads)
    streams = run(engine, requests(), try_it)
    # What was given up is computed again, so that its last bits may differ.
    n = 440 if kv == "carry" else 20
    assert [text[:n] for text in streams.texts] == [text[:n] for text in plain]
    assert tried == [str(twin), old]
    assert engine.counters()["weight_swaps"] == 0
    assert engine.info.path == engine.model.path == old
    monkeypatch.setattr(load, "load_model", right)
    assert engine.weights.swap(twin, kv=kv, memory_left=ONE).mode == "gap"


def test_a_cancelled_load_brings_the_old_ones_back(make_engine: Callable[..., Engine], twin: Path) -> None:
    engine = make_engine()
    with pytest.raises(LoadCancelled, match="in charge again"):
        engine.weights.swap(twin, memory_left=ONE, progress=lambda fraction: False)
    assert say(engine, [104, 105])


def test_a_load_that_takes_for_ever_is_given_up(
    make_engine: Callable[..., Engine], twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_with_gap, "MAX_GAP_S", 0.0)
    engine = make_engine()
    with pytest.raises(LoadCancelled, match="in charge again"):
        engine.weights.swap(twin, memory_left=ONE)
    assert say(engine, [104, 105])


def test_without_any_weights_every_request_gets_an_error(
    make_engine: Callable[..., Engine], twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    streams = Streams(engine, requests())
    wait_for_tokens(engine, 20)

    def loads(path: Any, *args: Any) -> Any:
        raise ModelLoadError(f"{Path(path).name} is gone")

    monkeypatch.setattr(load, "load_model", loads)
    with pytest.raises(EngineDead, match=r"twin\.gguf is gone.*, and the old ones not again"):
        engine.weights.swap(twin, memory_left=ONE)
    streams.join()
    for generation in streams.generations:
        assert generation.finish is not None
        assert generation.finish.reason is FinishReason.ERROR
        assert "stopped" in str(generation.finish.error), "the reason is for the log"
    assert not engine.is_ready()
    with pytest.raises(EngineDead, match="stopped"):
        engine.submit_sync(request("late", "the sun"))


def test_requests_of_the_gap_wait(make_engine: Callable[..., Engine], twin: Path) -> None:
    """They are tokenised, queued, cancelled as ever; so is the engine ready."""
    engine = make_engine()
    texts: list[str] = []
    threads: list[threading.Thread] = []

    def meanwhile(fraction: float) -> bool:
        if not threads:
            assert engine.tokenize("ab") == plain_tokens
            assert engine.detokenize(plain_tokens) == "ab"
            assert engine.is_ready()
            dropped = engine.submit_sync(request("dropped", "the sun"))
            dropped.cancel()
            waiting = engine.submit_sync(Request("waits", [104, 105], greedy(5)))
            threads.append(threading.Thread(target=lambda: texts.append("".join(one.text for one in waiting))))
            threads.append(threading.Thread(target=lambda: list(dropped)))
            for thread in threads:
                thread.start()
        return True

    plain_tokens = engine.tokenize("ab")
    plain = say(make_engine(), [104, 105])
    assert engine.weights.swap(twin, memory_left=ONE, progress=meanwhile).mode == "gap"
    for thread in threads:
        thread.join()
    assert texts == [plain]


def test_closing_in_the_gap(make_engine: Callable[..., Engine], twin: Path) -> None:
    engine = make_engine()
    streams = Streams(engine, requests())
    wait_for_tokens(engine, 20)
    closing = threading.Thread(target=engine.close)

    def close(fraction: float) -> bool:
        if not closing.is_alive():
            closing.start()
            while not engine._commands.stopping:
                pass
        return True

    with pytest.raises((ShuttingDown, EngineDead)):
        engine.weights.swap(twin, memory_left=ONE, progress=close)
    closing.join()
    streams.join()
    assert all(g.finish is not None and g.finish.reason is FinishReason.ERROR for g in streams.generations)


def test_other_shapes_do_not_take_the_place(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path]
) -> None:
    engine = make_engine()
    with pytest.raises(NeedsAnotherEngine):
        engine.weights.swap(tiny_model("gemma3"), memory_left=ONE)
    with pytest.raises(InvalidRequest, match="gap must be one of auto, never"):
        engine.weights.swap(tiny_model(), gap="perhaps")
    turned = tiny_model("llama", rope_base=5000.0)
    with pytest.raises(InvalidRequest, match="rope"):
        engine.weights.swap(turned, kv="carry", memory_left=ONE)
    assert engine.weights.swap(turned, memory_left=ONE).kv == "recompute"


@pytest.mark.parametrize("arch", ["gemma3", "mamba", "lfm2"])
def test_every_kind_of_memory(make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], arch: str) -> None:
    path = tiny_model(arch)
    plain = run(make_engine(path), requests()).texts
    engine = make_engine(path)
    streams = run(engine, requests(), lambda: engine.weights.swap(path, kv="carry", memory_left=ONE))
    assert begins_alike(streams, plain)
    assert streams.texts == plain or arch == "gemma3"


def test_carried_prefixes_are_marked_and_the_disk_tier_follows(
    make_engine: Callable[..., Engine], other: Path, tmp_path: Path
) -> None:
    prompt = list(b"the sun and the others are all here and so am I, and then some more of it")
    engine = make_engine(kv_disk_dir=str(tmp_path / "kv"))
    say(engine, prompt)
    engine.weights.swap(other, kv="carry", memory_left=ONE)
    generation = engine.submit_sync(Request("again", [*prompt, 65], greedy(5)))
    list(generation)
    assert generation.finish is not None
    assert generation.finish.profile.kv_cache_hit >= len(prompt)
    engine.close()
    again = make_engine(other, kv_disk_dir=str(tmp_path / "kv"))
    generation = again.submit_sync(Request("carried", [*prompt, 65], greedy(5)))
    list(generation)
    assert generation.finish is not None
    assert generation.finish.profile.kv_cache_hit == 0
