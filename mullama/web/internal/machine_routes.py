"""``/internal/machine``: what ``mullama doctor`` tells, of the machine that this server runs on."""

from __future__ import annotations

import asyncio
from typing import Any

import falcon.asgi
import orjson

from mullama.config import ServeConfig
from mullama.installation import libraries
from mullama.machine.report import machine_report
from mullama.serving.manager import ModelManager
from mullama.serving.readiness import Findings, folder_findings, folders_of
from mullama.web.http.request import Request
from mullama.web.internal.scheduler_routes import Internal
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access


class MachineView(Internal):
    access = Access.OPERATOR  # paths, libraries, limits: nothing for a tenant
    operations = {"GET": Operation("What mullama doctor tells of this machine")}

    def __init__(self, models: ModelManager, config: ServeConfig) -> None:
        super().__init__(models)
        self._config = config

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """The same object as ``mullama doctor --json``. Whether models fit is not asked again: they are loaded."""
        resp.data = orjson.dumps(await asyncio.to_thread(self._report))

    def _report(self) -> dict[str, Any]:
        folders = folders_of(self._config)
        found = Findings(faults=libraries.faults())
        folder_findings(self._config, folders, found)
        return {**machine_report(self._config.threads, folders), "faults": found.faults, "notes": found.notes}
