"""Values as bridges between languages and other servers' clients spell them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Client
from .fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def raw(text: str) -> bytes:
    """A chat whose further members are ``text``, byte for byte."""
    return json.dumps(BODY)[:-1].encode() + b", " + text.encode() + b"}"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('"max_tokens": 3.0', "max_tokens", 3),
        ('"max_tokens": 3e0', "max_tokens", 3),
        ('"max_tokens": 0.3e1, "top_k": 20.0', "top_k", 20),
        ('"seed": -0.0', "seed", 0),
        ('"mirostat": 2.0', "mirostat", 2),
        ('"logit_bias": {"5": 1.0}, "top_k": 7.0', "logit_bias", ((5, 1.0),)),
        ('"stream_options": null, "repeat_last_n": -1.0', "repeat_last_n", -1),
    ],
)
def test_whole_numbers_with_a_point(client: Client, engine: FakeEngine, text: str, name: str, value: object) -> None:
    assert client.post(CHAT, raw(text)).status == 200
    given = getattr(engine.requests[-1].sampling, name)
    assert given == value and type(given) is type(value)


def test_whole_numbers_with_a_point_elsewhere(client: Client, engine: FakeEngine) -> None:
    reply = client.post("/v1/completions", b'{"prompt": [5.0, 6, 7e0], "n": 2.0, "priority": 1.0, "logprobs": null}')
    assert reply.status == 200 and len(reply.json["choices"]) == 2
    assert list(engine.requests[-1].prompt) == [5, 6, 7] and engine.requests[-1].priority == 1
    client.request(
        "PATCH", "/internal/scheduler", b'{"params": {"prefill_budget": 64.0}}', {"Content-Type": "application/json"}
    )
    assert engine.scheduler_calls[-1][2] == {"prefill_budget": 64}


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('"max_tokens": 3.5', "max_tokens"),
        ('"max_tokens": 1e300', "max_tokens"),
        ('"max_tokens": 3.0, "top_k": 3.5', "top_k"),  # the fault is named, not what was taken
        ('"max_tokens": 3.0, "stop": 5', "stop"),
        ('"max_tokens": "3"', "max_tokens"),
        ('"stream": 1.0', "stream"),
    ],
)
def test_other_numbers_are_refused_by_name(client: Client, text: str, param: str) -> None:
    reply = client.post(CHAT, raw(text))
    assert reply.status == 400 and reply.error["param"] == param


def test_numbers_of_functions_stay_as_they_came(client: Client, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "number", "minimum": 3.0}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert client.post(CHAT, {**BODY, "tools": tools, "max_tokens": 2.0}).status == 200
    assert b'"minimum":3.0' in engine.asks[0].tools


@pytest.mark.parametrize(
    "body", [{"max_tokens": -1}, {"max_completion_tokens": -1, "max_tokens": 5}, {"max_tokens": -1.0}]
)
def test_minus_one_is_no_limit(client: Client, engine: FakeEngine, body: dict[str, Any]) -> None:
    for path, needed in ((CHAT, BODY), ("/v1/completions", {"prompt": "x"})):
        if path == CHAT or "max_completion_tokens" not in body:
            assert client.post(path, needed | body | {"min_tokens": 9}).status == 200
            assert engine.requests[-1].sampling.max_tokens is None
    assert "or -1 for no limit" in client.post(CHAT, BODY | {"max_tokens": 0}).error["message"]


@pytest.mark.parametrize(
    ("field", "value", "means"),
    [
        ("stop", "", ()),
        ("stop", [""], ()),
        ("stop", ["", ""], ()),
        ("stop", [], ()),
        ("logit_bias", [], ()),
        ("logit_bias", {}, ()),
        ("logit_bias", [[5, -1], [6, 2.5]], ((5, -1.0), (6, 2.5))),
        ("dry_sequence_breakers", '["\\n", ":"]', ("\n", ":")),
        ("dry_sequence_breakers", "[]", ()),
        ("dry_sequence_breakers", [], ()),
    ],
)
def test_other_spellings(client: Client, engine: FakeEngine, field: str, value: object, means: object) -> None:
    assert client.post(CHAT, BODY | {field: value}).status == 200
    assert getattr(engine.requests[-1].sampling, field) == means


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"stop": ["a", ""]}, "must not be empty"),
        ({"logit_bias": [[5]]}, "a list of pairs"),
        ({"logit_bias": [["5", 1]]}, "a list of pairs"),
        ({"logit_bias": [[-5, 1]]}, "must be a number"),
        ({"logit_bias": [[100000, 1]]}, "outside the vocabulary"),
        ({"dry_sequence_breakers": '["a", 5]'}, "one as JSON text"),
        ({"dry_sequence_breakers": '"a"'}, "one as JSON text"),
        ({"dry_sequence_breakers": '[""]'}, "1 to 1024"),
    ],
)
def test_what_is_still_wrong(client: Client, body: dict[str, Any], words: str) -> None:
    reply = client.post(CHAT, BODY | body)
    assert reply.status == 400
    assert words in reply.error["message"] and reply.error["param"] == next(iter(body))
