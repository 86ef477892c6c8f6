"""What an answer has to be, by every name that clients have for it, as one Constraint."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Protocol

import msgspec

from mullama.errors import InvalidRequest
from mullama.types import Constraint, ConstraintKind


class SchemaFormat(msgspec.Struct):
    """``json_schema`` of a response_format. ``strict`` or not, the schema is kept to."""

    schema: dict[str, Any] | bool | None = None
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: str = "text"
    json_schema: SchemaFormat | None = None
    schema: dict[str, Any] | bool | None = None  # llama-server's

    field_schemas: ClassVar = {"type": {"enum": ["text", "json_object", "json_schema"]}}


class StructuredOutputs(msgspec.Struct):
    """vLLM's ``structured_outputs``."""

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None
    disable_additional_properties: bool | None = None


class Constraining(Protocol):
    """The fields of a body that constrain its answer."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: str | dict[str, Any] | bool | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    grammar: str | None
    json_schema: str | dict[str, Any] | bool | None


#: The members of a body that hold schemas, which stay as they came.
FIELDS = ("response_format", "structured_outputs", "guided_json", "json_schema")


def constrains(body: Constraining) -> bool:
    """Whether it may ask for more than text. PERF: looked at for every request."""
    return not (
        body.response_format is None
        and body.structured_outputs is None
        and body.guided_json is None
        and body.guided_regex is None
        and body.guided_choice is None
        and body.guided_grammar is None
        and body.grammar is None
        and body.json_schema is None
    )


def constraint_of(body: Constraining) -> tuple[Constraint | None, str]:
    """The constraint, and the field that asks for it. Raises InvalidRequest for two of them, and what there is not."""
    found = [
        _of_format(body.response_format),
        *_of_structured(body.structured_outputs),
        _schema(body.guided_json, "guided_json"),
        _text(ConstraintKind.REGEX, body.guided_regex, "guided_regex"),
        _choice(body.guided_choice, "guided_choice"),
        _grammar(body.guided_grammar, "guided_grammar"),
        _grammar(body.grammar, "grammar"),
        _schema(body.json_schema, "json_schema"),
    ]
    asked = [one for one in found if one is not None]
    if len(asked) > 1:
        first, second = asked[0][1], asked[1][1]
        raise InvalidRequest(
            f"{second}: {first} says already what the answer has to be; give one of them", param=second
        )
    return asked[0] if asked else (None, "")


Found = tuple[Constraint, str] | None


def _of_format(given: ResponseFormat | None) -> Found:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        found = _schema(given.schema, "response_format.schema")
        return found or (Constraint(ConstraintKind.JSON_OBJECT), "response_format")
    if given.type == "json_schema":
        field = "response_format.json_schema.schema"
        found = _schema(given.json_schema.schema if given.json_schema else given.schema, field)
        if found is None:
            raise InvalidRequest(f"{field}: it is missing; it must be a JSON schema", param=field)
        return found
    words = f"{given.type[:40]!r} is not supported; it must be text, json_object or json_schema"
    raise InvalidRequest(f"response_format.type: {words}", param="response_format.type")


def _of_structured(given: StructuredOutputs | None) -> list[Found]:
    if given is None:
        return []
    for name in ("structural_tag", "whitespace_pattern", "disable_additional_properties"):
        if getattr(given, name):
            field = f"structured_outputs.{name}"
            raise InvalidRequest(f"{field}: this server does not support it; leave the field out", param=field)
    kind = ConstraintKind.JSON_OBJECT
    return [
        _schema(given.json, "structured_outputs.json"),
        _text(ConstraintKind.REGEX, given.regex, "structured_outputs.regex"),
        _choice(given.choice, "structured_outputs.choice"),
        _grammar(given.grammar, "structured_outputs.grammar"),
        (Constraint(kind), "structured_outputs.json_object") if given.json_object else None,
    ]


def _schema(schema: str | dict[str, Any] | bool | None, field: str) -> Found:
    if schema is None or schema == "":
        return None
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    return Constraint(ConstraintKind.JSON_SCHEMA, text), field


def _text(kind: ConstraintKind, text: str | None, field: str) -> Found:
    return (Constraint(kind, text), field) if text else None


def _choice(choices: list[str] | None, field: str) -> Found:
    return (Constraint(ConstraintKind.CHOICE, json.dumps(choices)), field) if choices else None


def _grammar(text: str | None, field: str) -> Found:
    """GBNF has ``::=`` in every rule, and Lark has it nowhere."""
    return _text(ConstraintKind.GBNF if text and "::=" in text else ConstraintKind.LARK, text, field)
