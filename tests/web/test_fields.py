"""Every known field is taken, harmless or refused, by one table; the page is made from it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from mullama.web.openai import fields
from mullama.web.openai.fields import BOTH, CHAT, FIELDS, TEXT, Verdict
from mullama.web.openai.schemas import ChatBody, CompletionBody

from .conftest import Client
from .fake_engine import FakeEngine

PATHS = {CHAT: "/v1/chat/completions", TEXT: "/v1/completions"}
NEEDED: dict[str, dict[str, Any]] = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, TEXT: {"prompt": "x"}}
#: What asks for something, whatever the field: none of the values that ask for nothing.
ASKING: tuple[Any, ...] = ("x", 7, True, ["x"], {"x": 1})

EACH = [(one, endpoint) for one in FIELDS for endpoint in one.endpoints]


def ids(value: object) -> str:
    return value.name if isinstance(value, fields.Field) else str(value)


def of(verdict: Verdict) -> list[tuple[fields.Field, str]]:
    return [(one, endpoint) for one, endpoint in EACH if one.verdict is verdict]


def test_a_field_is_in_the_table_once() -> None:
    names = [(one.name, endpoint) for one, endpoint in EACH]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("endpoint", "schema"), [(CHAT, ChatBody), (TEXT, CompletionBody)])
def test_what_is_taken_is_what_the_schema_has(endpoint: str, schema: type) -> None:
    refused = {one.name for one, where in of(Verdict.REFUSED) if where == endpoint}
    assert fields.taken(endpoint) == set(schema.__struct_fields__) - refused  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("endpoint", "params"),
    [
        (CHAT, chat_create_params.CompletionCreateParamsBase),
        (TEXT, completion_create_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_the_official_client_is_known(endpoint: str, params: type) -> None:
    """Fails when a new version of it has more: then the table needs them."""
    known = {one.name for one, where in EACH if where == endpoint}
    assert set(params.__annotations__) - known == set()


#: As the bug reports had them.
REPORTED = (
    "guided_whitespace_pattern",
    "grammar_lazy",
    "chat_template",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "max_new_tokens",
    "web_search_options",
    "prediction",
)


@pytest.mark.parametrize("name", REPORTED)
def test_what_was_ignored_in_silence_is_refused(client: Client, name: str) -> None:
    for endpoint, value in itertools.product(BOTH, ("x", 7, ["x"], {"x": 1})):
        reply = client.post(PATHS[endpoint], NEEDED[endpoint] | {name: value})
        assert (reply.status, reply.error["param"]) == (400, name)
        assert reply.error["message"].startswith(f"{name}: this server does not support")


@pytest.mark.parametrize(("field", "endpoint"), of(Verdict.REFUSED), ids=ids)
def test_refused_fields(client: Client, engine: FakeEngine, field: fields.Field, endpoint: str) -> None:
    path, needed = PATHS[endpoint], NEEDED[endpoint]
    for value in ASKING:
        if value not in field.idle:
            reply = client.post(path, needed | {field.name: value})
            assert (reply.status, reply.error["param"]) == (400, field.name), value
    before = len(engine.requests)
    typed = field.name in (ChatBody if endpoint == CHAT else CompletionBody).__struct_fields__
    for value in (None, *field.idle):
        reply = client.post(path, needed | {field.name: value})
        if typed and reply.status == 400:
            assert "expected" in reply.error["message"]  # of another type than the schema's
        else:
            assert reply.status == 200, value
    assert len(engine.requests) > before


@pytest.mark.parametrize(("field", "endpoint"), of(Verdict.HARMLESS), ids=ids)
def test_harmless_fields_change_nothing(client: Client, engine: FakeEngine, field: fields.Field, endpoint: str) -> None:
    for value in ASKING:
        assert client.post(PATHS[endpoint], NEEDED[endpoint] | {field.name: value}).status == 200
    assert len({(tuple(request.prompt), request.sampling) for request in engine.requests}) == 1


def test_zero_is_not_false_and_names_may_be_escaped(client: Client) -> None:
    assert client.post(PATHS[TEXT], NEEDED[TEXT] | {"logprobs": 0}).error["param"] == "logprobs"
    assert client.post(PATHS[TEXT], NEEDED[TEXT] | {"logprobs": False}).status == 200
    assert client.post(PATHS[CHAT], NEEDED[CHAT] | {"use_beam_search": 0}).error["param"] == "use_beam_search"
    body = json.dumps(NEEDED[CHAT])[:-1].encode() + rb', "grammar_laz\u0079": true}'
    for data in (body, b"\xef\xbb\xbf" + body):
        assert client.post(PATHS[CHAT], data).error["param"] == "grammar_lazy"
    assert client.post(PATHS[CHAT], NEEDED[CHAT] | {"nobody_knows_this": 1}).status == 200


def test_a_member_of_a_field_is_refused_too(client: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    error = client.post(PATHS[CHAT], NEEDED[CHAT] | {"stream": True, "stream_options": options}).error
    assert error["param"] == "stream_options.continuous_usage_stats"
    options["continuous_usage_stats"] = False
    assert client.post(PATHS[CHAT], NEEDED[CHAT] | {"stream": True, "stream_options": options}).status == 200


def test_a_refusal_says_what_there_is_instead(client: Client) -> None:
    message = client.post(PATHS[CHAT], NEEDED[CHAT] | {"max_new_tokens": 5}).error["message"]
    assert (
        message
        == "max_new_tokens: this server does not support this name yet; max_tokens is the one; leave the field out"
    )
    message = client.post(PATHS[CHAT], NEEDED[CHAT] | {"watermarking": True}).error["message"]
    assert message == "watermarking: this server does not support watermarks yet; leave the field out"


def test_the_page_is_made_from_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    assert fields.page() in text, "run: python -m mullama.web.openai.fields docs/api.md"
    assert text.count(fields.BEGIN) == text.count(fields.END) == 1
    for one in FIELDS:
        assert f"`{one.name}`" in fields.page() and set(one.endpoints) <= set(BOTH)
