"""``GET /v1/models`` and ``/v1/models/{id}``."""

from __future__ import annotations

from typing import Any

import falcon.asgi
import orjson

from mullama.serving.manager import ModelManager
from mullama.serving.states import Served
from mullama.web.request import Request
from mullama.web.security import Access
from mullama.web.services import Services


class ModelList:
    access = Access.CLIENT

    def __init__(self, models: ModelManager, services: Services) -> None:
        self._models = models
        self._services = services

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Served names first, loaded or not, then what the store has besides."""
        data = [describe(served) for served in self._models.all()]
        others = await self._services.offload(True, self._models.others) if self._models.has_others else []
        data += [_unloaded(name, "unloaded") for name, _ in others]
        resp.data = orjson.dumps({"object": "list", "data": data})


class ModelDetail:
    access = Access.CLIENT

    def __init__(self, models: ModelManager) -> None:
        self._models = models

    async def on_get(self, req: Request, resp: falcon.asgi.Response, model_id: str) -> None:
        """Raises ModelNotFound."""
        resp.data = orjson.dumps(describe(self._models.get(model_id)))


def describe(served: Served) -> dict[str, Any]:
    """OpenAI's model object; ``max_model_len`` as vLLM has it, ``meta`` as llama-server has it.

    Of a model that is not loaded there is its name and state.
    """
    engine = served.engine
    if engine is None:
        return _unloaded(served.name, served.state)
    info = engine.info
    return {
        "id": served.name,
        "object": "model",
        "created": info.created,
        "owned_by": "mullama",
        "state": served.state,
        "max_model_len": info.n_ctx,
        "meta": {
            "description": info.description,
            "architecture": info.architecture,
            "weights": info.weights,
            "n_params": info.n_params,
            "size": info.size_bytes,
            "n_vocab": info.n_vocab,
            "n_ctx": info.n_ctx,
            "n_ctx_train": info.n_ctx_train,
            "n_parallel": info.n_parallel,
            "n_embd": info.n_embd,
            "n_layer": info.n_layer,
            "has_chat_template": info.has_chat_template,
        },
    }


def _unloaded(name: str, state: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mullama", "state": state, "meta": None}
