"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import falcon.asgi
import orjson

from mullama.errors import MullamaError
from mullama.serving.states import Lease
from mullama.types import Finish, FinishReason
from mullama.web.anthropic.message_bodies import NAMES, parse_messages
from mullama.web.http.request import Request
from mullama.web.openai.chat_completions import open_chat
from mullama.web.openai.opening import Opened, in_words_of, with_lease
from mullama.web.openai.responding import deliver, wants_profile
from mullama.web.openai.usage import profile_fields
from mullama.web.security import Access
from mullama.web.services import LARGE_TEXT, Services
from mullama.web.stream.event_stream import event_json
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
    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        with in_words_of(NAMES):
            call = await services.parse(req, partial(parse_messages, models=services.models))
            opened = await open_chat(services, req, call.chat, endpoint="messages", id_prefix="msg")
        with_profile = wants_profile(req)

        def whole(replies: list[Reply]) -> dict[str, Any]:
            ((text, finish),) = ((reply.text, reply.finish) for reply in replies)
            answer = _message(opened.group, [{"type": "text", "text": text}], _usage(opened.group, finish))
            return answer | _stop(finish) | (profile_fields([finish]) if with_profile else {})

        chunks = partial(MessageEvents, opened, with_profile=with_profile)
        await deliver(req, resp, services, opened, streams=call.streams, chunks=chunks, whole=whole)


class CountTokens(_Route):
    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """How many tokens the chat of a request has. Raises InvalidRequest, ModelNotFound, PayloadTooLarge."""
        services = self._services
        with in_words_of(NAMES):
            call = await services.parse(req, partial(parse_messages, models=services.models, counts_only=True))
        chat = call.chat

        async def count(lease: Lease) -> int:
            errand, engine = services.errand(req), lease.engine
            is_large = len(chat.messages_json) > LARGE_TEXT
            between = errand.checkpoint if is_large else None

            def work() -> int:
                return len(engine.prompt_tokens(chat.render(engine, chat.messages_json), between=between))

            n_tokens = await errand.run(is_large, work)
            lease.release()
            return n_tokens

        resp.data = orjson.dumps({"input_tokens": await with_lease(services, req, chat.model, count)})


class MessageEvents:
    """The events of a streamed message."""

    _head = (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":'
    )
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    is_first_special = False

    def __init__(self, opened: Opened, *, with_profile: bool) -> None:
        self._group = opened.group
        self._with_profile = with_profile

    def first(self, data: bytes) -> bytes:
        return data

    def opening(self, index: int) -> bytes:
        """What cached KV saved is known only in the end; until then the whole prompt counts as read."""
        usage = {"input_tokens": self._group.prompt_lengths[0], "output_tokens": 0}
        message = _message(self._group, [], usage) | {"stop_reason": None, "stop_sequence": None}
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _event({"type": "message_start", "message": message}) + _event(block)

    def text(self, index: int, text: str) -> bytes:
        return self._head + event_json(text) + b"}}\n\n"

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        return self._head, b"}}\n\n"

    def finish(self, index: int, finish: Finish, ended: Sequence[Finish] | None) -> bytes:
        delta = {"type": "message_delta", "delta": _stop(finish), "usage": _usage(self._group, finish)}
        if self._with_profile:
            delta |= profile_fields([finish])
        stop = _event({"type": "content_block_stop", "index": 0})
        return stop + _event(delta) + _event({"type": "message_stop"})

    def error(self, error: MullamaError) -> bytes:
        return _event(spell_error(error.status, error.to_openai()["error"]))


def _event(fields: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (fields["type"].encode(), event_json(fields))


def _message(group: Group, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": group.id,
        "type": "message",
        "role": "assistant",
        "model": group.model,
        "content": content,
        "usage": usage,
    }


def _stop(finish: Finish) -> dict[str, Any]:
    if finish.reason is FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if finish.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop_string}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(group: Group, finish: Finish) -> dict[str, Any]:
    """``input_tokens`` are those that were computed: the API counts what came from the cache beside them."""
    cached = finish.profile.kv_cache_hit
    return {
        "input_tokens": group.prompt_lengths[0] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": finish.profile.completion_tokens,
    }
