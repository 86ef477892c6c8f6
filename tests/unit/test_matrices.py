"""From a header to the matrices that ways of computing are chosen for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models_support import METADATA, make_gguf

from mullama.machine.remembered import Weights, timed_shape
from mullama.models.files import gguf
from mullama.models.files.gguf import TENSOR_TYPES, Header, Tensor
from mullama.models.files.matrices import LONGEST_ROW, NEVER_WEIGHTS, matrices

F32, Q8_0, Q4_K, Q8_1, I32 = 0, 8, 12, 9, 26


def header(*tensors: tuple[str, tuple[int, ...], int]) -> Header:
    return Header(3, 1 << 30, {}, [Tensor(name, shape, kind, 0) for name, shape, kind in tensors])


def shapes(*tensors: tuple[str, tuple[int, ...], int]) -> dict[tuple[str, int, int], int]:
    return {(each.name, each.k, each.n): each.count for each in matrices(header(*tensors))}


def test_matrices_of_one_shape_are_counted_together() -> None:
    found = shapes(
        ("blk.0.attn_q.weight", (64, 128), Q8_0),
        ("blk.1.attn_q.weight", (64, 128), Q8_0),
        ("blk.1.attn_k.weight", (64, 32), Q8_0),
        ("blk.0.ffn_up.weight", (256, 64), Q4_K),
        ("output_norm.weight", (64,), F32),
    )
    assert found == {("Q8_0", 64, 128): 2, ("Q8_0", 64, 32): 1, ("Q4_K", 256, 64): 1}


def test_experts_are_a_matrix_each() -> None:
    (found,) = matrices(header(("blk.0.ffn_up_exps.weight", (256, 64, 8), Q4_K)))
    assert found == Weights(Q4_K, "Q4_K", 256, 144, 256, 64, 8) and found.bytes == 8 * 64 * 144


def test_an_embedding_is_multiplied_only_where_it_is_the_output_too() -> None:
    embedding = ("token_embd.weight", (64, 512), Q8_0)
    assert shapes(embedding) == {("Q8_0", 64, 512): 1}
    assert shapes(embedding, ("output.weight", (64, 512), F32)) == {("F32", 64, 512): 1}


@pytest.mark.parametrize("name", ["position_embd.weight", "token_types.weight", "per_layer_token_embd.weight"])
def test_a_table_that_rows_are_looked_up_in_is_none(name: str) -> None:
    assert shapes((name, (64, 512), Q8_0)) == {}


@pytest.mark.parametrize("kind", [kind for kind, (name, _, _) in TENSOR_TYPES.items() if name in NEVER_WEIGHTS])
def test_types_of_columns_and_of_numbers_are_no_weights(kind: int) -> None:
    """llama.cpp ends the process that asks it to quantise to them."""
    assert shapes(("blk.0.ffn_gate_tid2eid.weight", (256, 512), kind)) == {}


@pytest.mark.parametrize(
    "shape",
    [
        (0, 5),
        (64, 0),
        (64, 5, 0),
        (63, 5),
        (LONGEST_ROW + 32, 5),
        (1 << 62, 1 << 62),
        (64,),
        (),
    ],
    ids=str,
)
def test_what_cannot_be_multiplied_is_left_out(shape: tuple[int, ...]) -> None:
    assert shapes(("a.weight", shape, Q8_0), ("b.weight", (64, 5), Q8_0)) == {("Q8_0", 64, 5): 1}


def test_a_type_that_nobody_knows_is_left_out() -> None:
    assert shapes(("a.weight", (64, 5), 99), ("b.weight", (64, 5), 4)) == {}


dims = st.integers(0, 1 << 63) | st.sampled_from((1, 32, 64, 256, 4096, LONGEST_ROW))


@given(
    st.lists(st.tuples(st.text(max_size=3), st.lists(dims, max_size=4).map(tuple), st.integers(-1, 60)), max_size=12)
)
def test_whatever_a_header_says_trials_are_bounded(tensors: list[tuple[str, tuple[int, ...], int]]) -> None:
    found = matrices(header(*tensors))
    for each in found:
        assert each.k % each.block == 0 and 0 < each.k <= LONGEST_ROW and each.n > 0 and each.count > 0
        k, n = each.cut
        assert k == each.k and 0 < n <= each.n and k * n <= max(4 << 20, 64 * k)
    for kind in {each.type for each in found}:
        assert isinstance(timed_shape([each for each in found if each.type == kind]), str)


def test_a_split_model_has_the_matrices_of_all_parts(tmp_path: Path) -> None:
    """The first part may hold none: llama.cpp can write it so."""
    parts: list[list[tuple[str, tuple[int, ...], int, int]]] = [
        [("output_norm.weight", (32,), F32, 128)],
        [("token_embd.weight", (32, 5), Q8_0, 5 * 34)],
    ]
    for number, tensors in enumerate(parts):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 2}
        (tmp_path / f"m-{number + 1:05}-of-00002.gguf").write_bytes(make_gguf({**METADATA, **split}, tensors))
    first = tmp_path / "m-00001-of-00002.gguf"
    assert matrices(gguf.read_header(first)) == []
    assert [(each.name, each.k, each.n) for each in matrices(gguf.check(first))] == [("Q8_0", 32, 5)]
