"""``/internal/kv``: the KV cache as it is now, what happens to it, and what an operator may do to it."""

from __future__ import annotations

from functools import partial

import falcon.asgi

from mullama.engine.client import EngineClient
from mullama.errors import InvalidRequest, PermissionDenied
from mullama.web.http.request import Request
from mullama.web.internal.kv_event_routes import KvEventStream
from mullama.web.internal.kv_schemas import (
    DropBody,
    Prefix,
    PrefixBody,
    PrefixPinBody,
    parse_drop,
    parse_pin,
    parse_prefix,
)
from mullama.web.internal.scheduler_routes import Internal, Policies, dump
from mullama.web.internal.views import kv_for_client
from mullama.web.openai.schemas import PolicyBody
from mullama.web.openapi.operation import MODEL, Operation, Parameter, flag
from mullama.web.security import Access
from mullama.web.services import LARGE_TEXT, Services
from mullama.web.stream.event_stream import EVENTS, start_stream

DEFAULT_NODES = 1000
MAX_NODES = 100_000
_NUMBER = {"type": "integer", "minimum": 0}


class KvView(Internal):
    operations = {"GET": Operation("Layout, cells used and by whom", parameters=(MODEL,))}

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Layout, cells used and by whom, retained prefixes. Raises ModelNotFound."""
        with self._lease(req) as (name, engine):
            found = await engine.kv.asnapshot()
            resp.data = dump(name, found if req.is_operator else kv_for_client(found, req.tenant))


class KvTree(Internal):
    access = Access.OPERATOR
    operations = {
        "GET": Operation(
            "The prefix tree",
            parameters=(
                MODEL,
                Parameter("limit", "nodes at most", {"type": "integer", "minimum": 1, "maximum": MAX_NODES}),
                flag("text", "with what the nodes hold"),
            ),
        )
    }

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """The prefix tree, at most ``?limit=`` nodes of it, with ``?text=1`` what they hold.

        Raises InvalidRequest, ModelNotFound, PermissionDenied.
        """
        with_text = req.flag("text")
        # SAFETY: texts are prompts, as in the events.
        if with_text and not req.is_operator:
            raise PermissionDenied("texts are only shown to those who may write under /internal (--admin-key)")
        with self._lease(req) as (name, engine):
            limit = _number(req.get_param("limit"), "limit", 1, MAX_NODES)
            limit = DEFAULT_NODES if limit is None else limit
            resp.data = dump(name, await engine.kv.atree(limit=limit, text=with_text))


class KvMap(Internal):
    access = Access.OPERATOR
    operations = {"GET": Operation("Which cells belong to which sequence", parameters=(MODEL,))}

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Which cells belong to which sequence. Raises ModelNotFound."""
        with self._lease(req) as (name, engine):
            resp.data = dump(name, await engine.kv.amap())


class KvPolicy(Policies):
    access = Access.OPERATOR
    kind = "an eviction policy"
    operations = {
        "GET": Operation("The eviction policy in charge", parameters=(MODEL,)),
        "PUT": Operation("Put another eviction policy in charge", body=PolicyBody, parameters=(MODEL,)),
    }

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """The eviction policy in charge and its parameters. Raises ModelNotFound."""
        with self._lease(req) as (name, engine):
            resp.data = dump(name, (await engine.kv.asnapshot())["policy"])

    async def on_put(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Put another eviction policy in charge. Raises InvalidRequest; then the one before stays."""
        with self._lease(req) as (name, engine):
            change = await self._change(req)
            resp.data = dump(name, await engine.kv.aset_policy(self._policy(change), change.params))


class KvEvents(Internal):
    operations = {
        "GET": Operation(
            "What happens to cached KV, as it happens",
            answer=EVENTS,
            parameters=(
                MODEL,
                Parameter("since", "events after this number", _NUMBER),
                Parameter("Last-Event-ID", "the same, as clients of event streams say it", _NUMBER, "header"),
                flag("tokens", "with token ids"),
            ),
        )
    }
    # SAFETY: they name everybody's requests, and tokens are prompts.
    access = Access.OPERATOR

    def __init__(self, services: Services) -> None:
        super().__init__(services.models)
        self._services = services

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Events as they happen, after ``?since=`` or ``Last-Event-ID``. Raises InvalidRequest, ModelNotFound."""
        name, engine = self._models.resolve(req.get_param("model"))
        log = engine.kv.events
        since = _number(req.get_param("since"), "since", 0)
        if since is None:
            since = _number(req.get_header("Last-Event-ID"), "Last-Event-ID", 0)
        with_tokens = req.flag("tokens")
        watchers = self._models.watchers
        stream = KvEventStream(
            log,
            since=log.last_seq if since is None else since,
            with_tokens=with_tokens,
            ping_seconds=self._services.ping_seconds,
            receive=req.receive,
            on_close=lambda: watchers.remove(follow),
        )

        def follow(model: str, engine: EngineClient | None) -> None:
            if model == name:
                stream.follow(engine.kv.events if engine is not None else None)

        watchers.append(follow)
        self._services.end_at_shutdown(stream)
        start_stream(resp, stream)


class _PrefixAction(Internal):
    """What the endpoints share that act upon the KV of a prefix."""

    def __init__(self, services: Services) -> None:
        super().__init__(services.models)
        self._services = services

    async def _tokens(self, req: Request, engine: EngineClient, prefix: Prefix) -> list[int] | None:
        """The prefix's token ids; None: none was named."""
        tokens = await self._services.offload(prefix.size > LARGE_TEXT, partial(prefix.tokens, engine), req)
        if tokens is not None and not tokens:
            raise InvalidRequest("prompt: it holds no token", param="prompt")
        return tokens

    async def _named(self, req: Request, engine: EngineClient, prefix: Prefix) -> list[int]:
        tokens = await self._tokens(req, engine, prefix)
        assert tokens is not None, "the body was accepted without a prefix"
        return tokens

    def _namespace(self, prefix: Prefix) -> str:
        """Where the KV of such a request is; with several keys the namespace says whose."""
        return prefix.namespace if prefix.namespace is not None else prefix.cache_salt or ""


class KvPin(_PrefixAction):
    operations = {"POST": Operation("Keep a prefix from eviction for a while", body=PrefixPinBody, parameters=(MODEL,))}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Keep a prefix from eviction for a while. Raises InvalidRequest, ModelNotFound."""
        with self._lease(req) as (name, engine):
            pin = await self._services.parse(req, parse_pin)
            tokens = await self._named(req, engine, pin.prefix)
            namespace = self._namespace(pin.prefix)
            resp.data = dump(name, await engine.kv.apin(tokens, ttl_s=pin.ttl_s, namespace=namespace))


class KvUnpin(_PrefixAction):
    operations = {"POST": Operation("Let a prefix be evicted again", body=PrefixBody, parameters=(MODEL,))}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Let a prefix be evicted again. Raises InvalidRequest, ModelNotFound."""
        with self._lease(req) as (name, engine):
            prefix = await self._services.parse(req, parse_prefix)
            tokens = await self._named(req, engine, prefix)
            resp.data = dump(name, await engine.kv.aunpin(tokens, namespace=self._namespace(prefix)))


class KvDrop(_PrefixAction):
    operations = {"POST": Operation("Drop a prefix, or everything", body=DropBody, parameters=(MODEL,))}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Drop a prefix, or everything; answers what was freed. Raises InvalidRequest, ModelNotFound."""
        with self._lease(req) as (name, engine):
            drop = await self._services.parse(req, parse_drop)
            prefix = drop.prefix
            tokens = await self._tokens(req, engine, prefix)
            is_all = tokens is None and prefix.cache_salt is None and prefix.namespace is None
            namespace = "" if is_all else self._namespace(prefix)
            resp.data = dump(name, await engine.kv.adrop(tokens, namespace=namespace, tiers=drop.tiers))


class KvSave(_PrefixAction):
    operations = {"POST": Operation("Write a prefix to disk", body=PrefixBody, parameters=(MODEL,))}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Write a prefix to disk. Raises InvalidRequest, ModelNotFound."""
        with self._lease(req) as (name, engine):
            prefix = await self._services.parse(req, parse_prefix)
            tokens = await self._named(req, engine, prefix)
            resp.data = dump(name, await engine.kv.asave(tokens, namespace=self._namespace(prefix)))


class KvLoad(_PrefixAction):
    operations = {"POST": Operation("Read a prefix from disk", body=PrefixBody, parameters=(MODEL,))}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Read a prefix from disk into host memory. Raises InvalidRequest, ModelNotFound."""
        with self._lease(req) as (name, engine):
            prefix = await self._services.parse(req, parse_prefix)
            tokens = await self._named(req, engine, prefix)
            resp.data = dump(name, await engine.kv.aload(tokens, namespace=self._namespace(prefix)))


def _number(text: str | None, name: str, low: int, high: int | None = None) -> int | None:
    """Raises InvalidRequest for what is no whole number of that range; None stays None."""
    if text is None:
        return None
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else -1
    if value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{name}: {text[:40]!r} is not a whole number {bounds}", param=name)
    return value
