"""Vocabularies that llama.cpp would end the process for are refused, or a text is that needs what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.gguf_files import made_of

from mullama._core import Model
from mullama.errors import InvalidRequest, ModelLoadError

SHAPE: list[list[Any]] = [
    ["general.architecture", "string", "llama"], ["llama.block_count", "u32", 2],
    ["llama.context_length", "u32", 64], ["llama.embedding_length", "u32", 8],
    ["llama.feed_forward_length", "u32", 8], ["llama.attention.head_count", "u32", 2],
    ["llama.attention.layer_norm_rms_epsilon", "f32", 1e-5],
]  # fmt: skip
Load = Callable[..., Model]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(kind: str, tokens: list[str], *more: list[Any]) -> Model:
        pairs = [*SHAPE, ["tokenizer.ggml.model", "string", kind], ["tokenizer.ggml.tokens", "[string]", tokens]]
        given = {pair[0] for pair in more}
        for name, of in (("token_type", "[i32]"), ("scores", "[f32]")):
            if f"tokenizer.ggml.{name}" not in given:
                pairs.append([f"tokenizer.ggml.{name}", of, [1 if of == "[i32]" else 0.0] * len(tokens)])
        path = tmp_path / "m.gguf"
        path.write_bytes(made_of({"pairs": [*pairs, *more]}))
        return Model(path, vocab_only=True, chat_template="chatml")

    return load


def test_no_vocabulary_at_all(load: Load) -> None:
    with pytest.raises(ModelLoadError, match="it has no vocabulary"):
        load("no_vocab", [], ["llama.vocab_size", "u32", 10])


@pytest.mark.parametrize("kind", ["llama", "plamo2"])
def test_a_text_that_no_token_stands_for(load: Load, kind: str) -> None:
    """There are no tokens of bytes to fall back on."""
    try:
        model = load(kind, ["<unk>", "<s>", "</s>", "a", "b"])
    except ModelLoadError:
        return
    with pytest.raises(InvalidRequest, match=r"this model's vocabulary cannot express the text"):
        model.tokenize("é")
    model.close()


def test_a_beginning_that_is_no_token(load: Load) -> None:
    """bert: every text begins with one."""
    model = load("bert", ["▁a", "b"], ["tokenizer.ggml.cls_token_id", "u32", 77])
    with pytest.raises(InvalidRequest, match="cannot express"):
        model.tokenize("a")
    model.close()


def test_what_begins_like_a_token_of_rwkv_and_is_none(load: Load) -> None:
    """It was looked for again and again, a token each time."""
    model = load("rwkv", ["<unk>", "a", "\\n", "Hello"], ["tokenizer.ggml.unknown_token_id", "u32", 0])
    assert model.tokenize("aHela", add_special=False) == [1, 0, 0, 0, 1]
    assert model.tokenize("Hello", add_special=False) == [3]
    model.close()


def test_no_newline(load: Load) -> None:
    """rwkv: looked for when it is loaded."""
    try:
        load("rwkv", ["a"]).close()
    except ModelLoadError as error:
        assert "vocabulary" in str(error)


def test_tokens_that_are_too_long_for_recursion(tmp_path: Path) -> None:
    """A level of the stack each byte, when they are put into a tree and when it is freed."""
    from mullama.models.files import gguf

    pairs = [*SHAPE, ["tokenizer.ggml.model", "string", "rwkv"], ["tokenizer.ggml.tokens", "[string]", ["x" * 100_000]]]
    path = tmp_path / "m.gguf"
    path.write_bytes(made_of({"pairs": pairs}))
    with pytest.raises(ModelLoadError, match="at most 8192 are allowed"):
        gguf.check(path, label="m")
