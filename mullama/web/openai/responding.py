"""What chat and completions share: a new id, and the response of a group, streamed or whole."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import falcon.asgi
import orjson

from mullama.web.http.request import Request
from mullama.web.http.request_log import note_group
from mullama.web.openai.context import Dropped, context_member, shift_member
from mullama.web.openai.schemas import Options
from mullama.web.openai.usage import profile_fields, usage
from mullama.web.services import Services
from mullama.web.stream.direct import direct_body
from mullama.web.stream.events import ChunkFormat, EventStream, start_stream
from mullama.web.stream.generations import Group, Reply


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(16)}"


def wants_profile(req: Request) -> bool:
    return (req.get_header("X-Profile") or "").strip().lower() in ("true", "1")


async def respond(
    req: Request,
    resp: falcon.asgi.Response,
    services: Services,
    group: Group,
    options: Options,
    *,
    is_chat: bool,
    choice: Callable[[int, Reply], dict[str, Any]],
    echoes: Sequence[str] | None = None,
    dropped: Sequence[Dropped | None] = (),
) -> None:
    """Answer with the group's choices; it is closed here, or by the stream. Raises the error of a generation.

    ``dropped`` has one entry a prompt, or none at all: what was taken out of it, which the response says. It says too
    what the engine dropped to go on when the context was full.
    """
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
                echoes=echoes,
                only_first=context,
            )
            stream = EventStream(
                group,
                chunks,
                include_usage=options.include_usage,
                with_profile=wants_profile(req),
                ping_seconds=services.ping_seconds,
                body=direct_body(req.scope),
            )
            start_stream(resp, stream)
            streaming = True
            return
        replies = await group.collect()
        finishes = [reply.finish for reply in replies]
        shifted = [finish.profile.context_shifted for finish in finishes]
        if any(shifted):
            context = shift_member(shifted)
            resp.set_header("X-Context-Dropped", str(sum(shifted)))
        body = {
            "id": group.id,
            "object": "chat.completion" if is_chat else "text_completion",
            "created": created,
            "model": group.model,
            "choices": [choice(index, reply) for index, reply in enumerate(replies)],
            "usage": usage(group.prompt_lengths, group.n, finishes),
            **context,
        }
        if wants_profile(req):
            body |= profile_fields(finishes)
        resp.data = orjson.dumps(body)
    finally:
        if not streaming:
            group.close()
