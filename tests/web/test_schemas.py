"""Properties of the conversion from JSON to SamplingParams: what is accepted is in range, nothing else escapes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.errors import InvalidRequest, MullamaError
from mullama.serving.manager import ModelManager
from mullama.types import SamplingParams
from mullama.web.openai import sampling
from mullama.web.openai.schemas import (
    ChatBody,
    CompletionBody,
    Options,
    completion_prompts,
    options_of,
    parse_chat,
    parse_completion,
)

from .fake_engine import N_CTX, N_VOCAB, FakeEngine

MODELS = ModelManager([("fake", FakeEngine())])
INFO = FakeEngine().info


def chat_options(data: bytes) -> Options:
    """What a chat asks for, checked as it is before its generation."""
    return options_of(parse_chat(data, MODELS).body, INFO)


def completion(data: bytes) -> tuple[Options, list[str | list[int]]]:
    body = parse_completion(data, MODELS).body
    options = options_of(body, INFO)
    return options, completion_prompts(body, options, INFO)


MESSAGES = [{"role": "user", "content": "hi"}]
INTEGERS = {
    "n",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "n_predict",
    "top_k",
    "repeat_last_n",
    "dry_allowed_length",
}
INTEGERS |= {"dry_penalty_last_n", "mirostat", "seed", "priority", "truncate_prompt_tokens"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from([f for f in ChatBody.__struct_fields__ + CompletionBody.__struct_fields__ if f != "model"])


def within(name: str) -> st.SearchStrategy[Any]:
    bounds = sampling.RANGES[name]
    high = bounds.high if bounds.high is not None else 2**40
    if name in INTEGERS:
        return st.integers(int(bounds.low), int(high))
    return st.floats(bounds.low, high, exclude_min=bounds.above)


in_range = st.fixed_dictionaries({}, optional={name: within(name) for name in sampling.RANGES})


@given(st.dictionaries(fields, json_values, max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_json_is_accepted_or_refused_in_words(body: dict[str, Any]) -> None:
    for parse, needed in ((parse_chat, {"messages": MESSAGES}), (parse_completion, {"prompt": "x"})):
        try:
            parse(json.dumps(needed | body).encode(), MODELS)
        except MullamaError as error:
            assert error.status == 400
            assert error.message


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_chat(data, MODELS)


@given(in_range)
@settings(max_examples=150, deadline=None)
def test_values_in_range_arrive(body: dict[str, Any]) -> None:
    body.pop("min_tokens", None)
    options = chat_options(json.dumps({"messages": MESSAGES} | body).encode())
    params = options.sampling
    assert options.n == body.get("n", 1)
    assert options.priority == body.get("priority", 0)
    for name in ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "dry_base", "mirostat_tau"):
        if name in body:
            assert getattr(params, name) == body[name]
    if "max_completion_tokens" in body or "max_tokens" in body:
        assert params.max_tokens == min(body.get("max_completion_tokens") or body["max_tokens"], 2**30)
    assert 0 <= params.top_k <= N_VOCAB
    assert -1 <= params.repeat_last_n <= N_CTX
    assert params.seed is None or 0 <= params.seed < 0xFFFFFFFF
    for index in (0, 1, 127):
        seed = options.of_choice(index).seed
        assert (seed is None) == (params.seed is None)
        assert seed is None or 0 <= seed < 0xFFFFFFFF


@given(st.sampled_from(sorted(sampling.RANGES)), st.data())
@settings(max_examples=150, deadline=None)
def test_values_out_of_range_are_named(name: str, data: st.DataObject) -> None:
    bounds = sampling.RANGES[name]
    below = st.integers(-(2**70), int(bounds.low) - 1).filter(
        lambda value: value != sampling.NO_LIMIT or not name.startswith("max_")
    )
    above = st.nothing() if bounds.high is None else st.integers(int(bounds.high) + 1, 2**70)
    value = data.draw(below | above)
    with pytest.raises(InvalidRequest) as caught:
        chat_options(json.dumps({"messages": MESSAGES, name: value}).encode())
    assert caught.value.param == name
    assert str(bounds) in caught.value.message


@given(st.lists(st.integers(-5, N_VOCAB + 5), min_size=1, max_size=20))
def test_token_prompts(tokens: list[int]) -> None:
    body = json.dumps({"prompt": tokens}).encode()
    wrong = [i for i, token in enumerate(tokens) if not 0 <= token < N_VOCAB]
    if wrong:
        with pytest.raises(InvalidRequest) as caught:
            completion(body)
        assert caught.value.param == f"prompt[{wrong[0]}]"
    else:
        assert completion(body)[1] == [tokens]


def test_defaults_are_those_of_sampling_params() -> None:
    assert chat_options(json.dumps({"messages": MESSAGES}).encode()).sampling == SamplingParams()


def test_every_sampling_parameter_can_be_set() -> None:
    body = {
        "temperature": 0.1,
        "top_k": 5,
        "top_p": 0.2,
        "min_p": 0.3,
        "typical_p": 0.4,
        "repetition_penalty": 1.5,
        "repeat_last_n": 9,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.7,
        "dry_multiplier": 0.8,
        "dry_base": 2,
        "dry_allowed_length": 3,
        "dry_penalty_last_n": 11,
        "dry_sequence_breakers": ["a"],
        "xtc_probability": 0.9,
        "xtc_threshold": 0.2,
        "mirostat": 2,
        "mirostat_tau": 4,
        "mirostat_eta": 0.2,
        "logit_bias": {"5": -100, "7": 1.5},
        "seed": 12,
        "max_tokens": 20,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop": "end",
        "guided_regex": "[0-9]+",
    }
    params = completion(json.dumps({"prompt": "x"} | body).encode())[0].sampling
    unset = [
        field.name
        for field in dataclasses.fields(SamplingParams)
        if getattr(params, field.name) == getattr(SamplingParams(), field.name)
    ]
    assert unset == ["shown"]
    assert params.repeat_penalty == 1.5
    assert params.logit_bias == ((5, -100.0), (7, 1.5))
    assert params.stop == ("end",)


def test_two_spellings() -> None:
    body = {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}
    assert chat_options(json.dumps(body).encode()).sampling.max_tokens == 6


@pytest.mark.parametrize(
    ("seed", "expected"), [(None, None), (-1, None), (0, 0), (42, 42), (2**32 - 1, 0), (-2, 2**32 - 3)]
)
def test_seeds(seed: int | None, expected: int | None) -> None:
    body = {"messages": MESSAGES, "seed": seed}
    assert chat_options(json.dumps(body).encode()).sampling.seed == expected


def test_the_documentation_lists_every_field_and_its_range() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip().strip("`"): line for line in text.splitlines() if line.startswith("| `")}
    for name in {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}:
        assert name in rows, name
    for name, bounds in sampling.RANGES.items():
        if name != "seed" and name != "priority":
            assert str(bounds) in rows[name], name
