"""The bodies of ``/v1/chat/completions`` and ``/v1/completions``: their fields, and what is wrong with them.

msgspec checks the types while it decodes; the ranges are in ``sampling.py``, and what is refused or ignored is in
``fields.py``. Fields that nobody knows are ignored. Every
``parse_*`` may run in a thread and raises InvalidRequest or ModelNotFound with ``param`` naming the field.
"""

from __future__ import annotations

import codecs
import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from mullama.engine.client import EngineClient, OpenedChat, Speaker
from mullama.errors import InvalidRequest
from mullama.serving.durations import DURATION_SCHEMA, parse_duration
from mullama.serving.manager import ModelManager
from mullama.types import ChatAsk, ModelInfo, Preempt, SamplingParams, ToolChoice
from mullama.web import structured
from mullama.web.chat.functions import (
    EFFORTS,
    FORMATS,
    MAX_FUNCTIONS,
    CallBody,
    CalledBody,
    Thinking,
    ToolBody,
    ask_of,
    calls_of,
    spell_call,
)
from mullama.web.internal.lora_routes import LoraBody, split_name
from mullama.web.keys.key_ring import Key
from mullama.web.openai import sampling
from mullama.web.openai.context_policy import ContextPolicy, policy_of
from mullama.web.openai.fields import CHAT, TEXT, field_schemas, refuse_unbuilt
from mullama.web.structured import ResponseFormat, StructuredOutputs, constrains, constraint_of

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_SALT = 256  # characters
MAX_CHOICES = 1024  # prompts times n, in one request

MAX_METADATA = 16  # pairs, of 64 and 512 characters, as OpenAI has it
METADATA_SCHEMA = {
    "maxProperties": MAX_METADATA,
    "propertyNames": {"maxLength": 64},
    "additionalProperties": {"type": "string", "maxLength": 512},
}

S = TypeVar("S")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's; refused

    field_schemas: ClassVar = {"continuous_usage_stats": {"enum": [None, False]}}


class GenerationBody(msgspec.Struct, kw_only=True):
    """What both endpoints take. None (also JSON's null) leaves a default in place."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    n_predict: int | None = None
    timings_per_token: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: str | list[str] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    logit_bias: dict[str, float] | list[Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: int | None = None
    slo_ms: float | None = None
    preempt: str | None = None
    cache_salt: str | None = None
    context_policy: str | None = None
    lora: list[LoraBody] | None = None
    keep_alive: float | str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: str | dict[str, Any] | bool | None = None

    field_schemas: ClassVar[dict[str, Any]] = {
        **sampling.range_schemas(sampling.RANGES.keys() - {"max_completion_tokens"}),
        "stop": sampling.STOP_SCHEMA,
        "dry_sequence_breakers": sampling.BREAKERS_SCHEMA,
        "logit_bias": sampling.BIAS_SCHEMA,
        "preempt": {"enum": [None, *Preempt]},
        "context_policy": {"enum": [None, *ContextPolicy]},
        "cache_salt": {"minLength": 1, "maxLength": MAX_SALT},
        "keep_alive": DURATION_SCHEMA,
    }


class ContentPart(msgspec.Struct):
    type: str | UnsetType = UNSET
    text: str | UnsetType = UNSET

    field_schemas: ClassVar = {"type": {"enum": ["text"]}}
    required_fields: ClassVar = ("type", "text")


class Message(msgspec.Struct, omit_defaults=True):
    """A message. ``normalise`` makes one kind of it for the chat template, in the words of ``tool_calls``."""

    role: str | UnsetType = UNSET
    content: str | list[ContentPart] | UnsetType | None = UNSET
    name: str | None = None
    tool_calls: list[CallBody] | None = None
    tool_call_id: str | None = None
    function_call: CalledBody | None = None  # the older word for a call
    reasoning_content: str | None = None
    reasoning: str | None = None  # the newer word for it
    prefix: bool | None = None  # DeepSeek's and Mistral's: the answer goes on with this message

    field_schemas: ClassVar = {"role": {"enum": ROLES}}
    required_fields: ClassVar = ("role",)
    object_schema: ClassVar = {
        "anyOf": [
            {"properties": {"role": {"const": "assistant"}}},
            {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
        ]
    }


class SchedulerChange(msgspec.Struct):
    """PUT (with ``policy``) and PATCH (without) of /internal/scheduler."""

    policy: str | None = None
    params: dict[str, Any] = msgspec.field(default_factory=dict)


class PolicyBody(SchedulerChange):
    """Of PUT."""

    field_schemas: ClassVar = {"policy": {"minLength": 1}}
    required_fields: ClassVar = ("policy",)


class ParamsBody(SchedulerChange):
    """Of PATCH."""

    field_schemas: ClassVar = {"policy": {"enum": [None]}}


class ChatBody(GenerationBody, kw_only=True):
    messages: list[Message] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    reasoning_format: str | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    field_schemas: ClassVar = {
        **GenerationBody.field_schemas,
        **field_schemas(CHAT),
        **sampling.range_schemas(("max_completion_tokens",)),
        "messages": {"minItems": 1},
        "tools": {"maxItems": MAX_FUNCTIONS},
        "tool_choice": {"enum": [None, "none", "auto"]},
        "reasoning_effort": {"enum": [None, *EFFORTS]},
        "reasoning_format": {"enum": [None, *FORMATS]},
        "modalities": {"items": {"const": "text"}},
    }
    required_fields: ClassVar = ("messages",)


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    field_schemas: ClassVar = {
        **GenerationBody.field_schemas,
        **field_schemas(TEXT),
        "prompt": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                sampling.TOKEN_IDS_SCHEMA,
                {"type": "array", "items": sampling.TOKEN_IDS_SCHEMA, "minItems": 1},
            ]
        },
        "best_of": {"description": "Only as n has it."},
    }
    required_fields: ClassVar = ("prompt",)


@dataclass(slots=True, frozen=True)
class Options:
    """What a request asks for, checked, whatever its endpoint."""

    sampling: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    user: str | None
    priority: int
    slo_ms: float | None
    preempt: Preempt
    cache_salt: str | None
    context_policy: ContextPolicy | None  # None: the server's
    constrained_by: str = ""  # the field that asked for the constraint of ``sampling``
    with_timings: bool = False
    tenant: str | None = None  # whom the API key names

    def of_client(self, tenant: str | None, key: Key | None) -> Options:
        """The same for a client that its API key tells from others: it is the user where the request names none, and
        is no more urgent than the key may be."""
        priority = self.priority if key is None else key.priority(self.priority)
        if tenant is None and priority == self.priority:
            return self
        return replace(self, tenant=tenant, user=tenant if self.user is None else self.user, priority=priority)

    def of_choice(self, index: int) -> SamplingParams:
        """The sampling of choice ``index`` of a prompt: its seed follows the request's."""
        seed = self.sampling.seed
        if index == 0 or seed is None:
            return self.sampling
        return replace(self.sampling, seed=(seed + index) % sampling.SEED_MODULUS)


class Ending(enum.Enum):
    """How the prompt of a chat ends."""

    ASKS = "asks"  # with the beginning of an answer, as the template has it
    OPEN = "open"  # with the last message
    CONTINUES = "continues"  # in the last message, which is the beginning of the answer


@dataclass(slots=True, frozen=True)
class ChatCall:
    model: str  # the served name
    body: ChatBody
    messages: list[Message]
    messages_json: bytes  # the same, encoded
    named: tuple[str, ...] = ()  # adapters in the name of the model
    ending: Ending = Ending.ASKS
    ask: ChatAsk = field(default_factory=ChatAsk)

    def open(self, speaker: EngineClient | Speaker, messages_json: bytes) -> OpenedChat:
        """The prompt of these messages, ended as the call wants it, and how answers are read. Raises InvalidRequest."""
        if self.ending is Ending.CONTINUES:  # in the middle of an answer, which is a text
            return OpenedChat(speaker.render_chat(messages_json, continue_final_message=True), None)
        return speaker.open_chat(messages_json, self.ask, add_generation_prompt=self.ending is Ending.ASKS)

    def render(self, speaker: EngineClient | Speaker, messages_json: bytes) -> str:
        """The prompt alone."""
        return self.open(speaker, messages_json).prompt

    @property
    def size(self) -> int:
        """Bytes of JSON that the template is given."""
        return len(self.messages_json) + len(self.ask.tools)


@dataclass(slots=True, frozen=True)
class CompletionCall:
    model: str  # the served name
    body: CompletionBody
    named: tuple[str, ...] = ()  # adapters in the name of the model


_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)
_scheduler_decoder = msgspec.json.Decoder(SchedulerChange)


def parse_chat(data: bytes, models: ModelManager) -> ChatCall:
    """All that can be checked before the model is loaded. Raises InvalidRequest, ModelNotFound."""
    body = decode_body(_chat_decoder, data)
    model, named = split_name(body.model, models)
    _refuse_unsupported(body)
    refuse_unbuilt(data, CHAT)
    if body.modalities and any(kind != "text" for kind in body.modalities):
        raise unbuilt("modalities", "anything but text")
    return _chat_call(body, model, named)


def chat_call(body: ChatBody, models: ModelManager) -> ChatCall:
    """The call of a body that another API's was translated into. Raises InvalidRequest, ModelNotFound."""
    return _chat_call(body, *split_name(body.model, models))


def _chat_call(body: ChatBody, model: str, named: tuple[str, ...]) -> ChatCall:
    messages = normalise(body.messages)
    ending = _ending(body, messages)
    calls = calls_of(body.tools, body.tool_choice)
    if calls.choice is ToolChoice.REQUIRED:
        raise unbuilt("tool_choice", "forcing a call; auto is there")
    if calls.strict:
        raise unbuilt("tools", "functions that are strict")
    thinking = Thinking(body.reasoning_effort, body.chat_template_kwargs, body.reasoning_format)
    ask = ask_of(calls, thinking, parallel=body.parallel_tool_calls is not False)
    if ending is Ending.CONTINUES and ask.tools:
        raise unbuilt("tools", "functions where the answer has begun")
    return ChatCall(model, body, messages, msgspec.json.encode(messages), named, ending, ask)


def _ending(body: ChatBody, messages: list[Message]) -> Ending:
    """What the request says of its last message, in any maker's words. Raises InvalidRequest."""
    last = messages[-1]
    field = "continue_final_message" if body.continue_final_message else f"messages[{len(messages) - 1}].prefix"
    continues = bool(body.continue_final_message or last.prefix)
    for i, message in enumerate(messages):
        if message.prefix and message is not last:
            where = f"messages[{i}].prefix"
            raise InvalidRequest(f"{where}: only the last message may be the beginning of the answer", param=where)
        message.prefix = None  # no template knows it
    if continues and (last.role != "assistant" or not isinstance(last.content, str)):
        raise InvalidRequest(f"{field}: the last message must be a text of the assistant's to go on with", param=field)
    if body.continue_final_message and body.add_generation_prompt:
        words = "the answer goes on with the last message or begins anew, not both; leave one out"
        raise InvalidRequest(f"add_generation_prompt: {words}", param="add_generation_prompt")
    return Ending.CONTINUES if continues else Ending.OPEN if body.add_generation_prompt is False else Ending.ASKS


def parse_scheduler_change(data: bytes) -> SchedulerChange:
    return decode_body(_scheduler_decoder, data)


def parse_completion(data: bytes, models: ModelManager) -> CompletionCall:
    """All that can be checked before the model is loaded. Raises InvalidRequest, ModelNotFound."""
    body = decode_body(_completion_decoder, data)
    model, named = split_name(body.model, models)
    _refuse_unsupported(body)
    refuse_unbuilt(data, TEXT)
    _refuse(body.best_of is not None and body.best_of != (body.n or 1), "best_of", "best_of other than n")
    return CompletionCall(model, body, named)


def completion_prompts(body: CompletionBody, options: Options, info: ModelInfo) -> list[str | list[int]]:
    """The prompts of a completion, checked for the model that answers. Raises InvalidRequest."""
    prompts = _prompts(body.prompt, info)
    if len(prompts) * options.n > MAX_CHOICES:
        raise InvalidRequest(f"prompt: prompts times n must be at most {MAX_CHOICES}", param="prompt")
    return prompts


def options_of(body: GenerationBody, info: ModelInfo, defaults: Mapping[str, Any] = MappingProxyType({})) -> Options:
    """What the request asks of the model that answers; ``defaults`` as of ``SamplingDefaults``. Raises
    InvalidRequest."""
    for name in ("n", "priority", "slo_ms", "truncate_prompt_tokens"):
        if (value := getattr(body, name)) is not None:
            sampling.check_range(name, value)
    values = sampling.sampler_values(body, info, defaults)
    constraint, constrained_by = constraint_of(body) if constrains(body) else (None, "")
    if body.dry_sequence_breakers is not None:
        values["dry_sequence_breakers"] = sampling.breakers(body.dry_sequence_breakers)
    params = SamplingParams(
        **values,
        stop=sampling.stop_strings(body.stop),
        seed=sampling.seed_of(body.seed),
        logit_bias=sampling.logit_biases(body.logit_bias, info),
        ignore_eos=bool(body.ignore_eos),
        constraint=constraint,
    )
    return Options(
        sampling=params,
        n=1 if body.n is None else body.n,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        user=body.safety_identifier if body.user is None else body.user,
        priority=body.priority or 0,
        slo_ms=body.slo_ms,
        preempt=_preempt(body.preempt),
        cache_salt=salt_text("cache_salt", body.cache_salt, MAX_SALT),
        with_timings=bool(body.timings_per_token),
        context_policy=policy_of(body.context_policy, can_shift=info.can_shift),
        constrained_by=constrained_by,
    )


def keep_alive_of(body: GenerationBody) -> float | None:
    """Seconds for which the request wants its model to stay loaded; None: it does not say. Raises InvalidRequest."""
    return None if body.keep_alive is None else parse_duration(body.keep_alive)


def _preempt(value: str | None) -> Preempt:
    try:
        return Preempt.AUTO if value is None else Preempt(value)
    except ValueError:
        raise InvalidRequest(f"preempt: it must be one of {', '.join(Preempt)}", param="preempt") from None


def salt_text(field: str, text: str | None, limit: int) -> str | None:
    """A text that keeps cached KV apart. Raises InvalidRequest for an empty one and one that is too long."""
    if text is not None and not 0 < len(text) <= limit:
        raise InvalidRequest(f"{field}: it must have 1 to {limit} characters", param=field)
    return text


def check_metadata(metadata: dict[str, str] | None) -> None:
    """What clients write beside a response or a batch. Raises InvalidRequest."""
    pairs = (metadata or {}).items()
    if len(pairs) > MAX_METADATA or any(len(name) > 64 or len(text) > 512 for name, text in pairs):
        words = f"metadata: it takes at most {MAX_METADATA} pairs, names of up to 64 and texts of up to 512 characters"
        raise InvalidRequest(words, param="metadata")


def _refuse(asked: bool, field: str, what: str) -> None:
    if asked:
        raise unbuilt(field, what)


def unbuilt(field: str, what: str) -> InvalidRequest:
    """The refusal of a field that would change the answer and is not built; ``what`` it asks for."""
    return InvalidRequest(f"{field}: this server does not support {what} yet; leave the field out", param=field)


def _refuse_unsupported(body: GenerationBody) -> None:
    """What would change the answer is refused rather than ignored."""
    if body.stream_options is not None and body.stream_options.continuous_usage_stats:
        raise unbuilt("stream_options.continuous_usage_stats", "the usage in every chunk")


def normalise(messages: list[Message] | None) -> list[Message]:
    """Check every message; join its content parts to one text (with newlines, as llama-server and vLLM do), and spell
    calls and thoughts in one way."""
    if not messages:
        raise InvalidRequest("messages: it must be a list with at least one message", param="messages")
    callers: dict[str, str] = {}  # id of each call -> the function's name
    for i, message in enumerate(messages):
        role, content = message.role, message.content
        if role is UNSET or role not in ROLES:
            got = "the role is missing" if role is UNSET else f"{role[:40]!r} is not a role"
            field = f"messages[{i}].role"
            raise InvalidRequest(f"{field}: {got}; it must be one of {', '.join(ROLES)}", param=field)
        if isinstance(content, list):
            message.content = "\n".join([_part(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content)])
        elif not isinstance(content, str) and role != "assistant":
            field = f"messages[{i}].content"
            raise InvalidRequest(f"{field}: it is missing; it must be a text or a list of text parts", param=field)
        elif content is UNSET:
            message.content = None
        if message.reasoning is not None:
            message.reasoning_content, message.reasoning = message.reasoning_content or message.reasoning, None
        if message.tool_calls is not None or message.function_call is not None:
            _spell_calls(message, callers)
        if role in ("tool", "function"):
            message.role = "tool"
            message.name = message.name or callers.get(message.tool_call_id or "")
    return messages


def _spell_calls(message: Message, callers: dict[str, str]) -> None:
    calls = list(message.tool_calls or ())
    if message.function_call is not None:
        calls.append(CallBody(message.function_call))
        message.function_call = None
    for call in calls:
        spell_call(call)
        if call.id is not None:
            callers[call.id] = call.function.name
    message.tool_calls = calls or None


def _part(part: ContentPart, field: str) -> str:
    if part.type != "text":
        got = "missing" if part.type is UNSET else repr(part.type[:40])
        raise InvalidRequest(f"{field}.type: it is {got}, but this model takes text only", param=f"{field}.type")
    if part.text is UNSET:
        raise InvalidRequest(f"{field}.text: it is missing; it must be a string", param=f"{field}.text")
    return part.text


def _prompts(prompt: str | list[str | int | list[int]] | None, info: ModelInfo) -> list[str | list[int]]:
    """One entry a prompt: a text, or token ids that are in the vocabulary."""
    if prompt is None:
        raise InvalidRequest("prompt: it is missing; it must be a text or a list of token ids", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if len(kinds) != 1:
        wrong = "is empty" if not kinds else "mixes texts and token ids"
        raise InvalidRequest(f"prompt: the list {wrong}; it must hold only texts or only token ids", param="prompt")
    if kinds == {int}:
        tokens: list[int] = prompt  # type: ignore[assignment]
        sampling.check_tokens(tokens, "prompt", info)
        return [tokens]
    for i, one in enumerate(prompt):
        if isinstance(one, list):
            if not one:
                raise InvalidRequest(f"prompt[{i}]: it holds no token", param=f"prompt[{i}]")
            sampling.check_tokens(one, f"prompt[{i}]", info)
    return prompt  # type: ignore[return-value]


def decode_body(decoder: msgspec.json.Decoder[S], data: bytes) -> S:
    """Raises InvalidRequest with ``param`` set when a field has the wrong type."""
    data = data.removeprefix(codecs.BOM_UTF8)
    if not data.strip(b" \t\r\n"):
        raise InvalidRequest("the body is empty; it must be a JSON object")
    try:
        if not data.isascii():
            data.decode()  # msgspec does not look into strings that it skips
        return decoder.decode(data)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InvalidRequest("the body is JSON nested too deeply") from None
    except msgspec.ValidationError as error:
        return _with_whole_numbers(decoder, data, error)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {_half_a_pair(data) or error}") from None


#: Members that hold what is the client's own, which stays as it came.
_AS_THEY_CAME = ("messages", "input", "metadata", "tools", "functions", "tool_choice", *structured.FIELDS)


def _with_whole_numbers(decoder: msgspec.json.Decoder[S], data: bytes, error: msgspec.ValidationError) -> S:
    """The body of a client that writes whole numbers as ``3.0`` or ``3e0`` (PHP, Lua). PERF: looked at only when the
    body was refused as it is, with ``error``. Raises InvalidRequest where it has other faults.
    """
    try:
        body = msgspec.json.decode(data)
        if isinstance(body, dict):
            body = {name: value if name in _AS_THEY_CAME else _whole(value) for name, value in body.items()}
        whole: S = msgspec.convert(body, decoder.type)
        return whole
    except msgspec.ValidationError as fault:
        raise _type_error(str(fault)) from None
    except (msgspec.DecodeError, RecursionError):
        raise _type_error(str(error)) from None


def _whole(value: Any) -> Any:
    """The same with an int for every float that is one."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1 << 63 else value
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    return value


#: A surrogate pair, or half of one; JSON's escapes of a character beyond U+FFFF.
_SURROGATES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(\\u[dD][c-fC-F][0-9a-fA-F]{2})?|\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def _half_a_pair(data: bytes) -> str | None:
    """What to say where the reason is half a surrogate pair: a character that was cut in two."""
    for found in _SURROGATES.finditer(data):
        before = data[max(0, found.start() - 1000) : found.start()]
        is_escape = (len(before) - len(before.rstrip(b"\\"))) % 2 == 0  # and not an escaped backslash
        if is_escape and found[1] is None:
            half = found[0].decode()
            return f"{half} at byte {found.start()} is half a surrogate pair, which by itself is not a character"
    return None


_AT_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_EXPECTED = re.compile(r"^Expected `(?P<wanted>[^`]*)`, got `(?P<got>[^`]*)`$")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _type_error(text: str) -> InvalidRequest:
    """msgspec's message in the words of JSON: "Expected `int`, got `str` - at `$.n`" names the field ``n``."""
    match = _AT_PATH.match(text)
    what, path = (match["what"], match["path"]) if match else (text, None)
    param = path.replace("[...]", "") if path else None
    expected = _EXPECTED.match(what)
    if expected:
        wanted = [_WORDS.get(word, word) for word in expected["wanted"].split(" | ") if word != "null"]
        what = f"expected {' or '.join(wanted)}, got {_WORDS.get(expected['got'], expected['got'])}"
    return InvalidRequest(f"{param or 'the body'}: {what}", param=param)
