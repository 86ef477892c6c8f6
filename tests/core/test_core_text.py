"""Tokenise, detokenise, chat templates."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama._core import Model, chat_template_names
from mullama.errors import InvalidRequest, ModelLoadError

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def tiny_llama(models: Callable[..., Model]) -> Model:
    return models("llama")


@settings(max_examples=150, deadline=None)
@given(unicode_text)
def test_round_trip(tiny_llama: Model, text: str) -> None:
    tokens = tiny_llama.tokenize(text, parse_special=False)
    assert tiny_llama.detokenize(tokens) == text
    assert b"".join(tiny_llama.piece(token) for token in tokens) == text.encode()


@pytest.mark.model
@settings(max_examples=80, deadline=None)
@given(st.text(st.one_of(st.characters(categories=["L", "N", "P"], max_codepoint=0x24F), st.sampled_from(" \n€漢😀"))))
def test_round_trip_on_a_real_vocabulary(real_model: Model, text: str) -> None:
    """Common characters only: SmolLM2's vocabulary lacks some bytes."""
    tokens = real_model.tokenize(text, add_special=False, parse_special=False)
    assert real_model.detokenize(tokens) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, tiny.N_VOCAB - 1), max_size=50))
def test_any_tokens_have_a_text(tiny_llama: Model, tokens: list[int]) -> None:
    data = tiny_llama.detokenize_bytes(tokens)
    assert tiny_llama.detokenize(tokens) == data.decode("utf-8", "replace")
    assert data == b"".join(tiny_llama.piece(token) for token in tokens)


@pytest.mark.parametrize("text", ["", "\0", "a\0b", "\0" * 100, "😀", "\ufffd", "\U0010ffff", " ", "\r\n\t"])
def test_odd_texts(model: Model, text: str) -> None:
    assert model.detokenize(model.tokenize(text)) == text


def test_one_character_of_four_tokens(model: Model) -> None:
    assert model.tokenize("😀") == tiny.EMOJI
    assert model.detokenize(tiny.EMOJI[:3]) == "\ufffd"
    assert model.detokenize_bytes(tiny.EMOJI[:3]) == "😀".encode()[:3]


def test_a_text_much_longer_than_usual(model: Model) -> None:
    text = "the her and you " * 20_000
    assert model.detokenize(model.tokenize(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude00"])
def test_lone_surrogates_are_refused(model: Model, text: str) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        model.tokenize(text)


def test_special_tokens(model: Model) -> None:
    assert model.tokenize("<|im_end|>") == [tiny.IM_END]
    assert tiny.IM_END not in model.tokenize("<|im_end|>", parse_special=False)
    assert model.detokenize([104, tiny.IM_END]) == "h"
    assert model.detokenize([104, tiny.IM_END], special=True) == "h<|im_end|>"
    assert model.piece(tiny.IM_END) == b""
    assert model.piece(tiny.IM_END, special=True) == b"<|im_end|>"


def test_bos_is_added_where_the_vocabulary_says_so(models: Callable[..., Model]) -> None:
    model = models("llama", add_bos=True)
    assert model.tokenize("h") == [tiny.BOS, 104]
    assert model.tokenize("h", add_special=False) == [104]
    assert model.tokenize("") == [tiny.BOS]


def test_a_long_piece_is_whole(model: Model) -> None:
    assert model.piece(tiny.LONG_TOKEN) == b"A" * tiny.LONG_TOKEN_BYTES
    assert model.detokenize([tiny.LONG_TOKEN] * 3) == "A" * 3 * tiny.LONG_TOKEN_BYTES


@pytest.mark.parametrize("token", [-1, tiny.N_VOCAB, 1 << 40, -(1 << 70), 1.0, "1", None, True])
def test_what_is_not_a_token(model: Model, token: Any) -> None:
    for use in (model.check_token, model.piece, lambda t: model.detokenize([t])):
        with pytest.raises(InvalidRequest, match="token id"):
            use(token)


def test_not_a_text(model: Model) -> None:
    for value in (None, b"bytes", 5):
        with pytest.raises(TypeError):
            model.tokenize(value)  # type: ignore[arg-type]


# -- chat


def chat(model: Model, *messages: dict[str, Any], **options: Any) -> str:
    return model.render_chat(json.dumps(messages).encode(), **options)


def test_chat_by_the_models_template(model: Model) -> None:
    user = {"role": "user", "content": "hi"}
    assert chat(model, user) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat(model, user, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert model.facts()["has_chat_template"] is True
    assert "raise_exception" in model.chat_template()


def test_content_in_parts(model: Model) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = chat(model, {"role": "user", "content": parts})
    assert "one" in text and "two" in text


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=50))
def test_any_content_arrives_unchanged(tiny_llama: Model, content: str) -> None:
    assert f"user\n{content}<|im_end|>" in chat(tiny_llama, {"role": "user", "content": content})


@pytest.mark.parametrize(
    "messages",
    [
        b"", b"{", b"null", b"5", b'"text"', b"{}", b"[5]", b"[null]", b"[{}]", b'[{"role":5,"content":"x"}]',
        b'[{"content":"x"}]', b'[{"role":"user","content":5}]', b'[{"role":"user","content":{}}]',
        b'[{"role":"user","content":[{}]}]', b'[{"role":"user","content":[{"type":"image"}]}]',
        b'[{"role":"user","content":[{"type":"text"}]}]', b'[{"role":"user","content":[5]}]',
        b'[{"role":"assistant","tool_calls":5}]', b'[{"role":"assistant","tool_calls":[5]}]',
        b'[{"role":"assistant","tool_calls":[{"type":"function"}]}]',
        b'[{"role":"user","content":"\\ud800"}]', b"[" * 200, b'[{"role":"user","content":"x"}] trailing',
        b'[{"role":"tool","content":"x"}]',
    ],
)  # fmt: skip
def test_bad_messages_are_refused(model: Model, messages: bytes) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses") as refused:
        model.render_chat(messages)
    assert refused.value.param == "messages"


@pytest.mark.parametrize("messages", [b"\xff\xfe", b'[{"role":"user","content":"\xff"}]'])
def test_messages_that_are_not_utf8_are_refused(model: Model, messages: bytes) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        model.render_chat(messages)


NESTED = """
import sys
import threading
import time
from mullama._core import Model
from mullama.errors import InvalidRequest
model = Model(sys.argv[1])
try:
    model.render_chat(b"[" * 100_000 + b"]" * 100_000)
except InvalidRequest:
    print("refused")
"""


def test_nested_json_does_not_kill_the_process(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NESTED, str(tiny_model())], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "refused\n"


def test_what_the_template_raises_is_shown(model: Model) -> None:
    with pytest.raises(InvalidRequest, match="no tools here"):
        chat(model, {"role": "tool", "content": "x"})


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("chatml", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3", "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma", "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"),
        ("phi3", "<|user|>\nhi<|end|>\n<|assistant|>\n"),
    ],
)  # fmt: skip
def test_templates_by_name(tiny_model: Callable[..., Path], name: str, prompt: str) -> None:
    model = Model(tiny_model(), vocab_only=True, chat_template=name)
    assert chat(model, {"role": "user", "content": "hi"}) == prompt
    with_system = chat(model, {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    assert "be brief" in with_system and with_system != prompt
    with pytest.raises(InvalidRequest):
        model.render_chat(b'[{"role":"user","content":5}]')
    model.close()


def test_every_name_makes_a_prompt_of_the_messages(tiny_model: Callable[..., Path]) -> None:
    names = chat_template_names()
    assert {"chatml", "llama2", "llama3", "mistral-v7", "gemma", "deepseek3"} <= set(names)
    for name in names:
        model = Model(tiny_model(), vocab_only=True, chat_template=name)
        text = chat(model, {"role": "user", "content": "first"}, {"role": "assistant", "content": "second"},
                    {"role": "user", "content": "third é"})  # fmt: skip
        assert [text.find(word) >= 0 for word in ("first", "second", "third é")] == [True] * 3, name
        model.close()


def test_a_model_without_a_template_gets_chatml(models: Callable[..., Model]) -> None:
    model = models("llama", chat_template=None)
    assert model.facts()["has_chat_template"] is False
    assert chat(model, {"role": "user", "content": "hi"}) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_broken_template_of_the_model_gets_chatml(tiny_model: Callable[..., Path]) -> None:
    model = Model(tiny_model(chat_template="{% for m in messages %}"))
    assert "<|im_start|>user\nhi" in chat(model, {"role": "user", "content": "hi"})
    model.close()


def test_an_override_wins(tiny_model: Callable[..., Path]) -> None:
    model = Model(tiny_model(), chat_template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert chat(model, {"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}) == "[hi][ho]"
    assert model.facts()["has_chat_template"] is True
    model.close()


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{", "{% nonsense %}", "{{ 1 + }}"])
def test_a_broken_override_is_refused(tiny_model: Callable[..., Path], template: str) -> None:
    with pytest.raises(ModelLoadError, match="chat template does not parse") as refused:
        Model(tiny_model(), chat_template=template)
    assert refused.value.param == "chat_template"


def test_a_template_that_fails_when_used(tiny_model: Callable[..., Path]) -> None:
    model = Model(tiny_model(), chat_template="{{ messages[0]['content'].nonsense().more }}")
    with pytest.raises(InvalidRequest, match="refuses"):
        chat(model, {"role": "user", "content": "hi"})
    model.close()


def test_bos_is_not_doubled(models: Callable[..., Model]) -> None:
    """The template writes a BOS and the vocabulary adds one: tokenising the rendered chat holds one."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = models("llama", add_bos=True, chat_template=template)
    tokens = model.tokenize(chat(model, {"role": "user", "content": "HI"}))
    assert tokens == [tiny.BOS, *b"HI"]


@pytest.mark.model
def test_the_template_of_smollm2(real_model: Model) -> None:
    text = chat(real_model, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_model_closed_under_a_method_is_freed_when_that_has_ended(tiny_model: Callable[..., Path]) -> None:
    """No thread may be inside a model that is freed: what it is doing ends, and the next call is refused."""
    text = "the sun and the others are here " * 20_000
    expected = Model(tiny_model()).tokenize(text)
    for _ in range(5):
        model, results = Model(tiny_model()), []
        inside = threading.Event()

        def work(model: Model = model, results: list[Any] = results, inside: threading.Event = inside) -> None:
            inside.set()
            try:
                results.append(model.tokenize(text))
            except ModelLoadError:
                results.append(None)

        thread = threading.Thread(target=work)
        thread.start()
        inside.wait()
        time.sleep(0.005)
        model.close()
        thread.join()
        assert results in ([expected], [None])
        with pytest.raises(ModelLoadError, match="closed"):
            model.tokenize("x")
