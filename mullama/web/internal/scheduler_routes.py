"""``/internal``: the engine's decisions, as they are now. ``?model=`` picks a served model. (KV: ``kv_routes.py``.)"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import falcon.asgi
import orjson

from mullama.config import ServeConfig
from mullama.engine.client import EngineClient
from mullama.errors import InvalidRequest, PermissionDenied
from mullama.kv.eviction.registry import names_code
from mullama.serving.manager import ModelManager
from mullama.web.http.request import Request, read_body
from mullama.web.internal.views import scheduler_for_client
from mullama.web.openai.schemas import ParamsBody, PolicyBody, SchedulerChange, parse_scheduler_change
from mullama.web.openapi.operation import MODEL, Operation
from mullama.web.security import Access


class Internal:
    """What the resources under /internal share."""

    access = Access.INTERNAL

    def __init__(self, models: ModelManager) -> None:
        self._models = models

    @contextlib.contextmanager
    def _lease(self, req: Request) -> Iterator[tuple[str, EngineClient]]:
        """The engine that is asked about, which stays until this is done. Raises ModelNotFound, ModelNotLoaded."""
        with self._models.borrow(req.get_param("model")) as lease:
            yield lease.name, lease.engine


class Policies(Internal):
    """What the endpoints that name a policy share."""

    kind = "a policy (mullama schedulers lists them)"

    def __init__(self, models: ModelManager, config: ServeConfig) -> None:
        super().__init__(models)
        self._may_load_files = bool(config.admin_key)
        self._max_body = config.max_body_bytes

    async def _change(self, req: Request) -> SchedulerChange:
        return parse_scheduler_change(await read_body(req, self._max_body))

    def _policy(self, change: SchedulerChange) -> str:
        if not change.policy:
            raise InvalidRequest(f"policy: the name of {self.kind} is missing", param="policy")
        # SAFETY: a file's class is code of whoever names it, so that takes the admin key and not just loopback.
        self._check_code(change)
        return change.policy

    def _check_code(self, change: SchedulerChange) -> None:
        """Raises PermissionDenied for a policy, or a parameter of one, that names code. No --admin-key, no code."""
        if not self._may_load_files and names_code(change.policy or "", change.params):
            raise PermissionDenied("code from a file or a module can only be named when --admin-key is set")


class SchedulerView(Policies):
    operations = {
        "GET": Operation("Policy, waiting and running sequences, counters", parameters=(MODEL,)),
        "PUT": Operation("Put another policy in charge", body=PolicyBody, parameters=(MODEL,)),
        "PATCH": Operation("Change parameters of the policy in charge", body=ParamsBody, parameters=(MODEL,)),
    }

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Policy, parameters, waiting and running sequences, step counters. Raises ModelNotFound."""
        with self._lease(req) as (name, engine):
            found = engine.planning.snapshot()
            resp.data = dump(name, found if req.is_operator else scheduler_for_client(found, req.tenant))

    async def on_put(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Put another policy in charge from the next step on. Raises InvalidRequest; then the running one stays."""
        with self._lease(req) as (name, engine):
            change = await self._change(req)
            resp.data = dump(name, await engine.planning.aset_policy(self._policy(change), change.params))

    async def on_patch(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Change parameters of the policy in charge. Raises InvalidRequest; then nothing is changed."""
        with self._lease(req) as (name, engine):
            change = await self._change(req)
            if change.policy is not None:
                raise InvalidRequest("policy: PATCH changes parameters; use PUT to change the policy", param="policy")
            self._check_code(change)
            resp.data = dump(name, await engine.planning.aconfigure(change.params))


class ShadowScheduler(Policies):
    operations = {
        "PUT": Operation("Run a policy as a shadow", body=PolicyBody, parameters=(MODEL,)),
        "DELETE": Operation("Run no shadow any more", parameters=(MODEL,)),
    }

    async def on_put(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Run a policy as a shadow instead of the one before. Raises InvalidRequest; then nothing changes."""
        with self._lease(req) as (name, engine):
            change = await self._change(req)
            await engine.planning.aset_shadow(self._policy(change), change.params)
            resp.data = dump(name, {"shadow": change.policy})

    async def on_delete(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Run no shadow any more."""
        with self._lease(req) as (name, engine):
            await engine.planning.aset_shadow(None)
            resp.data = dump(name, {"shadow": None})


def dump(model: str, snapshot: dict[str, Any]) -> bytes:
    return orjson.dumps({"model": model, **snapshot}, default=str, option=orjson.OPT_NON_STR_KEYS)
