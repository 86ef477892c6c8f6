"""``GET /health``: the process answers. ``GET /ready``: every model is loaded and makes progress."""

from __future__ import annotations

import falcon.asgi
import orjson

from mullama.serving.manager import ModelManager
from mullama.serving.states import ModelState
from mullama.web.http.request import Request
from mullama.web.openapi.answer_types import Status
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access


class Health:
    access = Access.OPEN
    operations = {"GET": Operation("Whether the process answers", answer=Status)}

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        resp.data = b'{"status":"ok"}'

    on_head = on_get  # probes use it


class Ready:
    access = Access.OPEN
    operations = {"GET": Operation("Whether every model is ready", answer=Status, statuses=(200, 503))}

    def __init__(self, models: ModelManager) -> None:
        self._models = models

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """200 when ready, else 503 with Retry-After; the body says which model is not."""
        ready = self._models.ready
        if not ready:
            resp.status = 503
            resp.set_header("Retry-After", "1")
        status = "ready" if ready else "shutting down" if self._models.is_leaving else "not ready"
        states = {name: engine.is_ready() for name, engine in self._models.items()}
        states |= {one.name: False for one in self._models.all() if one.state is ModelState.FAILED}
        resp.data = orjson.dumps({"status": status, "models": states})

    on_head = on_get
