"""``POST /v1/completions``."""

from __future__ import annotations

from functools import partial
from typing import Any

import falcon.asgi

from mullama.web.context import ContextPolicy, Dropped, Room, drop_tokens, policy_for, without
from mullama.web.generations import Group, Reply
from mullama.web.request import Request
from mullama.web.responding import new_id, respond
from mullama.web.schemas import CompletionCall, parse_completion
from mullama.web.security import Access
from mullama.web.services import LARGE_TEXT, Services


class Completions:
    access = Access.CLIENT

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        call = await services.parse(req, partial(parse_completion, models=services.models))
        size = sum(len(prompt) for prompt in call.prompts)
        prompts = await services.offload(size > LARGE_TEXT, partial(_tokens, call))
        echoes = await services.offload(size > LARGE_TEXT, partial(_echoes, call)) if call.echo else None
        info = call.engine.info
        policy = policy_for(call.options.context_policy, services.config.context_policy, can_shift=info.can_shift)
        room = Room(info.n_ctx, call.options.sampling.max_tokens)
        dropped: list[Dropped | None] = []
        if policy.truncates and any(len(prompt) > room.wanted for prompt in prompts):
            prompts, dropped = await services.offload(True, partial(_cut, call, prompts, policy, room))
        group = Group(
            services,
            call.engine,
            request_id=new_id("cmpl"),
            model=call.model,
            endpoint="completions",
            prompts=prompts,
            options=call.options.of_tenant(req.tenant),
            arrival_ns=req.arrival_ns,
            context_shift=policy is ContextPolicy.SHIFT,
        )

        def choice(index: int, reply: Reply) -> dict[str, Any]:
            return {
                "index": index,
                "text": (echoes[index] if echoes else "") + reply.text,
                "logprobs": None,
                "finish_reason": reply.finish.reason,
            }

        await respond(
            req, resp, services, group, call.options, is_chat=False, choice=choice, echoes=echoes, dropped=dropped
        )


def _tokens(call: CompletionCall) -> list[list[int]]:
    tokenize = call.engine.tokenize
    return [
        tokenize(prompt, add_special=True, parse_special=True) if isinstance(prompt, str) else prompt
        for prompt in call.prompts
    ]


def _cut(
    call: CompletionCall, prompts: list[list[int]], policy: ContextPolicy, room: Room
) -> tuple[list[list[int]], list[Dropped | None]]:
    """The prompts less what ``policy`` drops, and what that is; None for a prompt that fits."""
    marked, plain = (call.engine.tokenize("a", add_special=special)[:1] for special in (True, False))
    bos = marked if marked != plain else []
    cut, dropped = [], []
    for prompt in prompts:
        span = drop_tokens(len(prompt), policy, room, has_bos=bool(bos) and prompt[:1] == bos)
        kept = without(prompt, span) if span else prompt
        cut.append(kept)
        dropped.append(Dropped(policy, len(prompt), len(kept), span, is_chat=False) if span else None)
    return cut, dropped


def _echoes(call: CompletionCall) -> list[str]:
    """The text of every choice's prompt, as the request gives it: also where the model gets less of it."""
    texts = [prompt if isinstance(prompt, str) else call.engine.detokenize(prompt) for prompt in call.prompts]
    return [text for text in texts for _ in range(call.options.n)]
