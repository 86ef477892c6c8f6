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
from mullama.web.openai.context_policy import ContextPolicy, Dropped, PromptLimits, drop_tokens, keep_tokens, without
from mullama.web.openai.opening import Opened, Opening, with_lease
from mullama.web.openai.responding import respond
from mullama.web.openai.schemas import CompletionBody, CompletionCall, completion_prompts, parse_completion
from mullama.web.openapi.answer_types import TextCompletion
from mullama.web.openapi.operation import PROFILE, Operation
from mullama.web.security import Access
from mullama.web.services import LARGE_TEXT, Services
from mullama.web.stream.event_stream import EVENTS
from mullama.web.stream.generations import Reply


class Completions:
    access = Access.CLIENT
    operations = {
        "POST": Operation(
            "Continue a text", body=CompletionBody, answer=TextCompletion, streams=EVENTS, parameters=(PROFILE,)
        )
    }

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        call = await services.parse(req, partial(parse_completion, models=services.models))
        opened = await open_completion(services, req, call)

        def choice(index: int, reply: Reply) -> dict[str, Any]:
            return {
                "index": index,
                "text": (opened.echoes[index] if opened.echoes else "") + reply.text,
                "logprobs": None,
                "finish_reason": reply.finish.reason,
            }

        await respond(req, resp, services, opened, is_chat=False, choice=choice)


async def open_completion(
    services: Services, req: Request, call: CompletionCall, *, endpoint: str = "completions", id_prefix: str = "cmpl"
) -> Opened:
    """The prompts of a completion, and their generations. Raises what ``Completions`` raises."""

    async def begin(lease: Lease) -> Opened:
        opening = await Opening.of(services, req, call, lease)
        errand, engine, policy, limits = opening.errand, opening.engine, opening.policy, opening.limits
        asked = completion_prompts(call.body, opening.options, engine.info)
        size = sum(len(prompt) for prompt in asked)
        pace = errand.checkpoint if size > LARGE_TEXT else None
        keep, side = call.body.truncate_prompt_tokens, call.body.truncation_side
        most = None if policy.truncates or keep is not None else limits.limit
        prompts = await errand.run(size > LARGE_TEXT, partial(_tokens, engine, asked, most, pace))
        if keep is not None:
            prompts = [keep_tokens(prompt, keep, side, limits) for prompt in prompts]
        echoes = None
        if call.body.echo:
            echoes = await errand.run(size > LARGE_TEXT, partial(_echoes, engine, asked, opening.options.n))
        dropped: list[Dropped | None] = []
        if policy.truncates and any(len(prompt) > limits.wanted for prompt in prompts):
            prompts, dropped = await errand.run(True, partial(_cut, engine, prompts, policy, limits))
        group = await opening.submit(prompts, id_prefix=id_prefix, endpoint=endpoint)
        return Opened(group, opening.options, dropped, echoes, opening.load_ns)

    return await with_lease(services, req, call.model, begin)


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
    engine: EngineClient, prompts: list[list[int]], policy: ContextPolicy, limits: PromptLimits
) -> tuple[list[list[int]], list[Dropped | None]]:
    """The prompts less what ``policy`` drops, and what that is; None for a prompt that fits."""
    marked, plain = (engine.tokenize("a", add_special=special)[:1] for special in (True, False))
    bos = marked if marked != plain else []
    cut, dropped = [], []
    for prompt in prompts:
        span = drop_tokens(len(prompt), policy, limits, has_bos=bool(bos) and prompt[:1] == bos)
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
