"""``/internal``: the engine's decisions and its KV cache, as they are now. ``?model=`` picks a served model."""

from __future__ import annotations

from typing import Any

import falcon.asgi
import orjson

from mullama.engine.client import EngineClient
from mullama.web.models import Models
from mullama.web.request import Request
from mullama.web.security import Access


class _Internal:
    access = Access.INTERNAL

    def __init__(self, models: Models) -> None:
        self._models = models

    def _engine(self, req: Request) -> tuple[str, EngineClient]:
        return self._models.resolve(req.get_param("model"))


class SchedulerView(_Internal):
    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Policy, parameters, waiting and running sequences, step counters. Raises ModelNotFound."""
        name, engine = self._engine(req)
        resp.data = _dump(name, engine.scheduler_snapshot())


class KvView(_Internal):
    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Layout, cells used and by whom, retained prefixes. Raises ModelNotFound."""
        name, engine = self._engine(req)
        resp.data = _dump(name, await engine.kv_snapshot())


class KvDrop(_Internal):
    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Drop every retained prefix; answers the number of cells freed. Raises ModelNotFound."""
        name, engine = self._engine(req)
        resp.data = _dump(name, {"cells_freed": await engine.drop_retained()})


def _dump(model: str, snapshot: dict[str, Any]) -> bytes:
    return orjson.dumps({"model": model, **snapshot}, default=str, option=orjson.OPT_NON_STR_KEYS)
