"""``/internal/models``: what is loaded and who uses it; load, unload, pin, change weights."""

from __future__ import annotations

import asyncio
import re
from copy import copy
from typing import Any, ClassVar

import falcon
import falcon.asgi
import msgspec
import orjson

from mullama.config import ARBITER_POLICIES
from mullama.errors import InvalidRequest, ModelNotFound, ModelNotLoaded, NotFound
from mullama.serving.durations import DURATION_SCHEMA, parse_duration
from mullama.serving.hot_swap import SwapRecord
from mullama.serving.states import Served
from mullama.types import GapMode, KvMode, SleepLevel
from mullama.web.http.request import Receive, Request, on_disconnect
from mullama.web.internal import lora_routes
from mullama.web.internal.views import model_for_client
from mullama.web.openai.schemas import decode_body
from mullama.web.openapi.operation import Operation, flag
from mullama.web.security import Access
from mullama.web.services import Services
from mullama.web.stream.event_stream import EVENTS, PING, Silence, event_json, start_stream


class UnloadBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    force: bool = False
    timeout_s: float = 30.0

    field_schemas: ClassVar = {"timeout_s": {"minimum": 0, "maximum": 86400}}


class PinBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    keep_alive: float | str | None = None

    field_schemas: ClassVar = {"keep_alive": DURATION_SCHEMA}


class SwapBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``to``: a quantisation, a reference, or (for the admin) a path. ``kl``: measure how far it is from the old."""

    to: str
    kv: str = "auto"
    gap: str = "auto"
    kl: bool = False

    field_schemas: ClassVar = {
        "to": {"minLength": 1},
        "kv": {"enum": list(KvMode)},
        "gap": {"enum": list(GapMode)},
    }


class SleepBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``level``: host or disk; none: what --sleep-level says."""

    level: str | None = None

    field_schemas: ClassVar = {"level": {"enum": [None, *SleepLevel]}}


class ShareBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a model may expect of the cores beside others."""

    weight: float = 1.0
    priority: int = 0

    field_schemas: ClassVar = {
        "weight": {"minimum": 0.01, "maximum": 100},
        "priority": {"minimum": -(2**31), "maximum": 2**31 - 1},
    }


class ArbiterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    policy: str

    field_schemas: ClassVar = {"policy": {"enum": list(ARBITER_POLICIES)}}


_arbiter_decoder = msgspec.json.Decoder(ArbiterBody)
_decoders = {
    kind: msgspec.json.Decoder(kind)
    for kind in (UnloadBody, PinBody, SwapBody, SleepBody, ShareBody, lora_routes.AdapterBody)
}


class ModelTable:
    access = Access.INTERNAL
    operations = {"GET": Operation("Every served model: state, memory, requests")}

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Every served name: state, requests, memory, keep-alive; what ``mullama ps`` shows."""
        models = self._services.models
        rows = [_row_for(req, one, models.now()) for one in models.all()]
        resp.data = orjson.dumps(
            {
                "models": rows,
                "max_models": models.budget.max_models,
                "memory_budget": models.budget.n_bytes,
                "clients_left": self._services.n_left,
            }
        )


def _row_for(req: Request, one: Served, now: float) -> dict[str, Any]:
    row = row_of(one, now)
    return row if req.is_operator else model_for_client(row)


def row_of(one: Served, now: float) -> dict[str, Any]:
    engine = one.engine
    is_held = engine is not None or one.asleep is not None
    idle = 0.0 if one.in_use else max(now - one.last_used, 0.0)
    row: dict[str, Any] = {
        "name": one.name,
        "state": one.state.shown,
        "reference": one.reference,
        "pinned": one.pinned,
        "in_use": one.in_use,
        "requests": one.n_requests,
        "waiting_for_load": len(one.waiters),
        "idle_s": round(idle, 1) if is_held else None,
        "keep_alive_s": None if one.keep_alive_s < 0 else one.keep_alive_s,
        "expires_in_s": round(max(one.keep_alive_s - idle, 0), 1) if is_held and one.keep_alive_s >= 0 else None,
        "memory_bytes": one.memory_bytes or None,
        "asleep": None
        if one.asleep is None
        else {
            "level": one.asleep.level,
            "tokens": one.asleep.tokens,
            "host_bytes": one.asleep.host_bytes,
            "disk_bytes": one.asleep.disk_bytes,
        },
        "error": one.error,
    }
    if engine is not None:
        counters = engine.counters()
        info = engine.info
        busy = counters.get("busy_ns", 0)
        row |= {
            "weights": info.weights,
            "description": info.description,
            "size_bytes": info.size_bytes,
            "n_ctx": info.n_ctx,
            "n_parallel": info.n_parallel,
            "running": counters.get("running", 0),
            "waiting": counters.get("waiting", 0),
            "kv_tokens": counters.get("cells_used", 0),
            "tokens_per_second": round(counters.get("sampled_tokens", 0) / busy * 1e9, 1) if busy else None,
            "completion_tokens": counters.get("sampled_tokens", 0),
        }
    return row


class ModelActions:
    """``/internal/models/NAME`` and ``/internal/models/NAME/ACTION``; a name may hold slashes."""

    access = Access.INTERNAL
    operations = {
        "GET": Operation("One served model"),
        "GET /adapters": Operation("The LoRA adapters of a model"),
        "POST /adapters": Operation("Load a LoRA adapter", body=lora_routes.AdapterBody),
        "GET /adapters/{id}": Operation("One LoRA adapter"),
        "DELETE /adapters/{id}": Operation("Unload a LoRA adapter"),
        "POST /load": Operation("Load a model now"),
        "POST /unload": Operation("Unload a model", body=UnloadBody),
        "POST /sleep": Operation("An idle model gives up its weights", body=SleepBody),
        "POST /wake": Operation("Wake a model that sleeps"),
        "POST /pin": Operation("Keep a model loaded", body=PinBody),
        "POST /unpin": Operation("Let a model be unloaded"),
        "POST /share": Operation("Weight and priority beside other models", body=ShareBody),
        "POST /swap": Operation(
            "Other weights under the name",
            body=SwapBody,
            streams=EVENTS,
            parameters=(flag("wait", "false: answer at once"),),
            statuses=(200, 202),
        ),
    }

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        """One model's row, or its adapters. Raises ModelNotFound."""
        models = self._services.models
        if (named := lora_routes.split_path(name)) is not None:
            await lora_routes.show(models, *named, resp, sees_files=req.is_operator)
            return
        try:
            served = models.get(name)
        except ModelNotFound:
            self._check_method("GET", name)
            raise
        resp.data = orjson.dumps(_row_for(req, served, models.now()))

    async def on_post(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        """Carry out an action. Raises NotFound for an unknown one, ModelNotFound, and what the action raises."""
        model, _, action = name.rpartition("/")
        if model and self._below(name) == "":
            raise NotFound(f"there is no action '{action[:40]}'; there are {', '.join(ACTIONS)}")
        self._check_method("POST", name)
        if (named := lora_routes.split_path(name)) is not None:
            await self._load_adapter(req, resp, named[0])
            return
        await getattr(self, f"_{action}")(req, resp, model)

    async def on_delete(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        """Unload an adapter. Raises AdapterNotFound, AdapterBusy."""
        self._check_method("DELETE", name)
        named = lora_routes.split_path(name)
        assert named is not None
        await lora_routes.unload(self._services.models, *named, resp)

    async def on_options(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        """What the path takes."""
        resp.set_header("Allow", ", ".join([*self._methods(name), "OPTIONS"]))
        resp.set_header("Content-Length", "0")

    def takes(self, method: str, name: str) -> bool:
        return method in self._methods(name)

    def _below(self, name: str) -> str:
        """What of a path comes behind the model, as ``operations`` has it."""
        if (named := lora_routes.split_path(name)) is not None:
            return "/adapters/{id}" if named[1] else "/adapters"
        model, _, action = name.rpartition("/")
        return f"/{action}" if model and action in ACTIONS else ""

    def _check_method(self, method: str, name: str) -> None:
        """Raises HTTPMethodNotAllowed for what a path does not take."""
        if method not in (allowed := self._methods(name)):
            raise falcon.HTTPMethodNotAllowed(allowed)

    def _methods(self, name: str) -> list[str]:
        below = self._below(name)
        return [key.partition(" ")[0] for key in self.operations if key.partition(" ")[2] == below]

    async def _load_adapter(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        """The model is loaded first where it has to be, and stays while the adapter comes."""
        body: lora_routes.AdapterBody = await self._body(req, lora_routes.AdapterBody)
        lease = await self._services.lease(req, name)
        try:
            resp.data = await lora_routes.load(lease.engine, body, may_read_files=bool(self._services.config.admin_key))
        finally:
            lease.release()

    async def _body(self, req: Request, kind: type[Any]) -> Any:
        return await self._services.parse(req, lambda data: decode_body(_decoders[kind], data or b"{}"))

    async def _load(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        self._services.models.try_anew(name)
        lease = await self._services.lease(req, name)
        lease.release()
        await self.on_get(req, resp, name)

    async def _unload(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        body: UnloadBody = await self._body(req, UnloadBody)
        if not 0 <= body.timeout_s <= 86400:
            raise InvalidRequest("timeout_s: it must be 0 to 86400 seconds", param="timeout_s")
        await self._services.models.unload(name, force=body.force, timeout_s=body.timeout_s)
        await self.on_get(req, resp, name)

    async def _sleep(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        """Give up the weights of an idle model and keep its cached KV. 409 while it is in use."""
        body: SleepBody = await self._body(req, SleepBody)
        await self._services.models.sleep(name, body.level)
        await self.on_get(req, resp, name)

    async def _wake(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        """As ``load``: one that sleeps is woken."""
        await self._load(req, resp, name)

    async def _pin(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        body: PinBody = await self._body(req, PinBody)
        models = self._services.models
        served = models.get(name)
        keep_alive_s = None if body.keep_alive is None else parse_duration(body.keep_alive)
        served.pinned = True
        if keep_alive_s is not None:
            models.set_keep_alive(name, keep_alive_s)
        await self.on_get(req, resp, name)

    async def _unpin(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        self._services.models.get(name).pinned = False
        await self.on_get(req, resp, name)

    async def _share(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        body: ShareBody = await self._body(req, ShareBody)
        _, engine = self._services.models.resolve(name)
        engine.planning.set_share(weight=body.weight, priority=body.priority)
        resp.data = orjson.dumps({"model": name, "weight": body.weight, "priority": body.priority})

    async def _swap(self, req: Request, resp: falcon.asgi.Response, name: str) -> None:
        """Other weights under a name. 200 with the report when done, 202 with ``?wait=false``; progress as events."""
        body: SwapBody = await self._body(req, SwapBody)
        may_read = bool(self._services.config.admin_key)
        record = self._services.swaps.begin(name, body.to, body.kv, gap=body.gap, kl=body.kl, may_read_files=may_read)
        if "text/event-stream" in (req.get_header("Accept") or ""):
            stream = SwapStream(record, self._services.ping_seconds, req.receive)
            self._services.end_at_shutdown(stream)
            start_stream(resp, stream)
            return
        if not req.flag("wait", default=True):
            resp.status = 202
        else:
            await record.ended.wait()
            if record.error is not None:
                raise copy(record.error)  # which would keep the frames of this request, and its connection
        resp.data = orjson.dumps(record.to_dict())


#: Each is a method of ModelActions, by its name behind an underscore.
ACTIONS = tuple(
    key.removeprefix("POST /") for key in ModelActions.operations if re.fullmatch(r"POST /(?!adapters)\w+", key)
)


class SwapViews:
    access = Access.OPERATOR
    operations = {"GET": Operation("The latest swaps, newest first"), "GET one": Operation("One swap")}

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """The latest swaps, newest first."""
        history = [record.to_dict() for record in reversed(self._services.swaps.history)]
        resp.data = orjson.dumps({"swaps": history})

    async def on_get_one(self, req: Request, resp: falcon.asgi.Response, swap_id: str) -> None:
        """One swap by its id. Raises NotFound."""
        record = self._services.swaps.find_record(swap_id)
        if record is None:
            raise NotFound(f"there is no swap '{swap_id[:40]}'")
        resp.data = orjson.dumps(record.to_dict())


class SwapStream:
    """The progress of a swap as server-sent events: ``progress`` while it runs, then ``done`` or ``error``."""

    def __init__(self, record: SwapRecord, ping_seconds: float, receive: Receive) -> None:
        self._record = record
        self._silence = Silence(ping_seconds)
        self._is_over = False
        self._watcher = asyncio.ensure_future(on_disconnect(receive, self.end))

    def __aiter__(self) -> SwapStream:
        return self

    async def __anext__(self) -> bytes:
        record = self._record
        if self._is_over:
            raise StopAsyncIteration
        if not record.ended.is_set():
            if not await self._silence.broken_by(record.changed.wait()):
                return PING
            record.changed.clear()
        if self._is_over:
            raise StopAsyncIteration
        kind = {"running": "progress", "done": "done"}.get(record.state, "error")
        self._is_over = record.ended.is_set()
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), event_json(record.to_dict()))

    def end(self) -> None:
        self._is_over = True
        self._record.changed.set()

    async def close(self) -> None:
        self.end()
        self._silence.close()
        self._watcher.cancel()


class ArbiterView:
    """``/internal/arbiter``: how the engines of this process share its cores."""

    access = Access.OPERATOR
    operations = {
        "GET": Operation("How models that compute at once share the cores"),
        "PUT": Operation("Another policy for that", body=ArbiterBody),
    }

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Policy, and by model: weight, priority, turns, ms computed and waited."""
        resp.data = orjson.dumps(self._snapshot())

    async def on_put(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Another policy: round_robin, weighted, or priority. Raises InvalidRequest."""
        body = await self._services.parse(req, lambda data: decode_body(_arbiter_decoder, data))
        engines = self._services.models.items()
        if not engines:
            raise ModelNotLoaded("no model is loaded, so that nobody takes turns")
        engines[0][1].planning.set_arbiter_policy(body.policy)  # it is the same for all
        resp.data = orjson.dumps(self._snapshot())

    def _snapshot(self) -> dict[str, Any]:
        policy: str | None = None
        rows = {}
        for name, engine in self._services.models.items():
            policy, rows[name] = engine.planning.share()
        return {"policy": policy, "models": rows}
