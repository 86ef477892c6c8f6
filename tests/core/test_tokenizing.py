"""Long texts in pieces: the tokens of one go, whatever the text, and an end as soon as there are too many."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama._core import Model
from mullama.engine.engine import Engine
from mullama.engine.requests.tokenizing import Tokenizer, TooManyTokens, _border_of, pieces
from mullama.errors import ContextLengthExceeded, InvalidRequest

PROSE = "the king and her horse, it is said, were in all of it; you know. 12 of 34\n\nIt's  two spaces\tand a tab "

#: Stretches that a text is put together from: words, and all that stands between them.
STRETCHES = st.sampled_from(
    ["the", "and her", " ", "  ", "\n", "\n\n", ".", ", ", "it's", "12", " 3", "é", "ß", "漢字", "。", "😀", "a b c",
     "<|im_end|>", "<|im_start|>", "<|im_", "\u0301", "²", "_", "Ω", " Ж", "\u00a0", "ing"]
)  # fmt: skip


SIZE = 8  # characters of a piece here, so that a text of a few lines has many borders


def in_pieces(model: Model) -> Tokenizer:
    return Tokenizer(lambda: model, piece_chars=SIZE)


@settings(max_examples=300, deadline=None)
@given(st.lists(STRETCHES, max_size=60).map("".join), st.integers(1, 20))
def test_pieces_make_up_the_text(text: str, size: int) -> None:
    assert "".join(pieces(text, size)) == text
    assert " ".join(pieces(text, size, eats_space=True)) == text
    assert all(len(piece) >= size for piece in list(pieces(text, size))[:-1])


@settings(max_examples=150, deadline=None)
@given(st.lists(STRETCHES, max_size=80).map("".join), st.booleans())
def test_the_tokens_of_one_go(models: Callable[..., Model], text: str, add_bos: bool) -> None:
    model = models("llama", add_bos=add_bos)
    tokenizer = in_pieces(model)
    for special in (True, False):
        for parse in (True, False):
            whole = model.tokenize(text, add_special=special, parse_special=parse)
            assert tokenizer.tokenize(text, add_special=special, parse_special=parse) == whole


@pytest.mark.model
@settings(max_examples=100, deadline=None)
@given(st.lists(STRETCHES, max_size=120).map("".join))
def test_the_tokens_of_one_go_on_a_real_vocabulary(real_model: Model, text: str) -> None:
    tokenizer = in_pieces(real_model)
    assert tokenizer.ways().cuts
    assert tokenizer.tokenize(text) == real_model.tokenize(text)


@pytest.mark.model
@settings(max_examples=100, deadline=None)
@given(text=st.lists(STRETCHES, max_size=120).map("".join))
def test_the_tokens_of_one_go_with_sentencepiece(gemma_vocab: Model, text: str) -> None:
    tokenizer = in_pieces(gemma_vocab)
    assert tokenizer.ways().cuts
    assert tokenizer.tokenize(text) == gemma_vocab.tokenize(text)


@pytest.fixture(scope="module")
def gemma_vocab(gemma3: Path) -> Iterator[Model]:
    model = Model(gemma3, vocab_only=True)
    yield model
    model.close()


def test_what_is_between_the_pieces_is_called(model: Model) -> None:
    text = "the king and her horse " * 4
    calls = []
    in_pieces(model).tokenize(text, between=lambda: calls.append(1))
    assert len(calls) == len(list(pieces(text, SIZE))) - 1 > 3


def test_it_ends_as_soon_as_there_are_too_many(model: Model) -> None:
    text = PROSE * 1000
    whole = len(model.tokenize(text))
    n_calls = 0

    def between() -> None:
        nonlocal n_calls
        n_calls += 1

    with pytest.raises(TooManyTokens) as caught:
        # the tiny vocabulary's longest token would let 600 bytes be one
        in_pieces(model).tokenize(text, most=len(text) // tiny.LONG_TOKEN_BYTES + 1, between=between)
    assert not caught.value.is_all
    assert len(text) // tiny.LONG_TOKEN_BYTES + 1 < caught.value.n < whole // 10
    assert n_calls < 100


def test_exactly_as_many_as_asked_for_are_not_too_many(model: Model) -> None:
    tokenizer = in_pieces(model)
    whole = model.tokenize(PROSE)
    assert tokenizer.tokenize(PROSE, most=len(whole)) == whole
    with pytest.raises(TooManyTokens) as caught:
        tokenizer.tokenize(PROSE, most=len(whole) - 1)
    assert caught.value.n == len(whole)


def test_the_bytes_alone_can_be_too_many(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text without a place to cut it at is not even begun."""
    tokenizer = in_pieces(model)
    tokenizer.ways()
    monkeypatch.setattr(tokenizer, "_get_model", lambda: pytest.fail("it was tokenised"))
    with pytest.raises(TooManyTokens) as caught:
        tokenizer.tokenize("漢" * 100_000, most=499)
    assert caught.value.n == 3 * 100_000 / tiny.LONG_TOKEN_BYTES == 500


@pytest.mark.model
def test_bytes_that_have_no_token_do_not_count(real_model: Model) -> None:
    """SmolLM2's vocabulary lacks some control characters: they leave nothing behind."""
    text = "\x04" * 100_000
    assert in_pieces(real_model).tokenize(text, most=10) == real_model.tokenize(text) == []


def test_facts_of_the_vocabulary(model: Model) -> None:
    facts = model.vocab_facts()
    assert b"<|im_start|>" in facts.pop("specials")
    assert facts == {"longest": tiny.LONG_TOKEN_BYTES, "byte_tokens": list(range(256)), "joins": False}


class WordModel:
    """A vocabulary of words as SentencePiece has them: a space is put before every text, and belongs to its word."""

    def __init__(self, *, joins: bool = False) -> None:
        self.joins = joins
        self.asked: list[str] = []

    def metadata(self) -> dict[str, str]:
        return {"tokenizer.ggml.model": "llama"}

    def vocab_facts(self) -> dict[str, Any]:
        return {"specials": [], "longest": 100, "byte_tokens": list(range(256)), "joins": self.joins}

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        self.asked.append(text)
        return [1] * add_special + [hash(word) for word in re.findall(" [^ ]*", " " + text)] + [2] * add_special


def test_a_space_that_the_vocabulary_adds_is_not_there_twice() -> None:
    model: Any = WordModel()
    text = "one  two three four. five six\nseven eight 9 10 eleven twelve"
    whole = model.tokenize(text)
    assert in_pieces(model).tokenize(text) == whole
    assert any(piece.startswith("three") for piece in model.asked), "it was cut, and the space taken out"


def test_words_that_one_token_joins_are_not_cut() -> None:
    model: Any = WordModel(joins=True)
    text = "one two three four five six"
    in_pieces(model).tokenize(text)
    assert text in model.asked


def test_lone_surrogates_are_refused(model: Model) -> None:
    for most in (None, 5):
        with pytest.raises(InvalidRequest, match="lone surrogate"):
            in_pieces(model).tokenize("the king " * 10 + "\ud800", most=most)


def test_the_engine_says_how_many_there_are(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    with pytest.raises(ContextLengthExceeded, match=r"has at least (\d+) tokens; one request may use 512") as caught:
        engine.prompt_tokens(PROSE * 100, most=engine.info.n_ctx - 1)
    assert caught.value.n_tokens is not None and caught.value.n_tokens >= 512
    assert engine.prompt_tokens(PROSE * 3) == engine.tokenize(PROSE * 3)


def test_borders_at_special_tokens() -> None:
    chatml = _border_of([b"<|im_start|>", b"<|im_end|>", b"<unk>"])
    assert chatml is not None
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>b c <| x<unk>"
    assert list(pieces(text, 1, border=chatml)) == [
        "<|im_start|>user\na", "<|im_end|>\n", "<|im_start|>b", " c <| x", "<unk>",
    ]  # fmt: skip
    assert _border_of([b"<a>", b"x<b>"]) is None, "one may reach over the beginning of the other"
    assert _border_of([b"\t\t", b"  "]) is None and _border_of([]) is None


@pytest.mark.model
def test_many_special_tokens_take_no_time_that_grows_with_their_square(real_model: Model) -> None:
    """Counted, not timed: no piece holds more than a few of them."""
    longest = 0

    class Counts:
        def __getattr__(self, name: str) -> Any:
            return getattr(real_model, name)

        def tokenize(self, text: str, **options: Any) -> list[int]:
            nonlocal longest
            longest = max(longest, len(text))
            return real_model.tokenize(text, **options)

    text = "<|im_start|>user\na<|im_end|>\n" * 2000
    tokens = Tokenizer(lambda: Counts()).tokenize(text)  # type: ignore[arg-type, return-value]
    assert longest < 1100 and tokens[:1000] == real_model.tokenize(text[: len(text) // 4])[:1000]
    assert len(tokens) == 2000 * len(real_model.tokenize("<|im_start|>user\na<|im_end|>\n"))
