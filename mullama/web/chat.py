"""``POST /v1/chat/completions``."""

from __future__ import annotations

from functools import partial
from typing import Any

import falcon.asgi

from mullama.engine.client import EngineClient
from mullama.web.generations import Group, Reply
from mullama.web.request import Request
from mullama.web.responding import new_id, respond
from mullama.web.schemas import parse_chat
from mullama.web.security import Access
from mullama.web.services import LARGE_TEXT, Services


class ChatCompletions:
    access = Access.CLIENT

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        call = await services.parse(req, partial(parse_chat, models=services.models))
        prompt = await services.offload(
            len(call.messages_json) > LARGE_TEXT, partial(_prompt, call.engine, call.messages_json)
        )
        group = Group(
            services,
            call.engine,
            request_id=new_id("chatcmpl"),
            model=call.model,
            endpoint="chat.completions",
            prompts=[prompt],
            options=call.options.of_tenant(req.tenant),
            arrival_ns=req.arrival_ns,
        )
        await respond(req, resp, services, group, call.options, is_chat=True, choice=_choice)


def _prompt(engine: EngineClient, messages_json: bytes) -> list[int]:
    text = engine.render_chat(messages_json)
    # render_chat leaves out a BOS that the vocabulary adds by itself.
    return engine.tokenize(text, add_special=True, parse_special=True)


def _choice(index: int, reply: Reply) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": reply.text},
        "logprobs": None,
        "finish_reason": reply.finish.reason,
    }
