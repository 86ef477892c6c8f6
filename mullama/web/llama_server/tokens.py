"""Tokens and templates, as clients of llama-server, vLLM and lm-eval ask for them.

``POST /tokenize``, ``/detokenize``, ``/apply-template``; ``GET /tokenizer_info``. One answer has the members of both
makers: ``content`` is llama-server's word for what vLLM calls ``prompt``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import falcon.asgi
import msgspec
import orjson

from mullama.engine.client import EngineClient
from mullama.errors import InvalidRequest
from mullama.serving.states import Lease
from mullama.web.chat.functions import ToolBody
from mullama.web.http.request import Request
from mullama.web.openai.sampling import TOKEN_ID_SCHEMA, check_tokens
from mullama.web.openai.schemas import ChatBody, ChatCall, Message, chat_call, decode_body, unbuilt
from mullama.web.openapi.answer_types import PromptText, Tokens, TokensText
from mullama.web.openapi.operation import MODEL, Operation, unbuilt_schemas
from mullama.web.security import Access
from mullama.web.services import LARGE_TEXT, Services

T = TypeVar("T")
#: To be called between two pieces of work in a thread; None on the event loop.
Pace = Callable[[], None] | None

MAX_PARTS = 4096  # of a ``content`` that is a list
LARGE_TOKENS = 500  # token ids above which the text of them is made in the pool


_UNBUILT = {
    "chat_template": "templates in requests",
}
_UNBUILT_SCHEMAS = unbuilt_schemas(_UNBUILT)


class TokenizeBody(msgspec.Struct, kw_only=True):
    """``content`` (llama-server), or ``prompt`` or ``messages`` (vLLM). None leaves a maker's default in place."""

    model: str | None = None
    content: str | list[str | int] | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    tools: list[ToolBody] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    field_schemas: ClassVar = {
        **_UNBUILT_SCHEMAS,
        "messages": {"minItems": 1},
        "content": {
            "anyOf": [
                {"type": ["string", "null"]},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, TOKEN_ID_SCHEMA]}, "maxItems": MAX_PARTS},
            ]
        },
    }
    object_schema: ClassVar = {
        "oneOf": [
            {"properties": {name: {"not": {"type": "null"}}}, "required": [name]}
            for name in ("content", "prompt", "messages")
        ]
    }


class DetokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[int] | None = None

    field_schemas: ClassVar = {"tokens": {"items": TOKEN_ID_SCHEMA}}
    required_fields: ClassVar = ("tokens",)


class TemplateBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool | None = None
    tools: list[ToolBody] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    field_schemas: ClassVar = {**_UNBUILT_SCHEMAS, "messages": {"minItems": 1}}
    required_fields: ClassVar = ("messages",)


_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)
_template_decoder = msgspec.json.Decoder(TemplateBody)


class _Route:
    access = Access.CLIENT

    def __init__(self, services: Services) -> None:
        self._services = services

    async def _with_model(
        self, req: Request, name: str | None, size: int, limit: int, work: Callable[[Pace, Lease], T]
    ) -> T:
        """``work`` with the model, in the pool where ``size`` is above ``limit``. Raises ModelNotFound."""
        services = self._services
        lease = await services.lease(req, services.models.get(name).name)
        try:
            errand = services.errand(req)
            is_large = size > limit
            return await errand.run(is_large, partial(work, errand.checkpoint if is_large else None, lease))
        finally:
            lease.release()


class Tokenize(_Route):
    operations = {"POST": Operation("The tokens of a text or a chat", body=TokenizeBody, answer=Tokens)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """The tokens of a text or a chat. Raises InvalidRequest, ModelNotFound, PayloadTooLarge."""
        body = await self._services.parse(req, _parse_tokenize)
        call = None if body.messages is None else _chat_of(body, self._services)
        text = body.content if body.content is not None else body.prompt
        size = len(call.messages_json) if call is not None else 0
        size += sum(map(_size, text)) if isinstance(text, list) else len(text or "")
        resp.data = await self._with_model(req, body.model, size, LARGE_TEXT, partial(_tokenized, body, call))


class Detokenize(_Route):
    operations = {"POST": Operation("The text of tokens", body=DetokenizeBody, answer=TokensText)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """The text of tokens, control tokens spelled out. Raises InvalidRequest, ModelNotFound, PayloadTooLarge."""
        body = await self._services.parse(req, partial(decode_body, _detokenize_decoder))
        if body.tokens is None:
            raise InvalidRequest("tokens: it is missing; it must be a list of token ids", param="tokens")
        tokens = body.tokens

        def work(_: Pace, lease: Lease) -> bytes:
            check_tokens(tokens, "tokens", lease.engine.info)
            text = lease.engine.detokenize(tokens, special=True)
            return orjson.dumps({"content": text, "prompt": text})

        resp.data = await self._with_model(req, body.model, len(tokens), LARGE_TOKENS, work)


class ApplyTemplate(_Route):
    operations = {"POST": Operation("The prompt that a chat becomes", body=TemplateBody, answer=PromptText)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """The prompt of a chat as text. Raises InvalidRequest, ModelNotFound, PayloadTooLarge."""
        body = await self._services.parse(req, partial(decode_body, _template_decoder))
        _refuse_unbuilt(body)
        call = _chat_of(body, self._services)

        def work(_: Pace, lease: Lease) -> bytes:
            return orjson.dumps({"prompt": str(call.render(lease.engine, call.messages_json))})

        resp.data = await self._with_model(req, body.model, len(call.messages_json), LARGE_TEXT, work)


class TokenizerInfo(_Route):
    operations = {"GET": Operation("Special tokens, template and sizes of a vocabulary", parameters=(MODEL,))}

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """What a client's own tokenizer would know: special tokens, the template. ``?model=``. Raises ModelNotFound."""

        def work(_: Pace, lease: Lease) -> bytes:
            known, info = lease.engine.vocabulary(), lease.engine.info
            return orjson.dumps({**known, "model_max_length": info.n_ctx, "vocab_size": info.n_vocab})

        resp.data = await self._with_model(req, req.get_param("model"), 0, 0, work)


def _parse_tokenize(data: bytes) -> TokenizeBody:
    body = decode_body(_tokenize_decoder, data)
    _refuse_unbuilt(body)
    given = [name for name in ("content", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        wrong = "none of them is there" if not given else f"{' and '.join(given)} are both there"
        raise InvalidRequest(f"content, prompt or messages: {wrong}; give one", param=given[0] if given else "content")
    if isinstance(body.content, list) and len(body.content) > MAX_PARTS:
        raise InvalidRequest(f"content: a list may have at most {MAX_PARTS} parts", param="content")
    return body


def _refuse_unbuilt(body: TokenizeBody | TemplateBody) -> None:
    for name, what in _UNBUILT.items():
        if getattr(body, name):
            raise unbuilt(name, what)


def _chat_of(body: TokenizeBody | TemplateBody, services: Services) -> ChatCall:
    """The chat of which there will be no generation. Raises InvalidRequest, ModelNotFound."""
    same = ("model", "messages", "add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs")
    return chat_call(ChatBody(**{name: getattr(body, name) for name in same}), services.models)


def _tokenized(body: TokenizeBody, call: ChatCall | None, pace: Pace, lease: Lease) -> bytes:
    engine = lease.engine
    tokens = _tokens(engine, body, call, pace)
    answer: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": engine.info.n_ctx}
    if body.with_pieces or body.return_token_strs:
        pieces = engine.pieces(tokens)
        if body.with_pieces:
            answer["tokens"] = [
                {"id": token, "piece": _text_or_bytes(piece)} for token, piece in zip(tokens, pieces, strict=True)
            ]
        if body.return_token_strs:
            answer["token_strs"] = [piece.decode("utf-8", "replace") for piece in pieces]
    return orjson.dumps(answer)


def _tokens(engine: EngineClient, body: TokenizeBody, call: ChatCall | None, pace: Pace) -> list[int]:
    if call is not None:
        # As a chat gets it: the template leaves out a BOS that the vocabulary adds by itself.
        text = call.render(engine, call.messages_json)
        special = _first(body.add_special, body.add_special_tokens, True)
        return engine.prompt_tokens(text, add_special=special, between=pace)
    is_llama = body.content is not None
    special = _first(body.add_special, body.add_special_tokens, not is_llama)
    parse = _first(body.parse_special, None, True)
    if isinstance(body.content, list):
        return _joined(engine, body.content, special, parse, pace)
    text = body.content or body.prompt or ""
    return engine.prompt_tokens(text, add_special=special, parse_special=parse, between=pace)


def _joined(engine: EngineClient, parts: Sequence[str | int], special: bool, parse: bool, pace: Pace) -> list[int]:
    """Texts and token ids in turns; only a text at the beginning gets the special tokens in front."""
    found: list[int] = []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            check_tokens([part], f"content[{i}]", engine.info)
            found.append(part)
        else:
            found += engine.prompt_tokens(part, add_special=special and i == 0, parse_special=parse, between=pace)
    return found


def _first(one: bool | None, other: bool | None, default: bool) -> bool:
    return one if one is not None else other if other is not None else default


def _text_or_bytes(piece: bytes) -> str | list[int]:
    """A part of a character is no text: its bytes, as llama-server gives them."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _size(part: str | int) -> int:
    return len(part) if isinstance(part, str) else 1
