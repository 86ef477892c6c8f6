"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import falcon.asgi
import orjson

from mullama.engine.client import AnswerPart
from mullama.errors import MullamaError
from mullama.types import Finish, FinishReason
from mullama.web.anthropic.message_bodies import NAMES, CountBody, MessagesBody, parse_messages
from mullama.web.http.request import Request
from mullama.web.openai.chat_completions import count_tokens, open_chat
from mullama.web.openai.opening import Opened, in_words_of
from mullama.web.openai.responding import deliver, wants_profile
from mullama.web.openai.usage import profile_fields
from mullama.web.openapi.answer_types import AnthropicAnswer, TokenCount
from mullama.web.openapi.operation import PROFILE, Operation
from mullama.web.security import Access
from mullama.web.services import Services
from mullama.web.stream.event_stream import EVENTS, StreamFormat, event_json
from mullama.web.stream.generations import Group, Reply

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def spell_error(status: int, error: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's error object as Anthropic's clients parse it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}


class _Route:
    access = Access.CLIENT
    spell_error = staticmethod(spell_error)

    def __init__(self, services: Services) -> None:
        self._services = services


class Messages(_Route):
    operations = {
        "POST": Operation(
            "Answer a chat", body=MessagesBody, answer=AnthropicAnswer, streams=EVENTS, parameters=(PROFILE,)
        )
    }

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        with in_words_of(NAMES):
            call = await services.parse(req, partial(parse_messages, models=services.models))
            opened = await open_chat(services, req, call.chat, endpoint="messages", id_prefix="msg")
        with_profile = wants_profile(req)

        def whole(replies: list[Reply]) -> dict[str, Any]:
            (reply,) = replies
            answer = _message(opened.group, _blocks(reply), _usage(opened.group, reply.finish))
            calls = reply.answer is not None and bool(reply.answer.calls)
            stop = _stop(reply.finish, opened.options.sampling.stop, calls=calls)
            return answer | stop | (profile_fields([reply.finish]) if with_profile else {})

        events = MessageEvents if opened.group.answers is None else BlockEvents
        chunks = partial(events, opened, with_profile=with_profile)
        await deliver(req, resp, services, opened, streams=call.streams, chunks=chunks, whole=whole)


class CountTokens(_Route):
    operations = {"POST": Operation("Count the tokens of a chat", body=CountBody, answer=TokenCount)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """How many tokens the chat of a request has. Raises InvalidRequest, ModelNotFound, PayloadTooLarge."""
        services = self._services
        with in_words_of(NAMES):
            call = await services.parse(req, partial(parse_messages, models=services.models, counts_only=True))
        resp.data = orjson.dumps({"input_tokens": await count_tokens(services, req, call.chat)})


class MessageEvents(StreamFormat):
    """The events of a streamed message."""

    _head = (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":'
    )
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, opened: Opened, *, with_profile: bool) -> None:
        self._group = opened.group
        self._stops = opened.options.sampling.stop
        self._with_profile = with_profile

    def opening(self, index: int) -> bytes:
        return self._start() + _event(_started(0, _text_block("")))

    def _start(self) -> bytes:
        """What cached KV saved is known only in the end; until then the whole prompt counts as read."""
        usage = {"input_tokens": self._group.prompt_lengths[0], "output_tokens": 0}
        message = _message(self._group, [], usage) | {"stop_reason": None, "stop_sequence": None}
        return _event({"type": "message_start", "message": message})

    def text(self, index: int, text: str) -> bytes:
        return self._head + event_json(text) + b"}}\n\n"

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        return self._head, b"}}\n\n"

    def finish(self, index: int, finish: Finish, ended: Sequence[Finish] | None, *, calls: bool = False) -> bytes:
        delta = _stop(finish, self._stops, calls=calls)
        event = {"type": "message_delta", "delta": delta, "usage": _usage(self._group, finish) | _NOT_THERE}
        if self._with_profile:
            event |= profile_fields([finish])
        return self._end_block() + _event(event) + _event({"type": "message_stop"})

    def _end_block(self) -> bytes:
        return _event({"type": "content_block_stop", "index": 0})

    def error(self, error: MullamaError) -> bytes:
        return _event(spell_error(error.status, error.to_openai()["error"]))


class BlockEvents(MessageEvents):
    """The same of an answer that is read: a block for its thoughts, for its text, for each call."""

    def __init__(self, opened: Opened, *, with_profile: bool) -> None:
        super().__init__(opened, with_profile=with_profile)
        self._n_blocks = 0
        self._kind = ""  # of the block that is open

    def opening(self, index: int) -> bytes:
        return self._start()

    def parts(self, index: int, parts: Sequence[AnswerPart]) -> bytes:
        out = []
        for kind, _, text, call_id in parts:
            if kind == "call" or (kind != self._kind and kind in ("content", "reasoning")):
                out.append(self._begin(kind, text, call_id))
            if kind != "call":
                name, member = _DELTAS[kind]
                delta = {"type": name, member: text}
                out.append(_event({"type": "content_block_delta", "index": self._n_blocks - 1, "delta": delta}))
        return b"".join(out)

    def _begin(self, kind: str, text: str, call_id: str) -> bytes:
        ended = self._end_block()
        self._kind = kind
        block = _text_block("")
        if kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        elif kind == "call":
            block = {"type": "tool_use", "id": call_id, "name": text, "input": {}}
        self._n_blocks += 1
        return ended + _event(_started(self._n_blocks - 1, block))

    def _end_block(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return _event({"type": "content_block_stop", "index": self._n_blocks - 1})


#: The delta of a part, and its member.
_DELTAS = {
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "arguments": ("input_json_delta", "partial_json"),
}


def _started(index: int, block: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def _blocks(reply: Reply) -> list[dict[str, Any]]:
    """The content of a whole message."""
    answer = reply.answer
    if answer is None:
        return [_text_block(reply.text)]
    found: list[dict[str, Any]] = []
    if answer.reasoning:
        found.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content:
        found.append(_text_block(answer.content))
    return found + [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": call.values()} for call in answer.calls
    ]


def _event(fields: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (fields["type"].encode(), event_json(fields))


def _message(group: Group, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": group.id,
        "type": "message",
        "role": "assistant",
        "model": group.model,
        "content": content,
        "stop_details": None,
        "container": None,
        "usage": usage | _NOT_THERE,
    }


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def _stop(finish: Finish, stops: Sequence[str], *, calls: bool) -> dict[str, Any]:
    """``stops``: the client's; others are the template's. ``calls``: functions are called."""
    if finish.reason is FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if finish.stop_string is not None and finish.stop_string in stops:
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop_string}
    return {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}


#: Members of ``usage`` that its clients' types have: nothing here is of several kinds, places or tiers.
_NOT_THERE = dict.fromkeys(
    ("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use", "service_tier")
)


def _usage(group: Group, finish: Finish) -> dict[str, Any]:
    """``input_tokens`` are those that were computed: the API counts what came from the cache beside them."""
    cached = finish.profile.kv_cache_hit
    return {
        "input_tokens": group.prompt_lengths[0] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": finish.profile.completion_tokens,
    }
