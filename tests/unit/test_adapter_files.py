"""LoRA adapter files before anything loads them: what fits a model, what is refused, and what tells sets apart."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama.errors import AdapterMismatch, BadModelFile, ModelLoadError, PermissionDenied
from mullama.kv.index.namespaces import adapters_key
from mullama.kv.index.tree import namespace_of
from mullama.models.child import probe as child
from mullama.models.child.probe import ProbeResult
from mullama.models.files import gguf
from mullama.models.files.lora_file import check_adapter, compare
from mullama.serving.lora_files import find_adapter

SCALES = st.floats(-1000, 1000, width=32)
SETS = st.lists(st.tuples(st.sampled_from(["a" * 64, "b" * 64, "c" * 64]), SCALES), max_size=4)


@pytest.fixture
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model()


def facts(base: Path, folder: Path, **options: Any) -> Any:
    path = adapters.build(folder / "a.gguf", base, **options)
    return compare(gguf.check(path), gguf.check(base), "a.gguf", "digest")


def test_facts(base: Path, tmp_path: Path) -> None:
    found = facts(base, tmp_path, rank=3, alpha=6.0, extra=lambda writer: writer.add_name("poems"))
    assert (found.digest, found.rank, found.n_matrices, found.alpha) == ("digest", 3, 6, 6.0)
    assert found.name == "poems"


def test_half_precision_and_norms(base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16)
        tensors["blk.0.attn_norm.weight"] = np.zeros(64, np.float32)

    assert facts(base, tmp_path, change=change).n_matrices == 6


def test_an_embedding_lies_the_other_way_round(base: Path, tmp_path: Path) -> None:
    def flip(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        a, b = tensors.pop("token_embd.weight.lora_a"), tensors.pop("token_embd.weight.lora_b")
        tensors["token_embd.weight.lora_a"] = np.ascontiguousarray(b)
        tensors["token_embd.weight.lora_b"] = np.ascontiguousarray(a.T)

    embedding = ("token_embd.weight",)
    assert facts(base, tmp_path, targets=embedding, change=flip).rank == 4
    with pytest.raises(AdapterMismatch, match="token_embd"):
        facts(base, tmp_path, targets=embedding)


def test_types_that_nobody_multiplies_with(base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        tensors["blk.0.attn_q.weight.lora_a"] = np.zeros((4, 64), np.int32)

    with pytest.raises(BadModelFile, match="type I32; it must be one of F32"):
        facts(base, tmp_path, change=change)


def test_the_rank_of_both_halves(base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        tensors["blk.0.attn_q.weight.lora_a"] = np.zeros((5, 64), np.float32)

    with pytest.raises(AdapterMismatch, match=r"\(64, 5\) and \(4, 64\)"):
        facts(base, tmp_path, change=change)


@pytest.mark.parametrize("arch", ["gemma3", "mamba", "lfm2"])
def test_every_other_model_is_told_apart(tiny_model: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    path = adapters.build(tmp_path / "a.gguf", tiny_model())
    with pytest.raises(AdapterMismatch, match=f"'llama', the model's is '{arch}'"):
        compare(gguf.check(path), gguf.check(tiny_model(arch)), "a")


def test_control_characters_do_not_reach_a_message(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModelFile) as caught:
        facts(base, tmp_path, general_type="\x1b[31mmodel")
    assert "\x1b" not in caught.value.message


def test_any_damage_is_a_clear_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits flipped anywhere in the header: the file is refused in one line, or it is sound and goes to the child."""
    from mullama.models.files import lora_file

    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(lora_file, "probe", lambda *_, **__: ProbeResult(ok=True, finite=True))
    monkeypatch.setattr(child, "_versions", lambda: ["a build"])
    whole = adapters.build(tmp_path / "whole.gguf", base).read_bytes()
    bad, refused = tmp_path / "bad.gguf", 0
    for seed in range(300):
        rng, spoilt = random.Random(seed), bytearray(whole)
        for _ in range(1 + seed % 3):
            spoilt[rng.randrange(1400)] ^= 1 << rng.randrange(8)
        bad.write_bytes(spoilt[: rng.randrange(len(whole))] if seed % 5 == 0 else spoilt)
        try:
            check_adapter(bad, base)
        except BadModelFile as error:
            refused += 1
            assert "bad.gguf" in error.message and "\n" not in error.message
    assert refused > 150


def test_the_child_is_asked_once_a_file_and_model(
    base: Path, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mullama.models.files import lora_file

    asked: list[tuple[Path, Path]] = []
    results = [ProbeResult(ok=True, finite=True)]

    def probe(path: Path, *, adapter: Path) -> ProbeResult:
        asked.append((path, adapter))
        return results[0]

    monkeypatch.setattr(lora_file, "probe", probe)
    monkeypatch.setattr(child, "_versions", lambda: ["a build"])
    path = adapters.build(tmp_path / "a.gguf", base)
    other = tiny_model("llama", seed=8)
    for model in (base, base, other, base):
        check_adapter(path, model, root=tmp_path / "home")
    assert asked == [(base, path), (other, path)]
    results[0] = ProbeResult(ok=False, reason="decoding one token crashed a test process (SIGSEGV)")
    bad = adapters.build(tmp_path / "b.gguf", base, seed=2)
    for _ in range(2):
        with pytest.raises(BadModelFile, match=r"b.gguf: decoding one token crashed"):
            check_adapter(bad, base, root=tmp_path / "home")
    assert len(asked) == 3
    results[0] = ProbeResult(ok=True, finite=False)
    with pytest.raises(BadModelFile, match="no finite numbers"):
        check_adapter(adapters.build(tmp_path / "c.gguf", base, seed=3), base, root=tmp_path / "home")


@given(SETS, SETS, st.sampled_from(["", "s", "t"]), st.sampled_from(["", "s", "t"]))
def test_namespaces_are_equal_for_equal_sets_only(
    one: list[tuple[str, float]], two: list[tuple[str, float]], salt: str, other: str
) -> None:
    def meaning(pairs: list[tuple[str, float]]) -> list[tuple[str, float]]:
        return sorted(pair for pair in pairs if pair[1] != 0)

    is_same = meaning(one) == meaning(two) and salt == other
    assert (namespace_of(salt, adapters_key(one)) == namespace_of(other, adapters_key(two))) == is_same


@given(SETS, st.binary(max_size=64))
def test_no_salt_is_the_namespace_of_an_adapter(pairs: list[tuple[str, float]], salt: bytes) -> None:
    key = adapters_key(pairs)
    if key:
        for text in ("", salt.decode("latin-1"), key.decode("latin-1")):
            assert namespace_of("", key) != namespace_of(text)


def test_where_a_file_is(base: Path, tmp_path: Path) -> None:
    assert find_adapter(str(base), None, may_read_files=True) == base
    assert find_adapter(None, str(base), may_read_files=True) == base
    for path, reference in ((str(base), None), (None, str(base))):
        with pytest.raises(PermissionDenied, match="--admin-key"):
            find_adapter(path, reference, may_read_files=False)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BadModelFile) as caught:
        find_adapter(None, str(bad), may_read_files=True)
    assert isinstance(caught.value, ModelLoadError) and caught.value.param == "reference"
