"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import falcon.asgi
import msgspec

from mullama.engine.client import EngineClient
from mullama.engine.handover import Speaker
from mullama.errors import ContextLengthExceeded
from mullama.serving.states import Lease
from mullama.web.context import ContextPolicy, Dropped, Room, drop_turns, policy_for, without
from mullama.web.generations import Group, Reply
from mullama.web.lora import SEPARATOR, check_named, uses_of
from mullama.web.request import Request
from mullama.web.responding import new_id, respond
from mullama.web.schemas import ChatCall, Message, Options, options_of, parse_chat
from mullama.web.security import Access
from mullama.web.services import FEW_BIASES, LARGE_TEXT, Services


class ChatCompletions:
    access = Access.CLIENT

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        call = await services.parse(req, partial(parse_chat, models=services.models))
        lease = await services.lease(req, call.model)
        try:
            group, options, dropped = await self._begin(req, call, lease)
        except BaseException:
            lease.release()
            raise
        await respond(req, resp, services, group, options, is_chat=True, choice=_choice, dropped=[dropped])

    async def _begin(self, req: Request, call: ChatCall, lease: Lease) -> tuple[Group, Options, Dropped | None]:
        """The prompt, and its generations. The group takes over the lease."""
        services, engine = self._services, lease.engine
        named = check_named(call.model, call.named, engine)
        has_many = len(call.body.logit_bias or ()) > FEW_BIASES
        options = await services.offload(has_many, partial(options_of, call.body, engine.info))
        prepared = await services.prepared(engine, options.sampling)
        services.keep_alive(call.model, call.body.keep_alive)
        info = engine.info
        policy = policy_for(options.context_policy, services.config.context_policy, can_shift=info.can_shift)
        room = Room(info.n_ctx, options.sampling.max_tokens)
        is_large = len(call.messages_json) > LARGE_TEXT
        pace = services.pace() if is_large else None
        most = None if policy.truncates else room.limit
        prompt = await services.offload(is_large, partial(_prompt, engine, call.messages_json, most, pace))
        dropped = None
        if policy.truncates and len(prompt) > room.wanted:
            prompt, dropped = await services.offload(
                True, partial(_cut, engine, call, prompt, policy, room, services.pace())
            )
        group = Group(
            services,
            lease,
            request_id=new_id("chatcmpl"),
            model=SEPARATOR.join((call.model, *named)),
            endpoint="chat.completions",
            prompts=[prompt],
            options=options.of_tenant(req.tenant),
            prepared=prepared,
            arrival_ns=req.arrival_ns,
            context_shift=policy is ContextPolicy.SHIFT,
            lora=uses_of(named, call.body.lora),
            translate=partial(_translated, messages_json=call.messages_json) if dropped is None else None,
        )
        await group.submit()
        return group, options, dropped


def _prompt(engine: EngineClient, messages_json: bytes, most: int | None, pace: Callable[[], None] | None) -> list[int]:
    # render_chat leaves out a BOS that the vocabulary adds by itself.
    return engine.prompt_tokens(engine.render_chat(messages_json), most=most, between=pace)


def _translated(speaker: Speaker, messages_json: bytes) -> list[int]:
    """The prompt as another model takes it, to which a swap moves the request."""
    return speaker.tokenize(speaker.render_chat(messages_json), add_special=True, parse_special=True)


def _cut(
    engine: EngineClient, call: ChatCall, whole: list[int], policy: ContextPolicy, room: Room, pace: Callable[[], None]
) -> tuple[list[int], Dropped | None]:
    """The prompt of the chat less what ``policy`` drops, and what that is. Raises ContextLengthExceeded."""

    def prompt_of(messages: Sequence[Message], most: int | None = None) -> list[int]:
        return _prompt(engine, msgspec.json.encode(messages), most, pace)

    def fits(messages: Sequence[Message]) -> bool:
        try:
            prompt_of(messages, room.wanted)
        except ContextLengthExceeded:
            return False
        return True

    span = drop_turns(call.messages, lambda kept: len(prompt_of(kept)), policy, room, n_whole=len(whole), fits=fits)
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
