"""``/internal/memory``: what the process takes, and which model and request takes how much of it."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import falcon.asgi
import orjson

from mullama.errors import EngineDead
from mullama.observe import process_memory
from mullama.web.http.request import Request
from mullama.web.internal.scheduler_routes import Internal
from mullama.web.openapi.operation import MODEL, Operation
from mullama.web.security import Access

MAX_FILES = 20


class MemoryView(Internal):
    access = Access.OPERATOR
    operations = {"GET": Operation("What models and requests take of the memory", parameters=(MODEL,))}

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """All loaded and sleeping models, or the one of ``?model=``. Raises ModelNotFound, ModelNotLoaded."""
        named = req.get_param("model")
        chosen = [self._models.resolve(named)] if named else [*self._models.items(), *self._models.served.asleep()]
        models: dict[str, dict[str, Any]] = {}
        for name, engine in chosen:
            try:
                models[name] = await engine.memory_report()
            except EngineDead:
                if named:
                    raise  # else it was unloaded while the others were asked
        resp.data = orjson.dumps(await asyncio.to_thread(self._report, models, bool(named)))

    def _report(self, models: dict[str, dict[str, Any]], is_part: bool) -> dict[str, Any]:
        process = process_memory.process_memory()
        # Pages of files that are no weights: programs and libraries, the instrumentation pages.
        mapped = sum(one["weights"]["mapped_bytes"] for one in models.values())
        of_models = sum(one["resident_bytes"] for one in models.values())
        libraries = max(process.file - mapped, 0) if process is not None else 0
        total = of_models if process is None or is_part else of_models + libraries + process_memory.baseline()
        return {
            "total_bytes": total,
            # One model's share says nothing of the rest.
            "unaccounted_bytes": None if process is None or is_part else process.rss - total,
            "process": None
            if process is None
            else {
                "rss_bytes": process.rss,
                "pss_bytes": process.pss,
                "anonymous_bytes": process.anonymous,
                "file_bytes": process.file,
                "swapped_bytes": process.swapped,
                "baseline_bytes": process_memory.baseline(),
                "libraries_bytes": None if is_part else libraries,
                "heap_free_bytes": process_memory.heap_free(),
                "mappings": [
                    {"file": one.file, "rss_bytes": one.rss, "pss_bytes": one.pss}
                    for one in (process_memory.mapped_files() or [])[:MAX_FILES]
                ],
            },
            "models": models,
            "devices": _devices(),
        }


def _devices() -> list[dict[str, Any]]:
    """Free and total memory by device; empty when no engine with compiled code runs in this process."""
    core = sys.modules.get("mullama._core")
    if core is None:
        return []
    keys = {"name": "name", "type": "type", "memory_free": "free_bytes", "memory_total": "total_bytes"}
    return [{to: device.get(of) for of, to in keys.items()} for device in core.devices()]
