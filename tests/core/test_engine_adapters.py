"""LoRA adapters of a running engine: who gets which, whose KV is shared, and what is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
from core_support import greedy
from homes import home
from kv_engine_support import Answer, ask, submit

from mullama.engine.engine import Engine
from mullama.errors import (
    AdapterBusy,
    AdapterMismatch,
    AdapterNotFound,
    BadModelFile,
    ConfigError,
    InvalidRequest,
)
from mullama.kv import control as kvcontrol
from mullama.kv.index.namespaces import adapters_key
from mullama.kv.index.tree import namespace_of, pack
from mullama.types import LoraUse, Preempt, Request

TEXT = "all that we have to do here and there and in the others of her"


@pytest.fixture
def files(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``files(seed)``: an adapter for the tiny model."""

    def get(seed: int = 1, base: Path | None = None, **options: Any) -> Path:
        path = tmp_path / f"adapter-{seed}.gguf"
        return adapters.build(path, base or tiny_model(), seed=seed, **options)

    return get


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULLAMA_HOME", home(tmp_path / "home"))


def request(name: str, *uses: LoraUse, n: int = 12, text: str = TEXT, **more: Any) -> Request:
    return Request(name, list(text.encode()), greedy(n), lora=uses, **more)


def run(engine: Engine, *uses: LoraUse, **more: Any) -> Answer:
    return ask(engine, request("r", *uses, **more))[0]


A, B = LoraUse("a"), LoraUse("b")


def test_each_request_has_its_own(make_engine: Callable[..., Engine], files: Callable[..., Path]) -> None:
    engine = make_engine(kv_host_bytes=0, deterministic=True)
    bare = run(engine).text
    assert engine.weights.load_lora(files(1), "a")["n_matrices"] == 6
    engine.weights.load_lora(files(2), "b", 0.5)
    sets: list[tuple[LoraUse, ...]] = [(A,), (B,), (), (A, B), (LoraUse("a", 0.0),), (LoraUse("b", 0.5),)]
    alone = [run(engine, *uses).text for uses in sets]
    assert alone[2] == alone[4] == bare
    assert alone[1] == alone[5]
    assert len(set(alone)) == 4
    together = ask(engine, *(request(f"r{n}", *uses) for n, uses in enumerate(sets)))
    assert [answer.text for answer in together] == alone
    assert together[1].profile.adapters == (LoraUse("b", 0.5),)
    assert together[2].profile.adapters == ()
    assert together[1].profile.to_dict()["adapters"] == ({"id": "b", "scale": 0.5},)
    assert engine.counters()["adapter_switches"] > 0


@pytest.mark.parametrize(("move_cost", "comes_together"), [(0.0, True), (1e12, False)])
def test_sequences_with_the_same_adapters_come_together(
    make_engine: Callable[..., Engine], files: Callable[..., Path], move_cost: float, comes_together: bool
) -> None:
    """Each step is one pass for each set, where moving a sequence is not dearer than another pass."""
    engine = make_engine(kv_host_bytes=0, deterministic=True)
    engine.weights.load_lora(files(1), "a")
    engine.weights.load_lora(files(2), "b")
    wanted = [request(f"r{n}", use, n=60, text=TEXT[n:]) for n, use in enumerate((A, B, A, B))]
    alone = [ask(engine, one)[0].text for one in wanted]
    engine.kv.drop()

    def price() -> None:
        engine._seqs.move_ns_per_byte = move_cost

    engine.call(price).result()
    before = engine.counters()
    assert [answer.text for answer in ask(engine, *wanted)] == alone
    after = {name: n - before[name] for name, n in engine.counters().items()}
    assert after["adapter_ubatches"] > 0
    assert (after["split_ubatches"] == 0) is comes_together
    assert (after["kv_moves"] > 0) is comes_together


def test_kv_of_different_adapters_is_never_shared(
    make_engine: Callable[..., Engine], files: Callable[..., Path]
) -> None:
    engine = make_engine()
    engine.weights.load_lora(files(1), "a")
    engine.weights.load_lora(files(2), "b")
    order: list[tuple[LoraUse, ...]] = [(), (A,), (B,), (A, B), (LoraUse("a", 0.5),)]
    first = [run(engine, *uses) for uses in order]
    assert [answer.profile.kv_cache_hit for answer in first] == [0] * 5
    for uses, answer in zip(order, first, strict=True):
        again = run(engine, *uses)
        assert again.profile.kv_cache_hit == len(TEXT) - 1
        assert again.text == answer.text
    assert run(engine, B, A).profile.kv_cache_hit == len(TEXT) - 1, "the order says nothing"
    assert run(engine, LoraUse("a", 0.0)).profile.kv_cache_hit == len(TEXT) - 1, "the bare model's"
    assert run(engine, A, cache_salt="s").profile.kv_cache_hit == 0


def test_the_same_file_again_finds_its_kv_and_another_one_does_not(
    make_engine: Callable[..., Engine], files: Callable[..., Path]
) -> None:
    engine = make_engine()
    one, two = files(1), files(2)
    engine.weights.load_lora(one, "a")
    first = run(engine, A)
    engine.weights.unload_lora("a")
    engine.weights.load_lora(two, "a")
    assert run(engine, A).profile.kv_cache_hit == 0
    engine.weights.unload_lora("a")
    engine.weights.load_lora(one, "other")
    again = run(engine, LoraUse("other"))
    assert (again.text, again.profile.kv_cache_hit) == (first.text, len(TEXT) - 1)


def test_kv_on_disk_is_found_by_the_same_adapter_only(
    make_engine: Callable[..., Engine], files: Callable[..., Path], tmp_path: Path
) -> None:
    disk: dict[str, Any] = {"kv_disk_dir": str(tmp_path / "kv"), "kv_disk_bytes": 1 << 26}
    long = TEXT * 4
    engine = make_engine(**disk)
    engine.weights.load_lora(files(1), "a")
    first = run(engine, A, text=long)
    namespace = namespace_of("", adapters_key([(engine.weights.loras()[0]["sha256"], 1.0)]))
    assert engine._kv.tree.match(namespace, pack(list(long.encode()))).n_tokens >= len(long)
    disk_tier = engine.kv._need_disk()

    def save() -> dict[str, int]:
        tokens = list(long.encode())
        disk_tier.hand_over(lambda: kvcontrol.save(engine._kv, disk_tier, namespace, tokens))
        return kvcontrol.saved(engine._kv, disk_tier, namespace, tokens, 0)

    assert engine.call(save).result()["bytes"] > 0
    engine.close()
    engine = make_engine(**disk)
    engine.weights.load_lora(files(2), "b")
    engine.weights.load_lora(files(1), "renamed")
    assert run(engine, text=long).profile.kv_cache_hit == 0
    assert run(engine, B, text=long).profile.kv_cache_hit == 0
    again = run(engine, LoraUse("renamed"), text=long)
    assert (again.text, again.profile.kv_cache_source) == (first.text, "disk")


def test_unloading_waits_for_nobody_and_breaks_nobody(
    make_engine: Callable[..., Engine], files: Callable[..., Path]
) -> None:
    engine = make_engine()
    engine.weights.load_lora(files(1), "a")
    alone = run(engine, A, n=40).text
    gate = threading.Event()
    engine.call(gate.wait)
    generation = engine.submit_sync(request("r", A, n=40))
    refused: list[Exception] = []

    def unload() -> None:
        try:
            engine.weights.unload_lora("a")
        except AdapterBusy as error:
            refused.append(error)

    thread = threading.Thread(target=unload)
    thread.start()
    gate.set()
    text = "".join(delta.text for delta in generation)
    thread.join()
    assert text == alone
    assert len(refused) == 1 and "the adapter 'a' is used by 1 request now" in str(refused[0])
    engine.call(lambda: None).result()
    assert engine.weights.loras()[0]["requests"] == 0
    engine.weights.unload_lora("a")
    assert engine.weights.loras() == []
    with pytest.raises(InvalidRequest, match="loaded adapters: none"):
        engine.submit_sync(request("r", A))
    with pytest.raises(AdapterNotFound):
        engine.weights.unload_lora("a")


def test_a_cancelled_and_a_refused_request_let_go(
    make_engine: Callable[..., Engine], files: Callable[..., Path]
) -> None:
    engine = make_engine(parallel=1, max_queue=0)
    engine.weights.load_lora(files(1), "a")
    generation = engine.submit_sync(request("r", A, n=400))
    next(iter(generation))
    generation.cancel()
    for _ in generation:
        pass
    engine.call(lambda: None).result()
    with pytest.raises(InvalidRequest, match="twice"):
        engine.submit_sync(request("r", A, A))
    with pytest.raises(InvalidRequest, match="the scale"):
        engine.submit_sync(request("r", LoraUse("a", float("nan"))))
    assert engine.weights.loras()[0]["requests"] == 0
    engine.weights.unload_lora("a")


def test_loading_while_others_are_answered(make_engine: Callable[..., Engine], files: Callable[..., Path]) -> None:
    engine = make_engine()
    alone = run(engine, n=300).text
    found: list[str] = []
    generation = engine.submit_sync(request("r", n=300))
    reader = threading.Thread(target=lambda: found.append("".join(delta.text for delta in generation)))
    reader.start()
    engine.weights.load_lora(files(1), "a")
    engine.weights.load_lora(files(2), "b")
    engine.weights.unload_lora("b")
    reader.join()
    assert found == [alone]
    assert [one["id"] for one in engine.weights.loras()] == ["a"]


@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_preempted_sequences_go_on_with_theirs(
    make_engine: Callable[..., Engine], files: Callable[..., Path], how: str
) -> None:
    """Room for two of four sequences, so that they take turns."""
    engine = make_engine(scheduler="round_robin", parallel=2, kv_host_bytes=0, deterministic=True)
    engine.weights.load_lora(files(1), "a")
    sets = [(A,), (), (A,), ()]
    alone = [run(engine, *uses, n=80).text for uses in sets]
    wanted = [request(f"r{n}", *uses, n=80, preempt=Preempt(how)) for n, uses in enumerate(sets)]
    answers = ask(engine, *wanted)
    assert [answer.text for answer in answers] == alone
    assert sum(answer.profile.preemptions for answer in answers) > 0


def test_a_sequence_with_adapters_stays_when_others_are_handed_over(
    make_engine: Callable[..., Engine], files: Callable[..., Path]
) -> None:
    # What is computed again comes in other chunks: to the last bit the same only with the reference computations.
    old, new = make_engine(deterministic=True), make_engine(deterministic=True)
    old.weights.load_lora(files(1), "a")
    alone = [run(old, A, n=60).text, run(old, n=60).text]
    gate = threading.Event()
    old.call(gate.wait)
    generations = [old.submit_sync(request("r0", A, n=60)), old.submit_sync(request("r1", n=60))]
    moved: list[int] = []
    thread = threading.Thread(target=lambda: moved.append(old.hand_over(new)))
    thread.start()
    gate.set()
    texts = ["".join(delta.text for delta in generation) for generation in generations]
    thread.join()
    assert texts == alone
    assert moved[0] <= 1


def test_memory(make_engine: Callable[..., Engine], files: Callable[..., Path]) -> None:
    engine = make_engine()
    before = engine.memory_report_sync()
    size = engine.weights.load_lora(files(1), "a")["size_bytes"]
    after = asyncio.run(engine.memory_report())
    assert before["adapters"] == []
    assert after["adapters"] == [{"id": "a", "allocated_bytes": size, "resident_bytes": size}]


def test_adapters_named_at_the_start(
    make_engine: Callable[..., Engine], files: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    engine = make_engine(lora=[f"a={files(1)}"])
    assert [one["id"] for one in engine.weights.loras()] == ["a"]
    other = make_engine(tiny_model("gemma3"), lora=[f"a={files(1)}"])
    assert other.weights.loras() == [], "it is of another model"
    with pytest.raises(ConfigError, match="NAME=PATH"):
        make_engine(lora=[str(files(1))])
    with pytest.raises(BadModelFile):
        make_engine(lora=[f"a={files(1)}.nowhere"])


def test_closing_with_work_left(make_engine: Callable[..., Engine], files: Callable[..., Path]) -> None:
    engine = make_engine(parallel=1)
    engine.weights.load_lora(files(1), "a")
    generations = submit(engine, *(request(f"r{n}", A, n=300) for n in range(3)))
    engine.close()  # raises when an adapter could not be freed
    for generation in generations:
        for _ in generation:
            pass
        assert generation.finish is not None


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a/b", "-a", "x" * 65, "a\n"])
def test_bad_ids(make_engine: Callable[..., Engine], files: Callable[..., Path], name: str) -> None:
    with pytest.raises(InvalidRequest, match="letters"):
        make_engine().weights.load_lora(files(1), name)


def test_an_id_is_taken_once_and_comes_from_the_name(
    make_engine: Callable[..., Engine], files: Callable[..., Path]
) -> None:
    engine = make_engine()
    assert engine.weights.load_lora(files(1))["id"] == "adapter-1"
    with pytest.raises(InvalidRequest, match="loaded already"):
        engine.weights.load_lora(files(2), "adapter-1")
    with pytest.raises(InvalidRequest, match="scale"):
        engine.weights.load_lora(files(2), scale=float("inf"))


def _cut(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    return path


def _spoil(tensors: dict[str, Any], name: str) -> None:
    tensors[name] = tensors[name][:, :-1] if name.endswith("a") else tensors[name][:-1]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda f, t: _cut(f(1)), BadModelFile, "adapter-1.gguf: .*file"),
        (lambda f, t: f(1, general_type="model"), BadModelFile, "general.type is 'model'"),
        (lambda f, t: f(1, adapter_type="control_vector"), BadModelFile, "adapter.type"),
        (lambda f, t: f(1, arch="gemma3"), AdapterMismatch, "architecture 'gemma3', the model's is 'llama'"),
        (lambda f, t: f(1, alpha=float("nan")), BadModelFile, "alpha"),
        (lambda f, t: f(1, targets=()), BadModelFile, "no LoRA tensors"),
        (
            lambda f, t: f(1, change=lambda tensors: _spoil(tensors, "blk.0.attn_q.weight.lora_a")),
            AdapterMismatch,
            "blk.0.attn_q.weight.*shapes",
        ),
        (
            lambda f, t: f(1, change=lambda tensors: _spoil(tensors, "blk.1.ffn_up.weight.lora_b")),
            AdapterMismatch,
            "blk.1.ffn_up.weight.*shapes",
        ),
        (
            lambda f, t: f(1, change=lambda tensors: tensors.pop("blk.0.attn_v.weight.lora_b")),
            BadModelFile,
            "lora_b' is missing",
        ),
        (
            lambda f, t: f(1, change=lambda x: x.update({"blk.9.attn_v.weight" + h[-7:]: x[h] for h in list(x)[:2]})),
            AdapterMismatch,
            "blk.9.attn_v.weight', which the model does not have",
        ),
        (
            lambda f, t: f(1, change=lambda x: x.update({"x.weight": next(iter(x.values()))})),
            BadModelFile,
            "not part of a LoRA",
        ),
        (
            lambda f, t: f(1, change=lambda x: x.update({k: v * float("nan") for k, v in x.items()})),
            BadModelFile,
            "no finite numbers",
        ),
        (
            lambda f, t: f(1, extra=lambda w: w.add_array("adapter.alora.invocation_tokens", [1, 2])),
            BadModelFile,
            "activated LoRA",
        ),
    ],
)
def test_damaged_files_are_refused_and_the_engine_serves_on(
    make_engine: Callable[..., Engine], files: Callable[..., Path], tiny_model: Callable[..., Path],
    make: Callable[..., Path], error: type[Exception], match: str,
) -> None:  # fmt: skip
    engine = make_engine()
    bare = run(engine).text
    with pytest.raises(error, match=match):
        engine.weights.load_lora(make(files, tiny_model), "a")
    assert engine.weights.loras() == []
    assert run(engine).text == bare
