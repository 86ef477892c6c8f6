"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import falcon.asgi
import msgspec

from mullama.engine.client import AnswerForm, EngineClient, Speaker
from mullama.errors import ContextLengthExceeded, InvalidRequest
from mullama.serving.states import Lease
from mullama.types import ChatAsk, ToolChoice
from mullama.web.http.request import Request
from mullama.web.openai.chunks import reason_of
from mullama.web.openai.context_policy import ContextPolicy, Dropped, PromptLimits, drop_turns, keep_tokens, without
from mullama.web.openai.opening import Opened, Opening, with_lease
from mullama.web.openai.responding import respond
from mullama.web.openai.schemas import ChatBody, ChatCall, Ending, Message, keep_alive_of, options_of, parse_chat
from mullama.web.openapi.answer_types import ChatCompletion
from mullama.web.openapi.operation import PROFILE, Operation
from mullama.web.security import Access
from mullama.web.services import LARGE_TEXT, Services
from mullama.web.stream.event_stream import EVENTS
from mullama.web.stream.generations import Reply

#: A chat with more messages is counted in blocks first.
MANY_MESSAGES = 2048
BLOCK_MESSAGES = 256


class ChatCompletions:
    access = Access.CLIENT
    operations = {
        "POST": Operation(
            "Continue a chat", body=ChatBody, answer=ChatCompletion, streams=EVENTS, parameters=(PROFILE,)
        )
    }

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        call = await services.parse(req, partial(parse_chat, models=services.models))
        opened = await open_chat(services, req, call)
        await respond(req, resp, services, opened, is_chat=True, choice=_choice)


async def open_chat(
    services: Services, req: Request, call: ChatCall, *, endpoint: str = "chat.completions", id_prefix: str = "chatcmpl"
) -> Opened:
    """The prompt of a chat, and its generations. Raises what ``ChatCompletions`` raises."""

    async def begin(lease: Lease) -> Opened:
        opening = await Opening.of(services, req, call, lease)
        errand, engine, policy, limits, body = opening.errand, opening.engine, opening.policy, opening.limits, call.body
        is_large = call.size > LARGE_TEXT
        pace = errand.checkpoint if is_large else None
        whole, form = await errand.run(is_large, partial(_whole, engine, call, policy, limits, pace))
        if opening.options.sampling.constraint is not None:
            if call.ask.tools and call.ask.choice is not ToolChoice.NONE:
                field = opening.options.constrained_by
                raise InvalidRequest(
                    f"{field}: an answer that may call functions cannot be constrained as well; leave tools out, or "
                    "set tool_choice to none",
                    param=field,
                )
            form = None  # it holds from the first token on: there are no thoughts, and all is content
        if isinstance(whole, list) and body.truncate_prompt_tokens is not None:
            whole = keep_tokens(whole, body.truncate_prompt_tokens, body.truncation_side, limits)
        prompt, n_whole = (whole, len(whole)) if isinstance(whole, list) else ([], whole)
        dropped = None
        if policy.truncates and n_whole > limits.wanted:
            prompt, dropped = await errand.run(
                True, partial(_cut, engine, call, prompt, n_whole, policy, limits, errand.checkpoint)
            )
        translate = partial(_translated, call, messages_json=_messages_json(call, dropped))
        group = await opening.submit([prompt], id_prefix=id_prefix, endpoint=endpoint, translate=translate, form=form)
        return Opened(group, opening.options, [dropped], load_ns=opening.load_ns)

    try:
        return await with_lease(services, req, call.model, begin)
    except ContextLengthExceeded as error:
        raise error.about("messages", "the chat") from None


async def count_tokens(services: Services, req: Request, call: ChatCall) -> int:
    """How many tokens the prompt of a chat has. Refuses what the chat would be refused for; raises ModelNotFound, and
    what loading the model raises."""

    async def count(lease: Lease) -> int:
        errand, engine = services.errand(req), lease.engine
        options_of(call.body, engine.info)
        keep_alive_of(call.body)
        is_large = len(call.messages_json) > LARGE_TEXT
        pace = errand.checkpoint if is_large else None
        prompt = await errand.run(is_large, partial(_prompt, engine, call, call.messages_json, None, pace))
        lease.release()
        return len(prompt)

    return await with_lease(services, req, call.model, count)


def _prompt(
    engine: EngineClient, call: ChatCall, messages_json: bytes, most: int | None, pace: Callable[[], None] | None
) -> list[int]:
    # render_chat leaves out a BOS that the vocabulary adds by itself.
    return engine.prompt_tokens(call.render(engine, messages_json), most=most, between=pace)


def _messages_json(call: ChatCall, dropped: Dropped | None) -> bytes:
    """The messages that became the prompt."""
    return call.messages_json if dropped is None else msgspec.json.encode(without(call.messages, dropped.span))


def _whole(
    engine: EngineClient, call: ChatCall, policy: ContextPolicy, limits: PromptLimits, pace: Callable[[], None] | None
) -> tuple[list[int] | int, AnswerForm | None]:
    """The prompt of a chat, and the form of its answers. One that surely does not fit, and has many messages: how many
    tokens it has at least.

    Raises ContextLengthExceeded where the policy does not cut it.
    """
    is_cut = policy.truncates or call.body.truncate_prompt_tokens is not None
    if len(call.messages) > MANY_MESSAGES and pace is not None and call.body.truncate_prompt_tokens is None:
        n_least = _least(engine, call, pace)
        if n_least > limits.limit:
            if policy.truncates:
                return n_least, call.open(engine, msgspec.json.encode(call.messages[-1:])).form
            raise ContextLengthExceeded(
                f"the prompt has at least {n_least} tokens; one request may use {limits.n_ctx}, completion included",
                param="messages",
                n_tokens=n_least,
            )
    opened = call.open(engine, call.messages_json)
    return engine.prompt_tokens(opened.prompt, most=None if is_cut else limits.limit, between=pace), opened.form


def _least(engine: EngineClient, call: ChatCall, pace: Callable[[], None]) -> int:
    """Tokens that a chat surely has: counted block by block, less what the template puts around each.

    A template is one piece of work however long its chat is, and cannot be stopped; those of blocks can, in between.
    0 where the template does not take blocks.
    """
    try:
        asks = replace(call, ending=Ending.ASKS, ask=ChatAsk())
        around = len(_prompt(engine, asks, msgspec.json.encode(call.messages[:1]), None, pace))
        n = 0
        for at in range(0, len(call.messages), BLOCK_MESSAGES):
            pace()
            block = msgspec.json.encode(call.messages[at : at + BLOCK_MESSAGES])
            n += max(len(_prompt(engine, asks, block, None, pace)) - around, 0)
        return n
    except InvalidRequest:  # "roles must alternate", say
        return 0


def _translated(call: ChatCall, speaker: Speaker, messages_json: bytes) -> list[int]:
    """The prompt as another model takes it, to which a swap moves the request."""
    return speaker.tokenize(call.render(speaker, messages_json), add_special=True, parse_special=True)


def _cut(
    engine: EngineClient,
    call: ChatCall,
    whole: list[int],
    n_whole: int,
    policy: ContextPolicy,
    limits: PromptLimits,
    pace: Callable[[], None],
) -> tuple[list[int], Dropped | None]:
    """The prompt of the chat less what ``policy`` drops, and what that is. Raises ContextLengthExceeded."""

    def prompt_of(messages: Sequence[Message], most: int | None = None) -> list[int]:
        return _prompt(engine, call, msgspec.json.encode(messages), most, pace)

    def fits(messages: Sequence[Message]) -> bool:
        try:
            prompt_of(messages, limits.wanted)
        except ContextLengthExceeded:
            return False
        return True

    span = drop_turns(call.messages, lambda kept: len(prompt_of(kept)), policy, limits, n_whole=n_whole, fits=fits)
    if not span:
        return whole, None
    prompt = prompt_of(without(call.messages, span))
    return prompt, Dropped(policy, n_whole, len(prompt), span, is_chat=True)


def _choice(index: int, reply: Reply) -> dict[str, Any]:
    answer = reply.answer
    message = {"content": reply.text} if answer is None else answer.message()
    return {
        "index": index,
        "message": {"role": "assistant", **message, "refusal": None, "annotations": []},
        "logprobs": None,
        "finish_reason": reason_of(reply.finish, calls=answer is not None and bool(answer.calls)),
    }
