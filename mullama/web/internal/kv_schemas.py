"""The bodies under ``/internal/kv``. Unlike those of ``/v1`` they refuse unknown fields: a misspelt ``prompt`` must not
become a request to drop everything. Every ``parse_*`` may run in a thread and raises InvalidRequest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from mullama.engine.client import EngineClient
from mullama.errors import InvalidRequest
from mullama.kv.events import KvTier
from mullama.web.openai.sampling import TOKEN_IDS_SCHEMA, check_tokens
from mullama.web.openai.schemas import MAX_SALT, Message, decode_body, normalise, salt_text

DEFAULT_TTL_S = 3600.0
MAX_TTL_S = 30 * 86400.0
MAX_NAMESPACE = 512  # characters


def _given(name: str) -> dict[str, Any]:
    """JSON Schema of an object that has this field."""
    return {"properties": {name: {"not": {"type": "null"}}}, "required": [name]}


class PrefixBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which prefix is meant. None (also JSON's null) is the same as leaving a field out."""

    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    cache_salt: str | None = None
    namespace: str | None = None

    field_schemas: ClassVar[dict[str, Any]] = {
        "prompt": {
            "anyOf": [
                {"type": "null"},
                {"type": "string", "minLength": 1},
                TOKEN_IDS_SCHEMA,
            ]
        },
        "messages": {"minItems": 1},
        "cache_salt": {"minLength": 1, "maxLength": MAX_SALT},
        "namespace": {"minLength": 1, "maxLength": MAX_NAMESPACE},
    }
    object_schema: ClassVar[dict[str, Any]] = {
        "oneOf": [_given("prompt"), _given("messages")],
        "not": {"allOf": [_given("cache_salt"), _given("namespace")]},
    }


class PrefixPinBody(PrefixBody, kw_only=True):
    ttl_s: float | None = None

    field_schemas: ClassVar = PrefixBody.field_schemas | {"ttl_s": {"exclusiveMinimum": 0, "maximum": MAX_TTL_S}}


class DropBody(PrefixBody, kw_only=True):
    tiers: list[str] | None = None

    field_schemas: ClassVar = PrefixBody.field_schemas | {"tiers": {"items": {"enum": list(KvTier)}, "minItems": 1}}
    object_schema: ClassVar = {
        "not": {
            "anyOf": [
                {"allOf": [_given("prompt"), _given("messages")]},
                {"allOf": [_given("cache_salt"), _given("namespace")]},
            ]
        }
    }


@dataclass(slots=True, frozen=True)
class Prefix:
    """A prefix of prompts, checked but for its token ids. Of the first two at most one is set, as of the last two."""

    prompt: str | list[int] | None
    messages_json: bytes | None
    cache_salt: str | None
    namespace: str | None  # the whole of it, as the engine knows it

    @property
    def size(self) -> int:
        """Characters or tokens."""
        return len(self.prompt if self.prompt is not None else self.messages_json or b"")

    def tokens(self, engine: EngineClient) -> list[int] | None:
        """Its token ids; None: no prefix was named. Raises InvalidRequest. Takes as long as tokenising does."""
        if self.messages_json is not None:
            text = engine.render_chat(self.messages_json, add_generation_prompt=False)
        elif isinstance(self.prompt, str):
            text = self.prompt
        else:
            if self.prompt is not None:
                check_tokens(self.prompt, "prompt", engine.info)
            return self.prompt
        return engine.tokenize(text, add_special=True, parse_special=True)


@dataclass(slots=True, frozen=True)
class Pin:
    prefix: Prefix
    ttl_s: float


@dataclass(slots=True, frozen=True)
class Drop:
    prefix: Prefix
    tiers: tuple[str, ...]


_prefix_decoder = msgspec.json.Decoder(PrefixBody)
_pin_decoder = msgspec.json.Decoder(PrefixPinBody)
_drop_decoder = msgspec.json.Decoder(DropBody)


def parse_prefix(data: bytes) -> Prefix:
    return _named(decode_body(_prefix_decoder, data))


def parse_pin(data: bytes) -> Pin:
    body = decode_body(_pin_decoder, data)
    ttl_s = DEFAULT_TTL_S if body.ttl_s is None else body.ttl_s
    if not 0 < ttl_s <= MAX_TTL_S:
        message = f"ttl_s: {ttl_s} is out of range; it must be greater than 0 and at most {MAX_TTL_S:g}"
        raise InvalidRequest(message, param="ttl_s")
    return Pin(_named(body), ttl_s)


def parse_drop(data: bytes) -> Drop:
    """An empty body is an empty object here."""
    body = decode_body(_drop_decoder, data if data.strip() else b"{}")
    tiers = body.tiers
    if tiers is not None and not (tiers and set(tiers) <= set(KvTier)):
        raise InvalidRequest(f"tiers: it must be a list of some of {', '.join(KvTier)}", param="tiers")
    return Drop(_prefix(body), tuple(tiers or ()))


def _named(body: PrefixBody) -> Prefix:
    if body.prompt is None and body.messages is None:
        raise InvalidRequest("prompt: it is missing; give a text, token ids, or messages", param="prompt")
    return _prefix(body)


def _prefix(body: PrefixBody) -> Prefix:
    if body.prompt is not None and body.messages is not None:
        raise InvalidRequest("messages: give either a prompt or messages", param="messages")
    if body.cache_salt is not None and body.namespace is not None:
        raise InvalidRequest("namespace: give either a cache_salt or a namespace", param="namespace")
    if body.prompt is not None and not body.prompt:
        raise InvalidRequest("prompt: it is empty", param="prompt")
    return Prefix(
        body.prompt,
        None if body.messages is None else msgspec.json.encode(normalise(body.messages)),
        salt_text("cache_salt", body.cache_salt, MAX_SALT),
        salt_text("namespace", body.namespace, MAX_NAMESPACE),
    )
