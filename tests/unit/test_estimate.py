"""Shapes and estimates from headers alone, without llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shaped
from hypothesis import given, settings
from hypothesis import strategies as st
from models_support import make_gguf
from shaped import Shape

from mullama.errors import ConfigError, ModelLoadError
from mullama.machine.processor import parse_cpuinfo
from mullama.models.files import estimate as module
from mullama.models.files import gguf
from mullama.models.files.estimate import estimate, fit, token_bytes
from mullama.models.files.gguf import Header, Summary
from mullama.models.files.shape import check_sense, shape_of


def header(arch: str = "llama", **more: Any) -> Header:
    plain = {"block_count": 4, "embedding_length": 256, "attention.head_count": 4, "feed_forward_length": 512}
    found = Header(3, 1000)
    found.metadata["general.architecture"] = arch
    for key, value in {**plain, **{key.replace("__", "."): value for key, value in more.items()}}.items():
        if value is not None:
            found.metadata[f"{arch}.{key}"] = tuple_of(value) if isinstance(value, list) else value
    return found


def tuple_of(values: list[Any]) -> Summary:
    return Summary("u32", len(values), tuple(values[:3]), tuple(values))


def test_heads_that_differ_by_layer() -> None:
    shape = shape_of(header(attention__head_count_kv=[4, 2, 0, 1]))
    assert [layer.k for layer in shape.layers] == [256, 128, 0, 64]


def test_no_number_of_kv_heads_means_as_many_as_heads() -> None:
    assert [layer.k for layer in shape_of(header()).layers] == [256] * 4


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"attention__sliding_window": 128}, [True, True, True, True, True, False] * 2),
        ({"attention__sliding_window": 128, "attention__sliding_window_pattern": 3}, [True, True, False] * 4),
        (
            {"attention__sliding_window": 128, "attention__sliding_window_pattern": [True] * 4 + [False] * 8},
            [True] * 4 + [False] * 8,
        ),
        ({"attention__sliding_window": 0}, [False] * 12),
        ({}, [False] * 12),
    ],
)  # fmt: skip
def test_windows(more: dict[str, Any], expected: list[bool]) -> None:
    shape = shape_of(header("gemma3", block_count=12, **more))
    assert [layer.is_window for layer in shape.layers] == expected
    assert shape.n_window == (128 if any(expected) else 0)


def test_a_window_that_llama_cpp_ignores() -> None:
    assert shape_of(header("qwen2", attention__sliding_window=128)).n_window == 0


def test_the_first_layer_may_be_the_full_one() -> None:
    shape = shape_of(header("smallthinker", attention__sliding_window=64))
    assert [layer.is_window for layer in shape.layers] == [False, True, True, True]


def test_shared_kv_and_latent_attention() -> None:
    shape = shape_of(header("gemma4", attention__shared_kv_layers=1))
    assert [bool(layer.k) for layer in shape.layers] == [True, True, True, False]
    shape = shape_of(
        header("deepseek2", attention__head_count_kv=1, attention__key_length=576, attention__key_length_mla=192)
    )
    assert {(layer.k, layer.v) for layer in shape.layers} == {(576, 0)}


@pytest.mark.parametrize("arch", ["bert", "clef", "gemma-embedding2", "llada"])
def test_models_without_memory(arch: str) -> None:
    assert {(layer.k, layer.v, layer.state) for layer in shape_of(header(arch)).layers} == {(0, 0, 0)}


def test_states() -> None:
    shape = shape_of(header("mamba", ssm__inner_size=512, ssm__state_size=16, ssm__conv_kernel=4))
    assert {(layer.k, layer.state) for layer in shape.layers} == {(0, 3 * 512 + 16 * 512)}
    shape = shape_of(header("qwen3next", ssm__inner_size=512, ssm__state_size=16, ssm__conv_kernel=4))
    assert [bool(layer.state) for layer in shape.layers] == [True, True, True, False]
    assert [bool(layer.k) for layer in shape.layers] == [False, False, False, True]
    shape = shape_of(header("rwkv7", wkv__head_size=64, attention__head_count=0))
    assert {layer.state for layer in shape.layers} == {2 * 256 + 64 * 256}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0), ("block_count", None), ("block_count", 1 << 31), ("block_count", -1),
        ("block_count", "many"), ("block_count", True), ("block_count", 2.5), ("embedding_length", 0),
        ("embedding_length", 1 << 40),
        ("attention.key_length", 1 << 20), ("attention.head_count", -3), ("attention.head_count_kv", [1, 2, -7, 4]),
    ],
)  # fmt: skip
def test_impossible_numbers_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ModelLoadError, match=r"^file\.gguf: "):
        shape_of(header(**{key: value}), "file.gguf")


@given(
    st.dictionaries(
        st.sampled_from(["block_count", "embedding_length", "attention.head_count", "attention.head_count_kv",
                         "attention.key_length", "attention.sliding_window", "attention.sliding_window_pattern",
                         "ssm.inner_size", "ssm.state_size", "expert_used_count", "feed_forward_length",
                         "context_length"]),
        st.one_of(st.integers(-(1 << 63), 1 << 64), st.floats(), st.text(), st.booleans(),
                  st.lists(st.integers(-5, 1 << 40), max_size=8)),
    ),
    st.sampled_from(["llama", "gemma3", "mamba", "lfm2", "falcon-h1", "qwen3next", "llama4", "bert", "?"]),
)  # fmt: skip
@settings(deadline=None)
def test_any_header_is_estimated_or_refused(more: dict[str, Any], arch: str) -> None:
    damaged = header(arch, **more)
    try:
        found = estimate(damaged, n_ctx=4096, n_parallel=2)
    except ModelLoadError:
        return
    assert found.total >= 0 and found.kv_total >= 0


@given(st.integers(1, 40000), st.integers(1, 256), st.sampled_from(["f16", "q8_0", "f32"]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_more_of_anything_takes_more(n_ctx: int, n_parallel: int, kv_type: str, unified: bool) -> None:
    """What the search for the largest that fits relies on."""
    options: dict[str, Any] = {"type_k": kv_type, "type_v": kv_type, "kv_layout": "unified" if unified else "streams"}
    for model in (header(), header("gemma3", attention__sliding_window=512)):
        base = estimate(model, n_ctx=n_ctx, n_parallel=n_parallel, **options)
        assert estimate(model, n_ctx=n_ctx + 256, n_parallel=n_parallel, **options).total >= base.total
        more = estimate(model, n_ctx=n_ctx, n_parallel=n_parallel + 1, **options)
        # llama.cpp rounds a batch up to a multiple of the sequences, which may be less for one more of them.
        assert more.total - more.compute >= base.total - base.compute


def test_kv_bytes_are_what_they_are() -> None:
    found = estimate(header(attention__head_count_kv=2), n_ctx=1000, n_parallel=3)
    assert found.n_ctx == 1024
    assert found.kv == {"full": 4 * 1024 * 3 * (128 + 128) * 2}
    assert token_bytes(header(attention__head_count_kv=2)) == 4 * (128 + 128) * 2
    half = estimate(header(attention__head_count_kv=2), n_ctx=1000, n_parallel=3, type_v="q8_0")
    assert half.kv_total == 4 * 1024 * 3 * (128 * 64 + 128 * 34) // 32


def test_a_windows_cells() -> None:
    model = header("gemma3", attention__sliding_window=512, attention__head_count_kv=1, block_count=6)
    found = estimate(model, n_ctx=8192, n_parallel=2, n_batch=512)
    assert found.kv == {"window": 5 * 1024 * 2 * 128 * 2, "full": 8192 * 2 * 128 * 2}
    assert token_bytes(model) == 128 * 2, "only the full layer grows"


def test_an_unknown_type_of_cells() -> None:
    with pytest.raises(ConfigError, match="'q3' is not a type of KV cells; there are f32"):
        estimate(header(), n_ctx=256, type_k="q3")


def test_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaped.build(tmp_path / "model.gguf", Shape(kind="Q4_0", embd_kind="Q8_0"))
    own = gguf.check(model)
    matrices = sum(t.size or 0 for t in own.tensors if t.type == "Q4_0")
    everything = sum(t.size or 0 for t in own.tensors)
    monkeypatch.setattr(module, "_repacked_types", lambda: {"Q4_0": 8})
    found = estimate(model, n_ctx=256)
    assert found.weights_copied == pytest.approx(matrices, abs=64 * 32)
    assert found.weights_mapped <= own.file_size - own.data_start
    read = estimate(model, n_ctx=256, mmap=False)
    assert read.weights_mapped == 0 and read.weights_copied == pytest.approx(everything, abs=64 * 32)
    monkeypatch.setattr(module, "_repacked_types", dict)
    plain = estimate(model, n_ctx=256)
    assert (plain.weights_copied, plain.weights_mapped) == (0, pytest.approx(everything, abs=64 * 32))


def test_what_processors_repack(monkeypatch: pytest.MonkeyPatch) -> None:
    def types(machine: str, *flags: str) -> set[str]:
        found = parse_cpuinfo(f"flags : {' '.join(flags)}\n", machine)
        monkeypatch.setattr(module, "processor", lambda: found)
        return set(module._repacked_types.__wrapped__())

    assert types("x86_64", "sse2") == set()
    assert types("x86_64", "avx2") == {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}
    assert "Q2_K" in types("x86_64", "avx2", "avx512f")
    assert "Q8_0" in types("x86_64", "avx2", "avx512f", "avx512_vnni", "amx_int8")
    assert "Q8_0" in types("aarch64", "asimddp") and types("aarch64", "fp") == set()
    assert types("riscv64") == set()


def test_what_amx_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of Q8_0 take 38 bytes there and not 34, and experts stay as they are."""
    model = shaped.build(tmp_path / "model.gguf", Shape(kind="Q8_0", embd_kind="F32"))
    own = gguf.check(model)
    matrices = sum(t.size or 0 for t in own.tensors if t.type == "Q8_0")
    found = parse_cpuinfo("flags : avx2 avx512f avx512_vnni amx_int8\n", "x86_64")
    monkeypatch.setattr(module, "processor", lambda: found)
    monkeypatch.setattr(module, "_repacked_types", module._repacked_types.__wrapped__)
    assert estimate(model, n_ctx=256).weights_copied == pytest.approx(matrices * 38 / 34, abs=64 * 32)
    tensor = next(t for t in own.tensors if t.type == "Q8_0")
    expert = replace(tensor, name="blk.0.ffn_up_exps.weight")
    kinds = module._repacked_types()
    assert module._is_repacked(tensor, kinds) and not module._is_repacked(expert, kinds)
    assert kinds["F16"] == 32 and module._amx_adds(expert) == 0


def test_fit_finds_the_edge() -> None:
    model = header(attention__head_count_kv=2, context_length=8192, embedding_length=256)
    free = estimate(model, n_ctx=2048, n_parallel=4).total
    plain, small, none = fit(model, free, n_ctx=1024, n_parallel=4, kv_types=("f16", "q8_0", "f32"))
    assert (plain.n_ctx, plain.fits) == (2048, True)
    assert small.n_ctx is not None and small.n_ctx > 2048
    assert none.n_ctx is not None and none.n_ctx < 2048
    for row in (plain, small, none):
        assert row.n_parallel is not None
        at = {"type_k": row.kv_type, "type_v": row.kv_type}
        assert estimate(model, n_ctx=1024, n_parallel=row.n_parallel, **at).total <= free
        assert estimate(model, n_ctx=1024, n_parallel=row.n_parallel + 1, **at).total > free or row.n_parallel == 256


def test_fit_stops_at_what_the_model_was_trained_on() -> None:
    (row,) = fit(header(context_length=1024), 1 << 50, n_ctx=256, n_parallel=1, kv_types=("f16",))
    assert (row.n_ctx, row.n_parallel) == (1024, 256)


def test_fit_of_nothing() -> None:
    (row,) = fit(header(context_length=1024), 100, n_ctx=256, n_parallel=1, kv_types=("f16",))
    assert (row.n_ctx, row.n_parallel, row.fits) == (None, None, False)


def test_fit_leaves_out_cells_that_the_heads_cannot_have() -> None:
    rows = fit(header(attention__key_length=80), 1 << 40, n_ctx=256, n_parallel=1)
    assert [row.kv_type for row in rows] == ["f16"]


@pytest.mark.parametrize(
    ("key", "value", "is_fine"),
    [
        ("llama.context_length", 0, False), ("llama.context_length", (1 << 32) - 1, False),
        ("llama.context_length", 1, True), ("llama.rope.freq_base", float("nan"), False),
        ("llama.rope.freq_base", -1.0, False), ("llama.rope.freq_base", 0.0, True),
        ("tokenizer.ggml.eos_token_id", 5, False), ("tokenizer.ggml.eos_token_id", 4, True),
        ("tokenizer.ggml.bos_token_id", -2, False), ("tokenizer.ggml.bos_token_id", -1, True),
        ("tokenizer.ggml.bos_token_id", (1 << 32) - 1, True),
    ],
)  # fmt: skip
def test_sense(key: str, value: Any, is_fine: bool) -> None:
    found = header()
    found.metadata["tokenizer.ggml.tokens"] = Summary("string", 5)
    found.metadata[key] = value
    if is_fine:
        check_sense(found, "file.gguf")
    else:
        with pytest.raises(ModelLoadError, match=r"^file\.gguf: .* damaged"):
            check_sense(found, "file.gguf")


@pytest.mark.parametrize("tokens", ["a text", 7, 1.5, True])
def test_a_vocabulary_that_is_no_array_counts_nothing(tokens: Any) -> None:
    """Found by fuzzing: a text has a ``count`` too, which is a function."""
    found = header("llama", context_length=64)
    found.metadata["tokenizer.ggml.tokens"] = tokens
    found.metadata["tokenizer.ggml.bos_token_id"] = 5
    check_sense(found, "m")
    assert shape_of(found).n_vocab == 0 and found.count("tokenizer.ggml.tokens") is None
    assert estimate(found, n_ctx=256).output == 0


@pytest.mark.parametrize("kind", ["no_vocab", "none"])
def test_a_model_without_a_vocabulary_is_refused_before_room_is_made_for_its_tokens(kind: str) -> None:
    """Found by fuzzing: 400 bytes claimed 134 million of them, which llama.cpp made."""
    found = header("llama", context_length=64, vocab_size=(1 << 32) - 1)
    found.metadata["tokenizer.ggml.model"] = kind
    with pytest.raises(ModelLoadError, match=r"^m: it has no vocabulary"):
        check_sense(found, "m")


def test_what_a_damaged_file_calls_its_architecture_steers_no_terminal() -> None:
    for change in ({"block_count": -1}, {"attention__head_count": [-1] * 4}):
        with pytest.raises(ModelLoadError) as caught:
            shape_of(header("a\n\x1b[31m" + "x" * 500, **change), "m")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 200
    with pytest.raises(ModelLoadError) as caught:
        check_sense(header("a\nb", context_length=0), "m")
    assert str(caught.value).isprintable()


def test_arrays_of_layers_are_read_whole(tmp_path: Path) -> None:
    import tiny

    model = gguf.read_header(tiny.build(tmp_path / "lfm2.gguf", "lfm2"))
    assert model.get("{arch}.attention.head_count_kv").values == (0, 2, 0)
    shape = shape_of(model)
    assert [(layer.k > 0, layer.state > 0) for layer in shape.layers] == [(False, True), (True, False), (False, True)]


def test_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(make_gguf({"general.architecture": "llama"}))
    with pytest.raises(ModelLoadError, match="names no block_count"):
        estimate(path, n_ctx=256)
