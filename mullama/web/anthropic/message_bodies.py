"""The body of ``/v1/messages``: its fields, what is wrong with them, and the chat that it becomes.

Fields that nobody knows are ignored; those that would change the answer and are not built are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import msgspec

from mullama.errors import InvalidRequest
from mullama.serving.manager import ModelManager
from mullama.web.chat.functions import NAME_SCHEMA, CallBody, CalledBody, FunctionBody, ToolBody
from mullama.web.openai.sampling import range_schemas
from mullama.web.openai.schemas import ChatBody, ChatCall, Message, chat_call, decode_body, unbuilt
from mullama.web.openapi.operation import unbuilt_schemas

#: What the API calls a field, by our name of it.
NAMES = {"stop": "stop_sequences", "user": "metadata.user_id"}
MAX_TEMPERATURE = 1.0

#: Fields that are refused while their value asks for something, and what that is.
_UNBUILT = {
    "mcp_servers": "tool servers",
    "container": "containers",
    "output_config": "constrained outputs",
    "output_format": "constrained outputs",
    "context_management": "editing the context",
}


class Block(msgspec.Struct):
    """A content block: a text, a thought of an earlier answer, a call in one (``tool_use``), the result of a call."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None

    field_schemas: ClassVar = {"type": {"enum": ["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]}}
    object_schema: ClassVar = {
        "allOf": [
            {
                "if": {"properties": {"type": {"const": kind}}},
                "then": {"properties": {name: {"type": "string"} for name in names}, "required": names},
            }
            for kind, names in {"text": ["text"], "tool_use": ["id", "name"], "tool_result": ["tool_use_id"]}.items()
        ]
    }


class AnthropicMessage(msgspec.Struct):
    role: str
    content: str | list[Block]

    field_schemas: ClassVar = {"role": {"enum": ["user", "assistant"]}}


class Metadata(msgspec.Struct):
    user_id: str | None = None


class ThinkingBody(msgspec.Struct):
    """A budget is a wish: thoughts end by themselves, or with ``max_tokens``."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class AnthropicTool(msgspec.Struct):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None

    field_schemas: ClassVar = {
        "name": NAME_SCHEMA,
        "type": {"enum": [None, "custom"]},
        "strict": {"enum": [None, False]},
    }


class AnthropicChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    field_schemas: ClassVar = {"type": {"enum": ["auto", "none"]}}


class CountBody(msgspec.Struct, kw_only=True):
    """Of ``count_tokens``. None leaves a default in place."""

    model: str | None = None
    messages: list[AnthropicMessage] | None = None
    max_tokens: int | None = None
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: Metadata | None = None
    thinking: ThinkingBody | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None

    field_schemas: ClassVar[dict[str, Any]] = {
        "messages": {"minItems": 1},
        "max_tokens": {"minimum": 1},
        "temperature": {"minimum": 0, "maximum": MAX_TEMPERATURE},
        **unbuilt_schemas(_UNBUILT),
    }
    required_fields: ClassVar[tuple[str, ...]] = ("messages",)


class MessagesBody(CountBody, kw_only=True):
    field_schemas: ClassVar = CountBody.field_schemas | range_schemas(("top_k", "top_p"))
    required_fields: ClassVar = ("messages", "max_tokens")


_decoder = msgspec.json.Decoder(MessagesBody)


@dataclass(slots=True, frozen=True)
class MessagesCall:
    chat: ChatCall
    streams: bool


def parse_messages(data: bytes, models: ModelManager, *, counts_only: bool = False) -> MessagesCall:
    """The chat that a body asks for; ``counts_only``: for counting its tokens. Raises InvalidRequest, ModelNotFound."""
    body = decode_body(_decoder, data)
    for name, what in _UNBUILT.items():
        if getattr(body, name):
            raise unbuilt(name, what)
    if body.max_tokens is None and not counts_only:
        raise InvalidRequest("max_tokens: it is missing; it must be a whole number of at least 1", param="max_tokens")
    if body.max_tokens is not None and body.max_tokens < 1:
        raise InvalidRequest(f"max_tokens: {body.max_tokens} is below 1", param="max_tokens")
    if body.temperature is not None and not 0 <= body.temperature <= MAX_TEMPERATURE:
        raise InvalidRequest(f"temperature: it must be between 0 and {MAX_TEMPERATURE:g}", param="temperature")
    messages = _messages(body)
    chat = ChatBody(
        model=body.model,
        messages=messages,
        continue_final_message=messages[-1].role == "assistant",
        tools=_tools(body.tools),
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=not (body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use),
        chat_template_kwargs=None if _thinks(body.thinking) else {"enable_thinking": False},
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        user=None if body.metadata is None else body.metadata.user_id,
        stream=body.stream,
    )
    return MessagesCall(chat_call(chat, models), bool(body.stream))


def _thinks(thinking: ThinkingBody | None) -> bool:
    return thinking is not None and thinking.type != "disabled"


def _tools(tools: list[AnthropicTool] | None) -> list[ToolBody] | None:
    for i, tool in enumerate(tools or ()):
        if tool.type not in (None, "custom"):
            raise unbuilt(f"tools[{i}].type", f"the tool {tool.type[:40]!r}")
    return [
        ToolBody(FunctionBody(tool.name, tool.description, tool.input_schema, tool.strict)) for tool in tools or ()
    ] or None


def _choice(choice: AnthropicChoice | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _messages(body: MessagesBody) -> list[Message]:
    """Turns of one role that follow each other are one, as the API has it. Raises InvalidRequest."""
    if not body.messages:
        raise InvalidRequest("messages: it must be a list with at least one message", param="messages")
    found: list[Message] = []
    if body.system:
        found.append(Message(role="system", content=_text(body.system, "system")))
    for i, message in enumerate(body.messages):
        if message.role not in ("user", "assistant"):
            where = f"messages[{i}].role"
            raise InvalidRequest(f"{where}: {message.role[:40]!r} is neither user nor assistant", param=where)
        for one in _of_blocks(message, f"messages[{i}].content"):
            last = found[-1] if found else None
            if last is not None and last.role == one.role == message.role and not last.tool_calls:
                last.content = "\n".join(filter(None, (last.content, one.content)))  # type: ignore[arg-type]
                last.reasoning_content = one.reasoning_content or last.reasoning_content
                last.tool_calls = one.tool_calls
            else:
                found.append(one)
    return found


def _of_blocks(message: AnthropicMessage, where: str) -> list[Message]:
    """The messages that the blocks of one are: results of calls, each by itself, and the rest."""
    if isinstance(message.content, str):
        return [Message(role=message.role, content=message.content)]
    found, rest, calls, thoughts = [], [], [], []
    for j, block in enumerate(message.content):
        at = f"{where}[{j}]"
        if block.type == "tool_result" and message.role == "user":
            text = _text(block.content or "", f"{at}.content")
            found.append(
                Message(role="tool", content=text, tool_call_id=_needed(block.tool_use_id, f"{at}.tool_use_id"))
            )
        elif block.type == "tool_use" and message.role == "assistant":
            name = _needed(block.name, f"{at}.name")
            calls.append(CallBody(CalledBody(name, block.input or {}), _needed(block.id, f"{at}.id")))
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":
            rest.append(_block_text(block, at))
    if rest or calls or thoughts or not found:
        thought = "\n".join(thoughts) or None
        text = "\n".join(rest)
        found.append(Message(role=message.role, content=text, tool_calls=calls or None, reasoning_content=thought))
    return found


def _text(content: str | list[Block], where: str) -> str:
    """The text of content blocks, joined with newlines. Raises InvalidRequest for what is no text."""
    if isinstance(content, str):
        return content
    return "\n".join([_block_text(block, f"{where}[{j}]") for j, block in enumerate(content)])


def _block_text(block: Block, where: str) -> str:
    if block.type != "text":
        words = f"it is {block.type[:40]!r}, but a text is taken here"
        raise InvalidRequest(f"{where}.type: {words}", param=where)
    return _needed(block.text, f"{where}.text")


def _needed(text: str | None, where: str) -> str:
    if text is None:
        raise InvalidRequest(f"{where}: it is missing; it must be a string", param=where.rpartition(".")[0])
    return text
