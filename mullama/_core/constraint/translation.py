"""Constraints in the words of llguidance, which compiles them (``_core/constraint``). Raises InvalidRequest."""

from __future__ import annotations

import re

import msgspec

from mullama.errors import InvalidRequest
from mullama.types import Constraint, ConstraintKind

MAX_TEXT = 1 << 20  # characters of a schema, or a list of choices
MAX_GRAMMAR = 1 << 16  # of an expression or a grammar: what becomes of their rules grows faster than they do
MAX_DEPTH = 200  # brackets within brackets
MAX_CHOICES = 10_000
MAX_MARKS = 16  # texts that a constraint may begin with
#: White space within JSON: models write a space behind a comma, or lines. Without a bound some write nothing else.
WHITE_SPACE = r"( |\n[ \t]{0,40})?"

_BRACKETS = re.compile(r"\\.|[()\[\]{}]", re.DOTALL)


def source_of(constraint: Constraint) -> tuple[str, str]:
    """The kind and text that the library takes."""
    kind, text = constraint.kind, constraint.text
    for one in (text, *constraint.after, *constraint.triggers):
        _check_text(one)
    if len(constraint.after) + len(constraint.triggers) > MAX_MARKS or not all(
        (*constraint.after, *constraint.triggers)
    ):
        raise _refused(f"it may begin with at most {MAX_MARKS} texts, none of them empty")
    if kind is ConstraintKind.JSON_OBJECT:
        return "json_schema", _with_white_space('{"type":"object"}', {})
    if kind is ConstraintKind.JSON_SCHEMA:
        return "json_schema", _schema(text)
    if kind is ConstraintKind.CHOICE:
        return "regex", _choices(text)
    if len(text) > MAX_GRAMMAR:
        raise _refused(f"it has {len(text)} characters; at most {MAX_GRAMMAR} are taken")
    _check_depth(text)
    if kind is ConstraintKind.REGEX:
        return "regex", text
    return "lark", text if kind is ConstraintKind.LARK else _lark_of_gbnf(text)


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"the constraint cannot be enforced: {why}", param="constraint")


def _check_text(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise _refused(f"it has {len(text)} characters; at most {MAX_TEXT} are taken")
    if "\0" in text:
        raise _refused("it holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _refused("it holds a lone surrogate, which is not valid Unicode") from None


def _check_depth(text: str) -> None:
    """The library recurses over what it parses; and its stack has an end, though a far one."""
    depth = 0
    for found in _BRACKETS.finditer(text):
        one = found[0]
        depth = depth + 1 if one in "([{" else max(0, depth - (one in ")]}"))
        if depth > MAX_DEPTH:
            raise _refused(f"brackets are nested more than {MAX_DEPTH} deep")


def _schema(text: str) -> str:
    try:
        schema = msgspec.json.decode(text, type=dict[str, msgspec.Raw] | bool)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _refused(f"it is not a JSON schema: {error}") from None
    if isinstance(schema, bool):
        return _with_white_space("{}" if schema else '{"not":{}}', {})
    own = schema.get("x-guidance")
    options = {} if own is None else _options(own)
    return _with_white_space(text, options)


def _options(raw: msgspec.Raw) -> dict[str, object]:
    """llguidance's own options in a schema, but for those that would let through what the schema does not."""
    try:
        options = msgspec.json.decode(raw, type=dict[str, object])
    except (msgspec.DecodeError, RecursionError) as error:
        raise _refused(f"x-guidance: {error}") from None
    for name in ("lenient", "coerce_one_of"):
        if options.get(name):
            raise _refused(f"x-guidance.{name} would let through what the schema forbids")
    return options


def _with_white_space(schema: str, options: dict[str, object]) -> str:
    """The same with what may stand between its tokens. Nothing else of it is touched: the order of members counts."""
    if not options.keys() & {"whitespace_flexible", "whitespace_pattern"}:
        options = {**options, "whitespace_pattern": WHITE_SPACE}
    head, _, rest = schema.partition("{")
    said = f'"x-guidance":{msgspec.json.encode(options).decode()}'
    # Of two members with one name the last one counts, and that would be the schema's own.
    rest = rest if rest.lstrip().startswith("}") else "," + rest
    return f"{head}{{{said}{rest}"


def _choices(text: str) -> str:
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except (msgspec.DecodeError, RecursionError) as error:
        raise _refused(f"it is not a list of texts: {error}") from None
    if not 0 < len(choices) <= MAX_CHOICES:
        raise _refused(f"there must be 1 to {MAX_CHOICES} choices, got {len(choices)}")
    if not all(choices):
        raise _refused("a choice must have at least one character")
    return "|".join("".join(_literal(char) for char in choice) for choice in choices)


def _literal(char: str) -> str:
    return char if char.isascii() and char.isalnum() else rf"\x{{{ord(char):x}}}"


def _lark_of_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise _refused("it is nested too deeply") from None
    except Exception as error:
        raise _refused(f"it is not GBNF: {error}") from None
