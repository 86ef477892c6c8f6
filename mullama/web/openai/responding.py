"""What chat and completions share: the response of a group, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import falcon.asgi
import orjson

from mullama.types import Finish
from mullama.web.http.request import Request
from mullama.web.http.request_log import note_group
from mullama.web.openai.chunks import ChunkFormat
from mullama.web.openai.context_policy import context_member, shift_member
from mullama.web.openai.opening import Opened
from mullama.web.openai.usage import profile_fields, timings, usage
from mullama.web.services import Services
from mullama.web.stream.direct import direct_body
from mullama.web.stream.event_stream import EVENTS, EventStream, StreamFormat, start_stream
from mullama.web.stream.generations import Reply


def wants_profile(req: Request) -> bool:
    return (req.get_header("X-Profile") or "").strip().lower() in ("true", "1")


async def deliver(
    req: Request,
    resp: falcon.asgi.Response,
    services: Services,
    opened: Opened,
    *,
    streams: bool,
    chunks: Callable[[], StreamFormat],
    whole: Callable[[list[Reply]], dict[str, Any]],
    media_type: str = EVENTS,
) -> None:
    """Answer in the words of any API: a stream of ``chunks``, or the JSON that ``whole`` makes of the choices.

    The group is closed here, or by the stream. Raises the error of a generation.
    """
    group, streaming = opened.group, False
    note_group(req, group)
    try:
        group.watch(req.receive)
        if streams:
            body = direct_body(req.scope)
            stream = EventStream(group, chunks(), ping_seconds=services.ping_seconds, body=body)
            start_stream(resp, stream, media_type)
            streaming = True
            return
        resp.data = orjson.dumps(whole(await group.collect()))
    finally:
        if not streaming:
            group.close()


async def respond(
    req: Request,
    resp: falcon.asgi.Response,
    services: Services,
    opened: Opened,
    *,
    is_chat: bool,
    choice: Callable[[int, Reply], dict[str, Any]],
) -> None:
    """Answer a chat or a completion. Raises the error of a generation.

    The response says what was taken out of its prompts, and what the engine dropped to go on when the context was full.
    """
    group, options, dropped = opened.group, opened.options, opened.dropped
    created = int(time.time())

    def cut() -> dict[str, Any]:
        context = context_member(dropped)
        if context:
            resp.set_header("X-Context-Dropped", str(sum(one.n_dropped for one in dropped if one is not None)))
        return context

    def at_end(finishes: Sequence[Finish]) -> dict[str, Any]:
        told = profile_fields(finishes) if wants_profile(req) else {}
        return told | ({"timings": timings(finishes)} if options.with_timings else {})

    def chunks() -> ChunkFormat:
        return ChunkFormat(
            group,
            created=created,
            is_chat=is_chat,
            include_usage=options.include_usage,
            at_end=at_end,
            echoes=opened.echoes,
            only_first=cut(),
        )

    def whole(replies: list[Reply]) -> dict[str, Any]:
        context = cut()
        finishes = [reply.finish for reply in replies]
        shifted = [finish.profile.context_shifted for finish in finishes]
        if any(shifted):
            context = shift_member(shifted)
            resp.set_header("X-Context-Dropped", str(sum(shifted)))
        return {
            "id": group.id,
            "object": "chat.completion" if is_chat else "text_completion",
            "created": created,
            "model": group.model,
            "system_fingerprint": group.fingerprint,
            "choices": [choice(index, reply) for index, reply in enumerate(replies)],
            "usage": usage(group.prompt_lengths, group.n, finishes),
            **context,
            **at_end(finishes),
        }

    await deliver(req, resp, services, opened, streams=options.stream, chunks=chunks, whole=whole)
