"""What chat and completions share: the response of a group, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import falcon.asgi
import orjson

from mullama.web.http.request import Request
from mullama.web.http.request_log import note_group
from mullama.web.openai.chunks import ChunkFormat
from mullama.web.openai.context_policy import context_member, shift_member
from mullama.web.openai.opening import Opened
from mullama.web.openai.usage import profile_fields, usage
from mullama.web.services import Services
from mullama.web.stream.direct import direct_body
from mullama.web.stream.event_stream import EventStream, start_stream
from mullama.web.stream.generations import Reply


def wants_profile(req: Request) -> bool:
    return (req.get_header("X-Profile") or "").strip().lower() in ("true", "1")


async def respond(
    req: Request,
    resp: falcon.asgi.Response,
    services: Services,
    opened: Opened,
    *,
    is_chat: bool,
    choice: Callable[[int, Reply], dict[str, Any]],
) -> None:
    """Answer with the group's choices; it is closed here, or by the stream. Raises the error of a generation.

    The response says what was taken out of its prompts, and what the engine dropped to go on when the context was full.
    """
    group, options, dropped = opened.group, opened.options, opened.dropped
    streaming = False
    note_group(req, group)
    try:
        created = int(time.time())
        context = context_member(dropped)
        if context:
            resp.set_header("X-Context-Dropped", str(sum(one.n_dropped for one in dropped if one is not None)))
        group.watch(req.receive)
        if options.stream:
            chunks = ChunkFormat(
                group,
                created=created,
                is_chat=is_chat,
                include_usage=options.include_usage,
                with_profile=wants_profile(req),
                echoes=opened.echoes,
                only_first=context,
            )
            body = direct_body(req.scope)
            start_stream(resp, EventStream(group, chunks, ping_seconds=services.ping_seconds, body=body))
            streaming = True
            return
        replies = await group.collect()
        finishes = [reply.finish for reply in replies]
        shifted = [finish.profile.context_shifted for finish in finishes]
        if any(shifted):
            context = shift_member(shifted)
            resp.set_header("X-Context-Dropped", str(sum(shifted)))
        answer = {
            "id": group.id,
            "object": "chat.completion" if is_chat else "text_completion",
            "created": created,
            "model": group.model,
            "choices": [choice(index, reply) for index, reply in enumerate(replies)],
            "usage": usage(group.prompt_lengths, group.n, finishes),
            **context,
        }
        if wants_profile(req):
            answer |= profile_fields(finishes)
        resp.data = orjson.dumps(answer)
    finally:
        if not streaming:
            group.close()
