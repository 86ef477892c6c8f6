"""The bodies of ``/api/chat`` and ``/api/generate``: their fields, and the requests that they become.

Fields that nobody knows are ignored; those that would change the answer and are not built are refused by name. Of the
``options``, those that say how a model is loaded are the server's business and change no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from mullama.errors import InvalidRequest, ModelNotFound
from mullama.serving.durations import DURATION_SCHEMA
from mullama.serving.manager import ModelManager
from mullama.web.chat.functions import EFFORTS, MAX_FUNCTIONS, CallBody, ToolBody
from mullama.web.internal.lora_routes import split_name
from mullama.web.openai.sampling import RANGES, STOP_SCHEMA, check_range, range_schemas, stop_strings
from mullama.web.openai.schemas import (
    ROLES,
    ChatBody,
    ChatCall,
    CompletionBody,
    CompletionCall,
    Message,
    chat_call,
    decode_body,
    unbuilt,
)
from mullama.web.openapi.operation import unbuilt_schemas
from mullama.web.structured import ResponseFormat

#: What the API calls a field, by our name of it.
NAMES = {
    "max_tokens": "options.num_predict",
    "reasoning_effort": "think",
    "response_format": "format",
    **{
        name: f"options.{name}"
        for name in (
            *("seed", "stop", "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n"),
            *("presence_penalty", "frequency_penalty", "mirostat", "mirostat_tau", "mirostat_eta"),
        )
    },
}
LATEST = ":latest"  # the tag that a name without one has there


_UNBUILT = {
    "logprobs": "log-probabilities",
    "top_logprobs": "log-probabilities",
    "suffix": "filling in the middle",
    "template": "templates that come with a request",
    "images": "pictures",
    "context": "the context of an earlier answer; /api/chat takes the messages",
}


class RunOptions(msgspec.Struct, kw_only=True):
    """``options``: what of them chooses tokens."""

    num_predict: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None

    field_schemas: ClassVar = {
        **range_schemas(("temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n")),
        **range_schemas(("presence_penalty", "frequency_penalty", "mirostat", "mirostat_tau", "mirostat_eta", "seed")),
        "num_predict": {"not": {"const": 0}},
        "stop": STOP_SCHEMA,
    }


class CommonBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    options: RunOptions | None = None
    keep_alive: float | str | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    field_schemas: ClassVar[dict[str, Any]] = {
        **unbuilt_schemas({name: _UNBUILT[name] for name in ("logprobs", "top_logprobs")}),
        "keep_alive": DURATION_SCHEMA,
        "model": {"minLength": 1},
        "think": {"enum": [None, True, False, *EFFORTS]},
    }
    required_fields: ClassVar = ("model",)


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str = ""
    images: list[Any] | None = None
    tool_calls: list[CallBody] | None = None
    tool_name: str | None = None
    thinking: str | None = None

    field_schemas: ClassVar = {
        **unbuilt_schemas({"images": "pictures"}),
        "role": {"enum": ROLES},
    }


class OllamaChatBody(CommonBody, kw_only=True):
    messages: list[ChatMessage] | None = None
    tools: list[ToolBody] | None = None

    field_schemas: ClassVar = CommonBody.field_schemas | {"tools": {"maxItems": MAX_FUNCTIONS}}


class GenerateBody(CommonBody, kw_only=True):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    images: list[Any] | None = None
    context: list[int] | None = None

    field_schemas: ClassVar = CommonBody.field_schemas | unbuilt_schemas(
        {name: _UNBUILT[name] for name in ("suffix", "template", "images", "context")}
    )


_chat_decoder = msgspec.json.Decoder(OllamaChatBody)
_generate_decoder = msgspec.json.Decoder(GenerateBody)


@dataclass(slots=True, frozen=True)
class OllamaCall:
    """``call`` None: the request only loads or unloads the model."""

    model: str
    call: ChatCall | CompletionCall | None
    streams: bool
    keep_alive: float | str | None


def parse_chat_messages(data: bytes, models: ModelManager) -> OllamaCall:
    """Raises InvalidRequest, ModelNotFound."""
    body = decode_body(_chat_decoder, data)
    _refuse_unbuilt(body)
    name = served_name(body.model, models)
    fields, messages = _fields(body, name), []
    for i, one in enumerate(body.messages or ()):
        if one.images:
            raise unbuilt(f"messages[{i}].images", "pictures")
        more = {"tool_calls": one.tool_calls, "name": one.tool_name, "reasoning_content": one.thinking}
        messages.append(Message(role=one.role, content=one.content, **more))  # type: ignore[arg-type]
    fields |= {"tools": body.tools, **_thinking(body.think)}
    call = chat_call(ChatBody(messages=messages, **fields), models) if messages else None
    return OllamaCall(split_name(name, models)[0], call, body.stream is not False, body.keep_alive)


def parse_generate(data: bytes, models: ModelManager) -> OllamaCall:
    """A text by the model's template, or as it is where ``raw`` says so. Raises InvalidRequest, ModelNotFound."""
    body = decode_body(_generate_decoder, data)
    _refuse_unbuilt(body)
    name = served_name(body.model, models)
    model, named = split_name(name, models)
    fields = _fields(body, name)
    call: ChatCall | CompletionCall | None = None
    if body.prompt and body.raw:
        if body.system:
            raise InvalidRequest("system: a raw prompt goes to the model as it is; write it there", param="system")
        call = CompletionCall(model, CompletionBody(prompt=body.prompt, **fields), named)
    elif body.prompt:
        messages = [Message(role="system", content=body.system)] if body.system else []
        messages.append(Message(role="user", content=body.prompt))
        call = chat_call(ChatBody(messages=messages, **fields, **_thinking(body.think)), models)
    return OllamaCall(model, call, body.stream is not False, body.keep_alive)


def served_name(name: str | None, models: ModelManager) -> str:
    """The served name that a client means; there a name without a tag has the tag ``latest``. Raises ModelNotFound."""
    if not name:
        raise InvalidRequest("model: it is missing; it must be the name of a model", param="model")
    try:
        split_name(name, models)
    except ModelNotFound:
        if not name.endswith(LATEST):
            raise
        name = name.removesuffix(LATEST)
        split_name(name, models)
    return name


def _fields(body: CommonBody, name: str) -> dict[str, Any]:
    """The request's members by our names. What is wrong with them is also wrong where the model is only loaded."""
    options = body.options or RunOptions()
    given = {field: getattr(options, field) for field in RunOptions.__struct_fields__ if field != "num_predict"}
    for field in RANGES.keys() & given.keys():
        check_range(field, given[field])
    stop_strings(options.stop)
    n_predict = options.num_predict
    if n_predict is not None and n_predict < 0:
        n_predict = None  # -1: no limit; -2: until the context is full
    if n_predict == 0:
        raise InvalidRequest("options.num_predict: it must be at least 1, or -1", param="options.num_predict")
    return {
        "model": name,
        "max_tokens": n_predict,
        "keep_alive": body.keep_alive,
        "response_format": _format(body.format),
        **given,
    }


def _format(given: str | dict[str, Any] | None) -> ResponseFormat | None:
    """``json``, or a JSON schema."""
    if not given:
        return None
    if isinstance(given, dict):
        return ResponseFormat("json_schema", schema=given)
    if given != "json":
        raise InvalidRequest("format: it must be json or a JSON schema", param="format")
    return ResponseFormat("json_object")


def _thinking(think: bool | str | None) -> dict[str, Any]:
    """``think``: whether, or how much (``low``, ``medium``, ``high``)."""
    if isinstance(think, str):
        return {"reasoning_effort": think}
    return (
        {} if think is not False else {"include_reasoning": False, "chat_template_kwargs": {"enable_thinking": False}}
    )


def _refuse_unbuilt(body: CommonBody) -> None:
    for name, what in _UNBUILT.items():
        if getattr(body, name, None):
            raise unbuilt(name, what)
