"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import falcon.asgi
import msgspec

from mullama.engine.client import EngineClient
from mullama.web.context import ContextPolicy, Dropped, Room, drop_turns, policy_for, without
from mullama.web.generations import Group, Reply
from mullama.web.request import Request
from mullama.web.responding import new_id, respond
from mullama.web.schemas import ChatCall, Message, parse_chat
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
        info = call.engine.info
        policy = policy_for(call.options.context_policy, services.config.context_policy, can_shift=info.can_shift)
        room = Room(info.n_ctx, call.options.sampling.max_tokens)
        dropped = None
        if policy.truncates and len(prompt) > room.wanted:
            prompt, dropped = await services.offload(True, partial(_cut, call, prompt, policy, room))
        group = Group(
            services,
            call.engine,
            request_id=new_id("chatcmpl"),
            model=call.model,
            endpoint="chat.completions",
            prompts=[prompt],
            options=call.options.of_tenant(req.tenant),
            arrival_ns=req.arrival_ns,
            context_shift=policy is ContextPolicy.SHIFT,
        )
        await respond(req, resp, services, group, call.options, is_chat=True, choice=_choice, dropped=[dropped])


def _prompt(engine: EngineClient, messages_json: bytes) -> list[int]:
    text = engine.render_chat(messages_json)
    # render_chat leaves out a BOS that the vocabulary adds by itself.
    return engine.tokenize(text, add_special=True, parse_special=True)


def _cut(call: ChatCall, whole: list[int], policy: ContextPolicy, room: Room) -> tuple[list[int], Dropped | None]:
    """The prompt of the chat less what ``policy`` drops, and what that is. Raises ContextLengthExceeded."""

    def prompt_of(messages: Sequence[Message]) -> list[int]:
        return _prompt(call.engine, msgspec.json.encode(messages))

    span = drop_turns(call.messages, lambda kept: len(prompt_of(kept)), policy, room, n_whole=len(whole))
    if not span:
        return whole, None
    prompt = prompt_of(without(call.messages, span))
    return prompt, Dropped(policy, len(whole), len(prompt), span, is_chat=True)


def _choice(index: int, reply: Reply) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": reply.text},
        "logprobs": None,
        "finish_reason": reply.finish.reason,
    }
