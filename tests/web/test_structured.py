"""What an answer has to be, by every name that clients have for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mullama.types import Constraint, ConstraintKind

from .conftest import Client
from .fake_engine import FakeEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"const": "ü"}}, "required": ["z"]}
AS_JSON = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA, ensure_ascii=False))
OBJECT = Constraint(ConstraintKind.JSON_OBJECT)
LARK = 'start: "a"'
GBNF = 'root ::= "a"'

SPELLINGS: list[tuple[dict[str, Any], Constraint | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, OBJECT),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, AS_JSON),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, AS_JSON),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, AS_JSON),
    ({"response_format": {"type": "json_schema", "json_schema": {"strict": True, "schema": SCHEMA}}}, AS_JSON),
    ({"structured_outputs": {"json": SCHEMA}}, AS_JSON),
    ({"structured_outputs": {"json": AS_JSON.text}}, AS_JSON),
    ({"structured_outputs": {"json_object": True}}, OBJECT),
    ({"structured_outputs": {"regex": "a+"}}, Constraint(ConstraintKind.REGEX, "a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint(ConstraintKind.CHOICE, '["a", "b"]')),
    ({"structured_outputs": {"grammar": LARK}}, Constraint(ConstraintKind.LARK, LARK)),
    ({"structured_outputs": {}}, None),
    ({"guided_json": SCHEMA}, AS_JSON),
    ({"guided_json": AS_JSON.text}, AS_JSON),
    ({"guided_regex": "a+"}, Constraint(ConstraintKind.REGEX, "a+")),
    ({"guided_choice": ["a", "b"]}, Constraint(ConstraintKind.CHOICE, '["a", "b"]')),
    ({"guided_grammar": GBNF}, Constraint(ConstraintKind.GBNF, GBNF)),
    ({"grammar": GBNF}, Constraint(ConstraintKind.GBNF, GBNF)),
    ({"grammar": LARK}, Constraint(ConstraintKind.LARK, LARK)),
    ({"grammar": ""}, None),
    ({"json_schema": SCHEMA}, AS_JSON),
    ({"json_schema": None, "guided_choice": None}, None),
]  # fmt: skip


@pytest.mark.parametrize("url", [CHAT, TEXT])
@pytest.mark.parametrize(("fields", "constraint"), SPELLINGS)
def test_every_spelling(
    client: Client, engine: FakeEngine, url: str, fields: dict[str, Any], constraint: Constraint | None
) -> None:
    needed = {"messages": ASK} if url == CHAT else {"prompt": "x"}
    assert client.post(url, {**needed, **fields}).status == 200
    assert engine.requests[-1].sampling.constraint == constraint


@pytest.mark.parametrize(("given", "constraint"), [("json", OBJECT), (SCHEMA, AS_JSON), ("", None), (None, None)])
def test_ollama_calls_it_format(
    client: Client, engine: FakeEngine, given: object, constraint: Constraint | None
) -> None:
    for path, more in (("/api/chat", {"messages": ASK}), ("/api/generate", {"prompt": "x"})):
        assert client.post(path, {"model": "fake", "stream": False, "format": given, **more}).status == 200
        assert engine.requests[-1].sampling.constraint == constraint


def test_whole_numbers_of_other_clients_leave_a_schema_as_it_came(client: Client, engine: FakeEngine) -> None:
    body = {"messages": ASK, "max_tokens": 5.0, "guided_json": {"maximum": 3.0}}
    assert client.post(CHAT, body).status == 200
    assert engine.requests[-1].sampling.constraint == Constraint(ConstraintKind.JSON_SCHEMA, '{"maximum": 3.0}')


def test_it_is_worked_out_off_the_event_loop(client: Client, engine: FakeEngine) -> None:
    assert client.post(CHAT, {"messages": ASK, "guided_regex": "a"}).status == 200
    assert [name for name, _ in engine.prepared if name.startswith("mullama-web")]
