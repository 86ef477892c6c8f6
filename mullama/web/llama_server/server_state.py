"""``GET /props`` and ``GET /slots``, as llama-server's clients read them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import falcon.asgi
import orjson

from mullama.engine.client import EngineClient
from mullama.errors import QueueFull
from mullama.installation import VERSION
from mullama.serving.manager import ModelManager
from mullama.serving.states import ModelState
from mullama.types import SamplingParams
from mullama.web.http.request import Request
from mullama.web.internal.scheduler_routes import Internal
from mullama.web.internal.views import scheduler_for_client
from mullama.web.openai.sampling import SamplingDefaults
from mullama.web.openapi.operation import MODEL, Operation, flag
from mullama.web.security import Access


class Props(Internal):
    """Properties of a model; the path of its file is an operator's."""

    access = Access.CLIENT
    operations = {"GET": Operation("Properties of a model", parameters=(MODEL,))}

    def __init__(self, models: ModelManager, sampling: SamplingDefaults) -> None:
        super().__init__(models)
        self._sampling = sampling

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """``?model=``; of a model that is loaded or asleep. Raises ModelNotFound, ModelNotLoaded."""
        with self._lease(req) as (name, engine):
            known, info = engine.vocabulary(), engine.info
            resp.data = orjson.dumps(
                {
                    "default_generation_settings": {"n_ctx": info.n_ctx, "params": self._defaults(name)},
                    "total_slots": info.n_parallel,
                    "model_alias": name,
                    **({"model_path": info.path} if req.is_operator else {}),
                    "modalities": {"vision": False, "audio": False},
                    "chat_template": known["chat_template"],
                    "bos_token": known["bos_token"],
                    "eos_token": known["eos_token"],
                    "build_info": f"mullama {VERSION}",
                    "is_sleeping": self._models.get(name).state is ModelState.ASLEEP,
                }
            )

    def _defaults(self, name: str) -> dict[str, Any]:
        """The parameters of a request that gives none, by the names that requests have."""
        return asdict(SamplingParams()) | self._sampling.of(name)


class Slots(Internal):
    """What each slot works on; a client sees its own requests, and that others are taken."""

    operations = {
        "GET": Operation(
            "What each slot works on",
            answer=list[dict[str, Any]],
            parameters=(MODEL, flag("fail_on_no_slot", "503 where all slots are taken")),
        )
    }

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """``?model=``; with ``?fail_on_no_slot=1`` 503 where all are taken. Raises ModelNotFound, ModelNotLoaded."""
        with self._lease(req) as (_, engine):
            whole = engine.planning.snapshot()
            shown = whole if req.is_operator else scheduler_for_client(whole, req.tenant)
            rows = _slots(engine, whole["running"], {row["id"] for row in shown["running"]})
        if req.flag("fail_on_no_slot") and all(row["is_processing"] for row in rows):
            raise QueueFull("every slot works on a request", retry_after=1)
        resp.data = orjson.dumps(rows)


def _slots(engine: EngineClient, running: list[dict[str, Any]], shown: set[str]) -> list[dict[str, Any]]:
    by_slot = {row["slot"]: row for row in running}
    rows = []
    for slot in range(engine.info.n_parallel):
        one = by_slot.get(slot)
        row: dict[str, Any] = {"id": slot, "n_ctx": engine.info.n_ctx, "speculative": False}
        row["is_processing"] = one is not None
        if one is not None and one["id"] in shown:
            row |= {
                "id_task": one["id"],
                "n_prompt_tokens": one["prompt_tokens"],
                "n_prompt_tokens_processed": one["prompt_tokens_done"],
                "n_prompt_tokens_cache": one["kv_cache_hit"],
                "next_token": [
                    {"has_next_token": True, "n_remain": one["tokens_left"], "n_decoded": one["completion_tokens"]}
                ],
            }
        rows.append(row)
    return rows
