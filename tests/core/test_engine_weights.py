"""Other weights under a running engine: nothing is dropped, and what cannot be done is refused."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_support import greedy, sampled
from weights_support import PROMPTS, Streams, begins_alike, request, requests, run, say, wait_for_tokens

from mullama.engine.engine import Engine
from mullama.engine.weights import change
from mullama.engine.weights.soundness import why_unsound
from mullama.errors import (
    EngineDead,
    InvalidRequest,
    LoadCancelled,
    ModelBusy,
    ModelLoadError,
    NeedsAnotherEngine,
    ShuttingDown,
)
from mullama.types import FinishReason, Preempt, Request


@pytest.mark.parametrize("kv", ["carry", "recompute", "auto"])
def test_twin_weights_change_nothing(make_engine: Callable[..., Engine], twin: Path, kv: str) -> None:
    plain = run(make_engine(), requests()).texts
    engine = make_engine()
    reports: list[Any] = []
    streams = run(engine, requests(), lambda: reports.append(engine.weights.swap(twin, kv=kv, label="twin")))
    (report,) = reports
    assert streams.texts == plain if kv != "recompute" else begins_alike(streams, plain)
    assert report.weights_to == "twin"
    assert report.kv == ("recompute" if kv == "recompute" else "carry")
    assert (report.sequences_moved, report.sequences_recomputed) == ((0, 4) if kv == "recompute" else (4, 0))
    assert report.pause_ms is not None
    assert report.pause_ms > 0
    assert (report.bytes_moved > 0) is (kv != "recompute")
    assert engine.info.weights == "twin"
    assert Path(engine.info.path) == twin
    assert engine.counters()["weight_swaps"] == 1
    for spans in streams.spans:
        assert [name for name, _ in spans] == [report.weights_from, "twin"]
        assert spans[0][1] == 0 < spans[1][1] < 440


def test_what_the_old_weights_took_goes_back_to_the_system(
    make_engine: Callable[..., Engine], twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by ten minutes of chaos: the allocator kept 60 MB after ten changes, and more after hundreds."""
    engine = make_engine()
    old = engine.model
    were_open: list[bool] = []
    monkeypatch.setattr(change, "give_back_heap", lambda: were_open.append(old.is_open))
    engine.weights.swap(twin)
    assert were_open == [False]


@pytest.mark.parametrize("modes", [["carry"], ["carry", "recompute"]], ids=["carry", "both"])
def test_many_swaps_with_requests_coming_and_going(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], twin: Path, modes: list[str]
) -> None:
    """Texts are compared where nothing is computed again: what is may differ in its last bits."""
    plain = {prompt: say(make_engine(), list(prompt.encode()), 80) for prompt in PROMPTS}
    engine = make_engine(parallel=3, scheduler="round_robin")
    rng = random.Random(1)
    stop = threading.Event()
    failures: list[str] = []

    def client(seed: int) -> None:
        mine = random.Random(seed)
        while not stop.is_set():
            prompt, n = mine.choice(PROMPTS), mine.randrange(1, 80)
            generation = engine.submit_sync(request("r", prompt, n, preempt=mine.choice(list(Preempt))))
            text = ""
            for delta in generation:
                text += delta.text
                if mine.random() < 0.003:
                    generation.cancel()
            assert generation.finish is not None
            if generation.finish.reason is FinishReason.LENGTH:
                assert generation.finish.profile.completion_tokens == n
            if generation.finish.reason is FinishReason.LENGTH:
                if modes == ["carry"] and not plain[prompt].startswith(text):
                    failures.append(f"{prompt}: {text} instead of {plain[prompt]}")
            elif generation.finish.reason is not FinishReason.CANCELLED:
                failures.append(f"{generation.finish}")

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    files = [twin, tiny_model()]
    for i in range(20):
        engine.weights.swap(files[i % 2], kv=rng.choice(modes))
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert engine.counters()["weight_swaps"] == 20
    assert engine.kv.audit() == []


def test_retained_prefixes_are_carried_and_marked(make_engine: Callable[..., Engine], other: Path) -> None:
    engine = make_engine()
    prompt = list(b"the sun and the others are all here and so am I, and then some more")
    say(engine, prompt, 5)
    engine.weights.swap(other, kv="carry")
    generation = engine.submit_sync(Request("again", [*prompt, 65], greedy(5)))
    assert sum(delta.n_tokens for delta in generation) == 5
    assert generation.finish is not None
    assert generation.finish.profile.kv_cache_hit >= len(prompt)
    assert [s.weights for s in generation.finish.profile.weights] == [other.stem]


def test_recompute_reuses_nothing_of_the_old_weights(make_engine: Callable[..., Engine], other: Path) -> None:
    engine = make_engine()
    prompt = list(b"the sun and the others are all here and so am I, and then some more")
    say(engine, prompt, 5)
    engine.weights.swap(other, kv="recompute")
    generation = engine.submit_sync(Request("again", [*prompt, 65], greedy(5)))
    text = "".join(delta.text for delta in generation)
    assert generation.finish is not None
    assert generation.finish.profile.kv_cache_hit == 0
    fresh = say(make_engine(other), [*prompt, 65])
    assert text == fresh


def test_carried_kv_never_reaches_the_disk(make_engine: Callable[..., Engine], other: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    prompt = list(b"the sun and the others are all here and so am I, and then some more of it")
    engine = make_engine(kv_disk_dir=str(folder))
    say(engine, prompt, 5)
    engine.weights.swap(other, kv="carry")
    say(engine, [*prompt, 66, 67, *range(68, 100)], 5)
    fresh = list(b"a prompt that only the new weights have ever seen, word for word")
    say(engine, fresh, 5)
    engine.close()
    again = make_engine(other, kv_disk_dir=str(folder))
    carried = again.submit_sync(Request("carried", [*prompt, 66, 67, 68], greedy(2)))
    own = again.submit_sync(Request("own", [*fresh, 66], greedy(2)))
    list(carried), list(own)
    assert carried.finish is not None
    assert own.finish is not None
    assert carried.finish.profile.kv_cache_hit == 0
    assert own.finish.profile.kv_cache_hit >= len(fresh)
    back = make_engine(kv_disk_dir=str(tmp_path / "kv2"))
    back.close()


def test_unsound_carry_is_refused_with_the_reason(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path]
) -> None:
    engine = make_engine()
    turned = tiny_model("llama", rope_base=5000.0)
    with pytest.raises(InvalidRequest, match=r"llama\.rope\.freq_base is 5000"):
        engine.weights.swap(turned, kv="carry")
    assert engine.weights.swap(turned).kv == "recompute"
    with pytest.raises(InvalidRequest, match="architecture is mamba"):
        engine.weights.swap(tiny_model("mamba"), kv="carry")


def test_another_shape_needs_another_engine(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path]
) -> None:
    engine = make_engine()
    before = engine.info
    for arch in ("gemma3", "mamba"):
        with pytest.raises(NeedsAnotherEngine):
            engine.weights.swap(tiny_model(arch))
    with pytest.raises(NeedsAnotherEngine):
        engine.weights.swap(tiny_model(), kv="drain")
    assert engine.info is before
    assert say(engine, [104, 105])


def test_a_bad_file_leaves_the_old_weights(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make_engine()
    plain = run(make_engine(), requests()).texts
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))

    def try_it() -> None:
        with pytest.raises(ModelLoadError):
            engine.weights.swap(bad)
        with pytest.raises(ModelLoadError, match="no such file"):
            engine.weights.swap(tmp_path / "none.gguf")
        with pytest.raises(InvalidRequest, match="kv must be one of"):
            engine.weights.swap(bad, kv="never")

    assert run(engine, requests(), try_it).texts == plain
    assert engine.counters()["weight_swaps"] == 0


def test_a_load_can_be_cancelled(make_engine: Callable[..., Engine], twin: Path) -> None:
    engine = make_engine()
    with pytest.raises(LoadCancelled):
        engine.weights.swap(twin, progress=lambda fraction: False)
    assert engine.weights.swap(twin).kv == "carry"


def test_one_swap_at_a_time(make_engine: Callable[..., Engine], twin: Path) -> None:
    engine = make_engine()
    loading, go_on = threading.Event(), threading.Event()

    def wait(fraction: float) -> bool:
        loading.set()
        return go_on.wait(30)

    thread = threading.Thread(target=lambda: engine.weights.swap(twin, progress=wait))
    thread.start()
    assert loading.wait(30)
    with pytest.raises(ModelBusy, match="being changed now"):
        engine.weights.swap(twin)
    go_on.set()
    thread.join()
    assert engine.counters()["weight_swaps"] == 1


@pytest.mark.parametrize("closed_first", [True, False])
def test_closing_during_a_swap(make_engine: Callable[..., Engine], twin: Path, closed_first: bool) -> None:
    engine = make_engine()
    loading, go_on = threading.Event(), threading.Event()
    errors: list[Exception] = []

    def wait(fraction: float) -> bool:
        loading.set()
        return go_on.wait(30)

    def swap() -> None:
        try:
            engine.weights.swap(twin, progress=wait)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=swap)
    thread.start()
    assert loading.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    if closed_first:
        closing.join()
    go_on.set()
    thread.join()
    closing.join()
    found = [type(error) for error in errors]
    assert found in ([EngineDead], [ShuttingDown]) or (found == [] and not closed_first)


def test_samplers_and_stops_go_on(make_engine: Callable[..., Engine], twin: Path) -> None:
    params = sampled(200, seed=5, repeat_penalty=1.2)
    ask = [Request(f"s{i}", list(prompt.encode()), params) for i, prompt in enumerate(PROMPTS)]
    plain = run(make_engine(), ask).texts
    engine = make_engine()
    assert run(engine, ask, lambda: engine.weights.swap(twin, kv="carry")).texts == plain
    engine = make_engine()
    assert begins_alike(run(engine, ask, lambda: engine.weights.swap(twin, kv="recompute")), plain)


@pytest.mark.parametrize("arch", ["gemma3", "mamba", "lfm2"])
def test_every_kind_of_memory(make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], arch: str) -> None:
    path = tiny_model(arch)
    plain = run(make_engine(path), requests()).texts
    for kv in ("carry", "recompute"):
        engine = make_engine(path)
        streams = run(engine, requests(), lambda engine=engine, kv=kv: engine.weights.swap(path, kv=kv))
        assert begins_alike(streams, plain)
        assert streams.texts == plain or (arch, kv) in (
            ("gemma3", "carry"),
            ("gemma3", "recompute"),
            ("lfm2", "recompute"),
        )


def test_soundness_looks_at_the_vocabulary(tiny_model: Callable[..., Path]) -> None:
    from mullama._core import Model

    one, same, turned = (
        Model(tiny_model()),
        Model(tiny_model("llama", seed=9)),
        Model(tiny_model("llama", rope_base=9.0)),
    )
    assert why_unsound(one, same) is None
    assert "rope" in str(why_unsound(one, turned))
    assert "architecture" in str(why_unsound(one, Model(tiny_model("gemma3"))))


@pytest.mark.parametrize("same", [True, False], ids=["same-vocabulary", "another-vocabulary"])
def test_another_engine_goes_on(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], same: bool
) -> None:
    first = make_engine(parallel=2)
    second = make_engine(tiny_model() if same else tiny_model("gemma3"), ctx_size=1024)
    ask = [*requests(), Request("stays", [65] * 60, greedy(450))]
    counts: list[int] = []
    streams = run(first, ask, lambda: counts.append(first.hand_over(second)))
    assert counts == [5]
    texts = streams.texts
    for generation, text in zip(streams.generations, texts, strict=True):
        assert text
        assert generation.finish is not None
        assert generation.finish.profile.completion_tokens in (440, 450)
    assert second.counters()["finished_length"] == 5
    assert first.counters()["finished_length"] == 0
    assert {names[-1] for names in [[name for name, _ in spans] for spans in streams.spans]} == {second.info.weights}


def test_what_does_not_fit_stays(make_engine: Callable[..., Engine]) -> None:
    first, second = make_engine(), make_engine(ctx_size=256)
    ask = [request("short", "the sun", 240), Request("long", [65] * 300, greedy(200))]
    counts: list[int] = []
    run(first, ask, lambda: counts.append(first.hand_over(second)))
    assert counts == [1]
    assert (first.counters()["finished_length"], second.counters()["finished_length"]) == (1, 1)


def test_a_cancel_reaches_the_new_engine(make_engine: Callable[..., Engine]) -> None:
    first, second = make_engine(), make_engine()
    generation = first.submit_sync(request("r", "the sun", 480))
    next(generation)
    assert first.hand_over(second) == 1
    generation.cancel()
    list(generation)
    assert generation.finish is not None
    assert generation.finish.reason is FinishReason.CANCELLED


def test_a_swap_that_breaks_off_after_the_commit(
    make_engine: Callable[..., Engine], twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that take the steps are never freed, and the next swap works."""
    engine = make_engine()
    right = engine._seqs.set_weights

    def broken(*args: Any, **more: Any) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(engine._seqs, "set_weights", broken)
    streams = Streams(engine, requests())
    wait_for_tokens(engine, 20)
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.weights.swap(twin, kv="carry")
    assert all(streams.join())
    assert engine.counters()["weight_swaps"] == 1
    monkeypatch.setattr(engine._seqs, "set_weights", right)
    assert engine.weights.swap(twin).kv == "carry"
    assert say(engine, [104, 105])
