"""Prompts: exact lengths, shared blocks shared, nothing else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.errors import InvalidRequest
from mullama.workload.base import TraceRequest
from mullama.workload.prompts import SMALLEST_VOCABULARY, Prompts

VOCABULARY = list(range(100, 1100))


def common(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=30), st.integers(0, 5))
def test_lengths_are_exact_and_no_prefix_is_shared(lengths: list[int], seed: int) -> None:
    prompts = Prompts(VOCABULARY, seed)
    made = [prompts.make(i, TraceRequest(0, n, 1)) for i, n in enumerate(lengths)]
    assert [len(prompt) for prompt in made] == lengths
    assert all(set(prompt) <= set(VOCABULARY) for prompt in made)
    assert len({prompt[0] for prompt in made}) == len(made)
    assert made == [Prompts(VOCABULARY, seed).make(i, TraceRequest(0, n, 1)) for i, n in enumerate(lengths)]


def test_the_seed_and_the_index_change_the_prompt() -> None:
    request = TraceRequest(0, 50, 1)
    made = {tuple(Prompts(VOCABULARY, seed).make(index, request)) for seed in (1, 2) for index in (0, 1)}
    assert len(made) == 4


def test_equal_blocks_are_equal_tokens_and_no_more() -> None:
    prompts = Prompts(VOCABULARY)
    first = prompts.make(0, TraceRequest(0, 100, 1, blocks=(7, 8, 9), block_tokens=32))
    second = prompts.make(1, TraceRequest(0, 80, 1, blocks=(7, 8, 4), block_tokens=32))
    third = prompts.make(2, TraceRequest(0, 70, 1, blocks=(5, 8), block_tokens=32))
    cut = prompts.make(3, TraceRequest(0, 40, 1, blocks=(7, 8), block_tokens=32))
    alone = prompts.make(4, TraceRequest(0, 100, 1))
    assert [len(prompt) for prompt in (first, second, third, cut)] == [100, 80, 70, 40]
    assert common(first, second) == 64
    assert first[:40] == cut
    assert common(first, third) == 0
    assert first[32:64] == third[32:64]  # the same block at the same place
    assert all(common(alone, other) == 0 for other in (first, second, third))


def test_small_vocabularies_spell_the_number_in_two_tokens() -> None:
    prompts = Prompts(range(SMALLEST_VOCABULARY))
    made = [prompts.make(i, TraceRequest(0, 20, 1)) for i in range(SMALLEST_VOCABULARY**2 // 2)]
    assert max(common(a, b) for a, b in itertools.combinations(made, 2)) == 1
    with pytest.raises(InvalidRequest, match="too few"):
        Prompts(range(SMALLEST_VOCABULARY - 1))
