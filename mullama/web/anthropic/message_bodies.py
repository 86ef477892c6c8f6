"""The body of ``/v1/messages``: its fields, what is wrong with them, and the chat that it becomes.

Fields that nobody knows are ignored; those that would change the answer and are not built are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from mullama.errors import InvalidRequest
from mullama.serving.manager import ModelManager
from mullama.web.openai.schemas import ChatBody, ChatCall, Message, chat_call, decode_body, unbuilt

#: What the API calls a field, by our name of it.
NAMES = {"stop": "stop_sequences", "user": "metadata.user_id"}
MAX_TEMPERATURE = 1.0

#: Fields that are refused while their value asks for something, and what that is.
_UNBUILT = {
    "tools": "tool calls",
    "tool_choice": "tool calls",
    "mcp_servers": "tool servers",
    "container": "containers",
    "output_config": "constrained outputs",
    "output_format": "constrained outputs",
    "context_management": "editing the context",
}


class Block(msgspec.Struct):
    """A content block. Texts are taken; so are thoughts of earlier answers, which the model is not shown again."""

    type: str
    text: str | None = None


class AnthropicMessage(msgspec.Struct):
    role: str
    content: str | list[Block]


class Metadata(msgspec.Struct):
    user_id: str | None = None


class Thinking(msgspec.Struct):
    type: Literal["enabled", "disabled", "adaptive"]


class MessagesBody(msgspec.Struct, kw_only=True):
    """``max_tokens`` is required but for ``count_tokens``. None leaves a default in place."""

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
    thinking: Thinking | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None


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
    if body.thinking is not None and body.thinking.type == "enabled":
        raise unbuilt("thinking", "thoughts apart from the answer")
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
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        user=None if body.metadata is None else body.metadata.user_id,
        stream=body.stream,
    )
    return MessagesCall(chat_call(chat, models), bool(body.stream))


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
        text = _text(message.content, f"messages[{i}].content")
        if found and found[-1].role == message.role:
            found[-1].content = f"{found[-1].content}\n{text}"
        else:
            found.append(Message(role=message.role, content=text))
    return found


def _text(content: str | list[Block], where: str) -> str:
    """The text of content blocks, joined with newlines. Raises InvalidRequest for what is no text."""
    if isinstance(content, str):
        return content
    texts = []
    for j, block in enumerate(content):
        if block.type in ("thinking", "redacted_thinking"):
            continue
        if block.type != "text":
            raise InvalidRequest(
                f"{where}[{j}].type: it is {block.type[:40]!r}, but this server takes text only", param=f"{where}[{j}]"
            )
        if block.text is None:
            raise InvalidRequest(f"{where}[{j}].text: it is missing; it must be a string", param=f"{where}[{j}]")
        texts.append(block.text)
    return "\n".join(texts)
