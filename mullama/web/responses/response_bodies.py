"""The body of ``/v1/responses``: its fields, what is wrong with them, its items, and the chat that it becomes.

Sampling and what is ours are the fields of chat; of the others, those that would change the answer and are not built
are refused by name.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec

from mullama.errors import InvalidRequest
from mullama.serving.manager import ModelManager
from mullama.web.chat.functions import CallBody, CalledBody
from mullama.web.openai.context_policy import ContextPolicy
from mullama.web.openai.fields import CHAT, field_schemas, refuse_unbuilt
from mullama.web.openai.schemas import (
    METADATA_SCHEMA,
    ChatBody,
    ChatCall,
    GenerationBody,
    Message,
    chat_call,
    check_metadata,
    decode_body,
    unbuilt,
)
from mullama.web.openapi.operation import unbuilt_schemas

#: What the API calls a field, by our name of it.
NAMES = {"max_tokens": "max_output_tokens", "messages": "input"}
ROLES = ("user", "assistant", "system", "developer")
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def _has(kind: str, **members: Any) -> dict[str, Any]:
    """JSON Schema: an item of this type has these members."""
    is_kind = {"properties": {"type": {"const": kind}}, "required": [] if kind == "message" else ["type"]}
    return {"if": is_kind, "then": {"properties": members, "required": list(members)}}


class Part(msgspec.Struct, omit_defaults=True):
    """A part of an item's content: a text, or a refusal of an earlier answer."""

    type: str
    text: str | None = None
    refusal: str | None = None

    field_schemas: ClassVar = {"type": {"enum": [*_TEXTS, "refusal"]}}
    object_schema: ClassVar = {
        "if": {"properties": {"type": {"const": "refusal"}}},
        "then": {"properties": {"refusal": {"type": "string"}}, "required": ["refusal"]},
        "else": {"properties": {"text": {"type": "string"}}, "required": ["text"]},
    }


class Item(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An item of the input, or of an earlier answer's output."""

    type: str = "message"
    id: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Any] | None = None  # the model is not shown it

    field_schemas: ClassVar = {"type": {"enum": list(_PREFIXES)}}
    object_schema: ClassVar = {
        "allOf": [
            _has("message", role={"enum": ROLES}, content={"type": ["string", "array"]}),
            _has("function_call", **{name: {"type": "string"} for name in ("call_id", "name", "arguments")}),
            _has("function_call_output", call_id={"type": "string"}, output={"type": ["string", "array"]}),
        ]
    }

    def listed(self) -> dict[str, Any]:
        """The item as the API lists it: content in parts."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        shown = {"type": self.type} | shown
        if isinstance(self.content, str):
            kind = "output_text" if self.role == "assistant" else "input_text"
            shown["content"] = [{"type": kind, "text": self.content}]
        for part in shown.get("content") or ():
            if part["type"] == "output_text":
                part["annotations"] = []
        return shown | ({} if self.type == "reasoning" else {"status": "completed"})


class Format(msgspec.Struct):
    type: str = "text"

    field_schemas: ClassVar = {"type": {"enum": ["text"]}}


class TextOptions(msgspec.Struct):
    format: Format | None = None
    verbosity: str | None = None

    field_schemas: ClassVar = {"verbosity": {"enum": [None, "medium"]}}


class Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None

    field_schemas: ClassVar = {"effort": {"enum": [None, "none"]}}


#: Fields that are refused while their value asks for something, and what that is.
_UNBUILT = {
    "tools": "tool calls",
    "top_logprobs": "log-probabilities",
    "conversation": "conversations; previous_response_id goes on with an answer",
    "prompt": "stored prompts",
    "context_management": "editing the context",
}
#: Of ``include``: it would change the answer.
_LOGPROBS = "message.output_text.logprobs"


class ResponseBody(GenerationBody, kw_only=True):
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    top_logprobs: int | None = None
    prompt_cache_key: str | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None

    field_schemas: ClassVar = {
        **GenerationBody.field_schemas,
        **field_schemas(CHAT),
        **unbuilt_schemas(_UNBUILT),
        "input": {"minLength": 1, "minItems": 1},
        "max_output_tokens": {"minimum": -1, "not": {"const": 0}},
        "n": {"enum": [None, 1]},
        "response_format": {"enum": [None]},
        "max_tokens": {"enum": [None]},
        "tool_choice": {"enum": [None, "none", "auto"]},
        "include": {"items": {"not": {"const": _LOGPROBS}}},
        "metadata": METADATA_SCHEMA,
    }
    required_fields: ClassVar = ("input",)


_decoder = msgspec.json.Decoder(ResponseBody)


def parse_response(data: bytes) -> ResponseBody:
    """All that can be checked without the store and the models. Raises InvalidRequest."""
    body = decode_body(_decoder, data)
    refuse_unbuilt(data, CHAT)
    for name, what in _UNBUILT.items():
        if getattr(body, name):
            raise unbuilt(name, what)
    for ours, theirs in (("response_format", "text.format"), ("max_tokens", "max_output_tokens")):
        if getattr(body, ours) is not None:
            raise unbuilt(ours, f"this name; {theirs} is the one")
    if body.stream_options is not None and body.stream_options.continuous_usage_stats:
        raise unbuilt("stream_options.continuous_usage_stats", "the usage in every event")
    if body.tool_choice not in (None, "none", "auto"):
        raise unbuilt("tool_choice", "tool calls")
    if body.text is not None and body.text.format is not None and body.text.format.type != "text":
        raise unbuilt("text.format", f"the format {body.text.format.type[:40]!r}")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise unbuilt("text.verbosity", "levels of verbosity")
    if body.reasoning is not None and body.reasoning.effort not in (None, "none"):
        raise unbuilt("reasoning.effort", "levels of reasoning")
    if _LOGPROBS in (body.include or ()):
        raise unbuilt("include", "log-probabilities")
    if body.n not in (None, 1):
        raise InvalidRequest("n: a response has one answer; leave the field out", param="n")
    if body.background and body.stream:
        raise unbuilt("stream", "streams of responses in the background; ask for them by their id")
    if body.background and body.store is False:
        raise InvalidRequest(
            "store: a response in the background is asked for later, and must be stored", param="store"
        )
    check_metadata(body.metadata)
    if not body.input:
        raise InvalidRequest("input: it is missing; it must be a text or a list of items", param="input")
    return body


def items_of(body: ResponseBody) -> list[Item]:
    """The input as items, each with an id."""
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else list(body.input or ())
    for item in items:
        item.id = item.id or f"{_PREFIXES.get(item.type, 'item')}_{secrets.token_hex(16)}"
    return items


def chat_of(body: ResponseBody, earlier: Sequence[Item], models: ModelManager) -> ChatCall:
    """The chat that continues the ``earlier`` items with those of the body. Raises InvalidRequest, ModelNotFound."""
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    messages += _messages(earlier, "previous_response_id") + _messages(items_of(body), "input")
    given = {name: getattr(body, name) for name in GenerationBody.__struct_fields__}
    given["stream"] = None if body.background else body.stream
    given["max_tokens"] = body.max_output_tokens
    if body.truncation is not None and body.context_policy is None:
        given["context_policy"] = ContextPolicy.TRUNCATE_LEFT if body.truncation == "auto" else ContextPolicy.ERROR
    return chat_call(ChatBody(messages=messages, **given), models)


def _messages(items: Sequence[Item], field: str) -> list[Message]:
    """Items as messages of a chat. Raises InvalidRequest."""
    found: list[Message] = []
    thoughts: str | None = None
    for i, item in enumerate(items):
        where = f"{field}[{i}]"
        for name in ("content", "output"):  # parts are parts also where nobody needs them
            _text(getattr(item, name) or "", f"{where}.{name}")
        if item.type == "message":
            if item.role not in ROLES:
                got = "it is missing" if item.role is None else f"{item.role[:40]!r} is not a role"
                words = f"{where}.role: {got}; it must be one of {', '.join(ROLES)}"
                raise InvalidRequest(words, param=f"{where}.role")
            message = Message(role=item.role, content=_text(item.content, f"{where}.content"))
            if item.role == "assistant":
                message.reasoning_content, thoughts = thoughts, None
            found.append(message)
        elif item.type == "function_call":
            name, arguments = _needed(item.name, f"{where}.name"), _needed(item.arguments, f"{where}.arguments")
            call = CallBody(CalledBody(name, arguments), _needed(item.call_id, f"{where}.call_id"))
            if found and found[-1].role == "assistant" and thoughts is None:
                found[-1].tool_calls = [*(found[-1].tool_calls or ()), call]
            else:
                found.append(Message(role="assistant", content=None, tool_calls=[call], reasoning_content=thoughts))
                thoughts = None
        elif item.type == "function_call_output":
            text = _text(item.output, f"{where}.output")
            found.append(Message(role="tool", content=text, tool_call_id=_needed(item.call_id, f"{where}.call_id")))
        elif item.type == "reasoning":
            thoughts = _text(item.content or [], f"{where}.content") or None
        else:
            raise unbuilt(f"{where}.type", f"items of the type {item.type[:40]!r}")
    return found


def _text(content: str | list[Part] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"{where}: it is missing; it must be a text or a list of text parts", param=where)
    texts = []
    for j, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in (*_TEXTS, "refusal"):
            field = f"{where}[{j}].type"
            raise InvalidRequest(f"{field}: it is {part.type[:40]!r}, but this model takes text only", param=field)
        texts.append(_needed(text, f"{where}[{j}].text"))
    return "\n".join(texts)


def _needed(text: str | None, where: str) -> str:
    if text is None:
        raise InvalidRequest(f"{where}: it is missing; it must be a string", param=where)
    return text
