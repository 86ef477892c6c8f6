"""What nodes hold: rows that can be cut anywhere, checkpoints that cannot."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama.kv.index.payload import Checkpoint, Ghost, Rows


@st.composite
def rows_st(draw: st.DrawFn) -> Rows:
    """Rows in chunks of any number of tokens."""
    token_bytes = draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(1, 70), min_size=1, max_size=5))
    rng = random.Random(draw(st.integers(0, 1000)))
    return Rows([rng.randbytes(n * token_bytes) for n in sizes], sum(sizes), token_bytes)


@given(rows_st(), st.data())
def test_both_parts_are_the_whole(rows: Rows, data: st.DataObject) -> None:
    whole, n, size = b"".join(rows.chunks), rows.n_tokens, rows.n_bytes
    cut = data.draw(st.integers(0, n))
    left, right = rows.split(cut)
    assert (left.n_tokens, right.n_tokens) == (cut, n - cut)
    assert left.n_bytes + right.n_bytes == size == len(whole)
    assert b"".join(left.chunks) == whole[: cut * rows.token_bytes]
    assert b"".join(right.chunks) == whole[cut * rows.token_bytes :]
    for part in (left, right):
        assert all(chunk and len(chunk) % rows.token_bytes == 0 for chunk in part.chunks), "whole tokens"
        assert part.n_bytes == sum(map(len, part.chunks))


@given(rows_st(), st.data())
def test_a_split_copies_one_chunk_at_most(rows: Rows, data: st.DataObject) -> None:
    old = {id(chunk) for chunk in rows.chunks}
    left, right = rows.split(data.draw(st.integers(0, rows.n_tokens)))
    assert sum(id(chunk) not in old for chunk in left.chunks + right.chunks) <= 2


@given(rows_st(), st.data())
def test_any_stretch_can_be_had(rows: Rows, data: st.DataObject) -> None:
    whole = b"".join(rows.chunks)
    start = data.draw(st.integers(0, rows.n_tokens))
    end = data.draw(st.integers(start, rows.n_tokens))
    found = rows.part(start, end)
    assert b"".join(found) == whole[start * rows.token_bytes : end * rows.token_bytes]
    assert all(chunk and len(chunk) % rows.token_bytes == 0 for chunk in found)


@given(rows_st(), st.lists(st.integers(0, 100), max_size=6))
def test_cut_again_and_again(rows: Rows, cuts: list[int]) -> None:
    whole, parts = b"".join(rows.chunks), [rows]
    for cut in cuts:
        longest = max(parts, key=lambda part: part.n_tokens)
        at = parts.index(longest)
        parts[at : at + 1] = longest.split(cut * longest.n_tokens // 100)
    assert b"".join(chunk for part in parts for chunk in part.chunks) == whole


def test_what_is_taken_whole_is_not_copied() -> None:
    rows = Rows([b"a" * 64, b"b" * 64, b"c" * 20], 37, 4)
    assert all(x is y for x, y in zip(rows.part(0, 37), rows.chunks, strict=True))
    middle = rows.part(8, 34)
    assert middle == [b"a" * 32, b"b" * 64, b"c" * 8] and middle[1] is rows.chunks[1]


def test_rows_of_a_model_that_has_none() -> None:
    """All its KV is checkpoint; stretches of tokens are cut all the same."""
    left, right = Rows([], 100, 0).split(30)
    assert (left.n_tokens, right.n_tokens, left.n_bytes, right.n_bytes) == (30, 70, 0, 0)
    assert left.chunks == right.chunks == left.part(0, 30) == []


def test_a_checkpoint_is_not_cut() -> None:
    checkpoint = Checkpoint(b"state")
    assert checkpoint.n_bytes == 5
    with pytest.raises(TypeError, match="one position"):
        checkpoint.split(1)


def test_a_mark_takes_no_memory_and_marks_both_parts() -> None:
    ghost = Ghost(5, "r")
    assert ghost.n_bytes == 0
    assert ghost.split(3) == (ghost, ghost)
