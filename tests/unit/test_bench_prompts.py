"""Prompts have exactly the asked length, differ from each other, and come again with the same seed."""

from __future__ import annotations

import re

import pytest

from bench.prompts import PromptMaker, single_token_words, words

TWO_TOKEN_WORDS = {"mountain", "remembers", "Every"}


def count(text: str) -> int:
    """A small byte-pair-like tokenizer: BOS, one token a word with its space, some words two, one a full stop."""
    pieces = re.findall(r" ?\w+|\.", text)
    return 1 + sum(2 if piece.strip() in TWO_TOKEN_WORDS else 1 for piece in pieces)


@pytest.mark.parametrize("n_tokens", [10, 20, 64, 140, 500])
def test_counted_prompts_have_exactly_the_asked_length(n_tokens: int) -> None:
    assert [count(text) for text in PromptMaker(1, count).many(20, n_tokens)] == [n_tokens] * 20


def test_calibrated_prompts_are_exact_without_asking_again() -> None:
    asked = []

    def counting(text: str) -> int:
        asked.append(text)
        return count(text)

    maker = PromptMaker.calibrated(1, counting)
    n_asked = len(asked)
    prompts = maker.many(50, 140)
    assert len(asked) == n_asked < 60
    assert {count(text) for text in prompts} == {140}
    assert not any(word in text for text in prompts for word in TWO_TOKEN_WORDS)


def test_single_token_words_drops_exactly_the_others() -> None:
    assert set(words()) - set(single_token_words(count, words())) == TWO_TOKEN_WORDS


def test_no_two_prompts_share_their_beginning() -> None:
    beginnings = [" ".join(text.split()[:4]) for text in PromptMaker(3).many(2000, 30)]
    assert len(set(beginnings)) == 2000


def test_the_seed_decides() -> None:
    assert PromptMaker(5).many(3, 40) == PromptMaker(5).many(3, 40)
    assert PromptMaker(5).many(3, 40) != PromptMaker(6).many(3, 40)


def test_too_short_a_prompt_cannot_be_unique() -> None:
    with pytest.raises(ValueError, match="at least"):
        PromptMaker(1).make(2)
