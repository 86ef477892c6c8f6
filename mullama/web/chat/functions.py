"""Functions that an answer may call (``tools``, ``tool_choice``), thinking, and arguments of the template: from the
body of a chat to a ``ChatAsk``.

A function's schema goes to the template as it came. The parser of the answer is given a small one (``_reading``): types
and names alone, without references, so that no schema can make it large or slow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from mullama.errors import InvalidRequest
from mullama.types import ChatAsk, ToolChoice

MAX_FUNCTIONS = 512
MAX_BYTES = 1 << 20  # of all functions, as JSON
MAX_ARGUMENTS_BYTES = 1 << 16
MAX_DEPTH = 64  # of JSON that goes to a template
MAX_NODES = 2000  # of a schema that calls are read with
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}", re.ASCII)
NAME_SCHEMA = {"type": "string", "pattern": f"^{_NAME.pattern}$"}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
FORMATS = ("auto", "deepseek", "deepseek-legacy", "none")
#: What a template is given by us; with another value it would say of the chat what is not so.
_OURS = ("messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "chat_template", "documents")


class FunctionBody(msgspec.Struct, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    field_schemas: ClassVar = {"name": NAME_SCHEMA, "strict": {"enum": [None, False]}}


class ToolBody(msgspec.Struct):
    function: FunctionBody | None = None
    type: str = "function"

    field_schemas: ClassVar = {"type": {"const": "function"}, "function": {"not": {"type": "null"}}}
    required_fields: ClassVar = ("function",)


class CalledBody(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] | None = None


class CallBody(msgspec.Struct, omit_defaults=True):
    """A call in an earlier answer."""

    function: CalledBody
    id: str | None = None
    type: str | None = None


@dataclass(slots=True, frozen=True)
class Calls:
    """Which calls an answer may make. ``forced``: those functions alone, and one of them; ``strict``: their arguments
    follow their schemas."""

    functions: tuple[FunctionBody, ...] = ()
    choice: ToolChoice = ToolChoice.AUTO
    forced: tuple[str, ...] = ()

    @property
    def strict(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.functions if one.strict)


@dataclass(slots=True, frozen=True)
class Thinking:
    """What a request says of thoughts, in any maker's words. None: nothing."""

    effort: str | None = None
    kwargs: dict[str, Any] | None = None  # of the template
    format: str | None = None


def calls_of(tools: Sequence[ToolBody] | None, choice: str | Mapping[str, Any] | None) -> Calls:
    """Raises InvalidRequest for functions that are none, are too many, or are named by ``choice`` and not there."""
    functions = tuple(_function(tool, i) for i, tool in enumerate(_few(tools or ())))
    names = [one.name for one in functions]
    for i, name in enumerate(names):
        if name in names[:i]:
            where = f"tools[{i}].function.name"
            raise InvalidRequest(f"{where}: there are two functions named '{name}'", param=where)
    if not isinstance(choice, Mapping):
        if choice is not None and choice not in tuple(ToolChoice):
            words = f"it must be one of {', '.join(ToolChoice)}, or name a function"
            raise InvalidRequest(f"tool_choice: {choice[:40]!r} is not known; {words}", param="tool_choice")
        forced = ToolChoice(choice or ToolChoice.AUTO)
        if forced is ToolChoice.REQUIRED and not functions:
            raise InvalidRequest("tool_choice: a call is required, but there are no tools", param="tool_choice")
        return Calls(functions, forced, tuple(names) if forced is ToolChoice.REQUIRED else ())
    allowed = choice.get("allowed_tools") if choice.get("type") == "allowed_tools" else None
    if isinstance(allowed, Mapping) and isinstance(listed := allowed.get("tools"), list):
        wanted = [_named(one) for one in listed]
        _check_known(wanted, names)
        mode = calls_of((), None) if allowed.get("mode") != "required" else None
        kept = tuple(one for one in functions if one.name in wanted)
        return Calls(kept) if mode else Calls(kept, ToolChoice.REQUIRED, tuple(one.name for one in kept))
    name = _named(choice)
    _check_known([name], names)
    return Calls(functions, ToolChoice.REQUIRED, (name,))


def _few(tools: Sequence[ToolBody]) -> Sequence[ToolBody]:
    if len(tools) > MAX_FUNCTIONS:
        raise InvalidRequest(f"tools: {len(tools)} are too many; at most {MAX_FUNCTIONS} are taken", param="tools")
    return tools


def _function(tool: ToolBody, i: int) -> FunctionBody:
    if tool.type != "function" or tool.function is None:
        got = f"{tool.type[:40]!r} is not built" if tool.type != "function" else "it has no function"
        where = f"tools[{i}].type"
        raise InvalidRequest(f"{where}: {got}; it must be a function, with its name and parameters", param=where)
    if not _NAME.fullmatch(tool.function.name):
        where = f"tools[{i}].function.name"
        words = "it must have 1 to 128 letters, digits and characters of _ . : / -"
        raise InvalidRequest(f"{where}: {tool.function.name[:40]!r} is no name; {words}", param=where)
    parameters = tool.function.parameters
    if parameters and parameters.get("type", "object") != "object":
        where = f"tools[{i}].function.parameters"
        raise InvalidRequest(f"{where}: it must be the schema of an object", param=where)
    return tool.function


def _named(choice: object) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        words = 'it must be a text, or an object as {"type": "function", "function": {"name": "…"}}'
        raise InvalidRequest(f"tool_choice: {words}", param="tool_choice")
    return name


def _check_known(wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise InvalidRequest(f"tool_choice: there is no function '{name[:40]}' in tools", param="tool_choice")


def ask_of(calls: Calls, thinking: Thinking, *, parallel: bool) -> ChatAsk:
    """What the template is asked. Raises InvalidRequest for what is too much, and what is not the request's to say."""
    tools, parameters = b"", b""
    if calls.functions:
        shown = [{"type": "function", "function": one} for one in calls.functions]
        tools = msgspec.json.encode(shown)
        if len(tools) > MAX_BYTES:
            raise InvalidRequest(f"tools: they have {len(tools)} bytes; at most {MAX_BYTES} are taken", param="tools")
        for i, one in enumerate(calls.functions):
            if too_deep(one.parameters, MAX_DEPTH):
                where = f"tools[{i}].function.parameters"
                raise InvalidRequest(f"{where}: it is nested more than {MAX_DEPTH} deep", param=where)
        parameters = msgspec.json.encode({one.name: _reading(one.parameters) for one in calls.functions})
    kwargs = dict(thinking.kwargs or {})
    for name in kwargs.keys() & set(_OURS):
        where = f"chat_template_kwargs.{name}"
        raise InvalidRequest(f"{where}: it is not a request's to set; leave it out", param=where)
    thinks = kwargs.pop("enable_thinking", True)
    if not isinstance(thinks, bool):
        where = "chat_template_kwargs.enable_thinking"
        raise InvalidRequest(f"{where}: it must be true or false", param=where)
    if thinking.effort is not None:
        if thinking.effort not in EFFORTS:
            words = f"{thinking.effort[:40]!r} is not known; it must be one of {', '.join(EFFORTS)}"
            raise InvalidRequest(f"reasoning_effort: {words}", param="reasoning_effort")
        thinks = thinks and thinking.effort != "none"
        kwargs.setdefault("reasoning_effort", thinking.effort)
    if thinking.format not in (None, *FORMATS):
        words = f"it must be one of {', '.join(FORMATS)}"
        raise InvalidRequest(f"reasoning_format: {words}", param="reasoning_format")
    arguments = msgspec.json.encode(kwargs) if kwargs else b""
    if len(arguments) > MAX_ARGUMENTS_BYTES or too_deep(kwargs, MAX_DEPTH):
        words = f"at most {MAX_ARGUMENTS_BYTES} bytes, nested {MAX_DEPTH} deep, are taken"
        raise InvalidRequest(f"chat_template_kwargs: {words}", param="chat_template_kwargs")
    return ChatAsk(
        tools, parameters, arguments, calls.choice, parallel, thinks=thinks, splits=thinking.format != "none"
    )


def too_deep(value: Any, most: int) -> bool:
    """Whether JSON is nested more than ``most`` deep."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _reading(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema that calls of a function are read with."""
    budget = [MAX_NODES]
    found = _reduced(parameters or {}, parameters or {}, budget, ())
    return {**found, "type": "object", "properties": found.get("properties", {})}


def _reduced(schema: Any, root: dict[str, Any], budget: list[int], path: tuple[str, ...]) -> dict[str, Any]:
    """Types, members and items of a schema; {} where anything may come, or there is too much of it. ``path``: the way
    to it, references included."""
    budget[0] -= 1
    if not isinstance(schema, dict) or budget[0] < 0 or len(path) > MAX_DEPTH:
        return {}
    if isinstance(ref := schema.get("$ref"), str):
        return {} if ref in path else _reduced(_target(ref, root), root, budget, (*path, ref))
    refs = (*path, "")
    for key in ("anyOf", "oneOf"):
        if isinstance(several := schema.get(key), list):
            kinds = [_reduced(one, root, budget, refs) for one in several[:16]]
            return {"anyOf": kinds} if kinds and all(kinds) else {}
    if isinstance(parts := schema.get("allOf"), list) and len(parts) == 1:
        return _reduced(parts[0], root, budget, refs)
    given = schema.get("type")
    types = [one for one in (given if isinstance(given, list) else [given]) if one in _TYPES]
    if not types and isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        types = sorted({_type_of(value) for value in values[:64]})
    found: dict[str, Any] = {}
    if types:
        found["type"] = types[0] if len(types) == 1 else types
    members = schema.get("properties")
    if isinstance(members, dict) and (not types or types == ["object"]):
        inner = {name: _reduced(one, root, budget, refs) for name, one in members.items()}
        required = schema.get("required")
        names = [name for name in required if name in inner] if isinstance(required, list) else []
        return {"type": "object", "properties": inner, "required": names}
    if types == ["array"] and isinstance(items := schema.get("items"), dict):
        found["items"] = _reduced(items, root, budget, refs)
    return found


def _target(ref: str, root: Any) -> Any:
    for step in ref.removeprefix("#").removeprefix("/").split("/"):
        if step:
            root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root if ref.startswith("#") else None


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def spell_call(call: CallBody) -> None:
    """See that a call of an earlier answer is as templates know it: its arguments the JSON of an object, where they are
    one. What an answer that was cut left of them is shown as a text."""
    function = call.function
    if not isinstance(function.arguments, str):
        function.arguments = msgspec.json.encode(function.arguments or {}).decode()
    elif not _is_json(function.arguments):
        text = function.arguments
        function.arguments = msgspec.json.encode(text).decode() if text.strip() else "{}"
    call.type = "function"


def _is_json(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return False
