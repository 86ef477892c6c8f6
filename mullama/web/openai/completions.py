"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import falcon.asgi

from mullama.engine.client import EngineClient
from mullama.errors import ContextLengthExceeded
from mullama.serving.states import Lease
from mullama.web.http.request import Request
from mullama.web.internal.lora_routes import SEPARATOR, check_named, uses_of
from mullama.web.openai.context import ContextPolicy, Dropped, Room, drop_tokens, policy_for, without
from mullama.web.openai.responding import new_id, respond
from mullama.web.openai.schemas import (
    CompletionCall,
    Options,
    completion_prompts,
    keep_alive_of,
    options_of,
    parse_completion,
)
from mullama.web.security import Access
from mullama.web.services import FEW_BIASES, LARGE_TEXT, Services
from mullama.web.stream.generations import Group, Reply


class Completions:
    access = Access.CLIENT

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        call = await services.parse(req, partial(parse_completion, models=services.models))
        lease = await services.lease(req, call.model)
        try:
            group, options, echoes, dropped = await self._begin(req, call, lease)
        except BaseException:
            lease.release()
            raise

        def choice(index: int, reply: Reply) -> dict[str, Any]:
            return {
                "index": index,
                "text": (echoes[index] if echoes else "") + reply.text,
                "logprobs": None,
                "finish_reason": reply.finish.reason,
            }

        await respond(req, resp, services, group, options, is_chat=False, choice=choice, echoes=echoes, dropped=dropped)

    async def _begin(
        self, req: Request, call: CompletionCall, lease: Lease
    ) -> tuple[Group, Options, list[str] | None, list[Dropped | None]]:
        """The prompts, and their generations. The group takes over the lease."""
        services, engine = self._services, lease.engine
        errand = services.errand(req)
        named = check_named(call.model, call.named, engine)
        has_many = len(call.body.logit_bias or ()) > FEW_BIASES
        options = await errand.run(has_many, partial(options_of, call.body, engine.info))
        keep_alive_s = keep_alive_of(call.body)
        prepared = await services.prepared(errand, engine, options.sampling)
        asked = completion_prompts(call.body, options, engine.info)
        info = engine.info
        policy = policy_for(options.context_policy, services.config.context_policy, can_shift=info.can_shift)
        room = Room(info.n_ctx, options.sampling.max_tokens)
        size = sum(len(prompt) for prompt in asked)
        pace = errand.checkpoint if size > LARGE_TEXT else None
        most = None if policy.truncates else room.limit
        prompts = await errand.run(size > LARGE_TEXT, partial(_tokens, engine, asked, most, pace))
        echoes = None
        if call.body.echo:
            echoes = await errand.run(size > LARGE_TEXT, partial(_echoes, engine, asked, options.n))
        dropped: list[Dropped | None] = []
        if policy.truncates and any(len(prompt) > room.wanted for prompt in prompts):
            prompts, dropped = await errand.run(True, partial(_cut, engine, prompts, policy, room))
        group = Group(
            services,
            lease,
            request_id=new_id("cmpl"),
            model=SEPARATOR.join((call.model, *named)),
            endpoint="completions",
            prompts=prompts,
            options=options.of_tenant(req.tenant),
            prepared=prepared,
            arrival_ns=req.arrival_ns,
            context_shift=policy is ContextPolicy.SHIFT,
            lora=uses_of(named, call.body.lora),
        )
        await group.submit()
        services.keep_alive(call.model, keep_alive_s)  # of a request that was not refused
        return group, options, echoes, dropped


def _tokens(
    engine: EngineClient, prompts: Sequence[str | list[int]], most: int | None, pace: Callable[[], None] | None
) -> list[list[int]]:
    found = []
    for i, prompt in enumerate(prompts):
        try:
            found.append(engine.prompt_tokens(prompt, most=most, between=pace) if isinstance(prompt, str) else prompt)
        except ContextLengthExceeded as error:
            raise (error if len(prompts) == 1 else error.about(f"prompt[{i}]", "it")) from None
    return found


def _cut(
    engine: EngineClient, prompts: list[list[int]], policy: ContextPolicy, room: Room
) -> tuple[list[list[int]], list[Dropped | None]]:
    """The prompts less what ``policy`` drops, and what that is; None for a prompt that fits."""
    marked, plain = (engine.tokenize("a", add_special=special)[:1] for special in (True, False))
    bos = marked if marked != plain else []
    cut, dropped = [], []
    for prompt in prompts:
        span = drop_tokens(len(prompt), policy, room, has_bos=bool(bos) and prompt[:1] == bos)
        kept = without(prompt, span) if span else prompt
        cut.append(kept)
        dropped.append(Dropped(policy, len(prompt), len(kept), span, is_chat=False) if span else None)
    return cut, dropped


def _echoes(engine: EngineClient, prompts: Sequence[str | list[int]], n: int) -> list[str]:
    """The text of every choice's prompt, as the request gives it: also where the model gets less of it.

    A character that token ids only begin is left to the completion, which shows it whole if it goes on with it.
    """
    texts = [prompt if isinstance(prompt, str) else engine.detokenize(prompt, only_whole=True) for prompt in prompts]
    return [text for text in texts for _ in range(n)]
