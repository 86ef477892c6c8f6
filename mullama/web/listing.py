"""``GET /v1/models`` and ``/v1/models/{id}``."""

from __future__ import annotations

from typing import Any

import falcon.asgi
import orjson

from mullama.types import ModelInfo
from mullama.web.models import Models
from mullama.web.request import Request
from mullama.web.security import Access


class ModelList:
    access = Access.CLIENT

    def __init__(self, models: Models) -> None:
        self._models = models

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        data = [describe(name, engine.info) for name, engine in self._models.items()]
        resp.data = orjson.dumps({"object": "list", "data": data})


class ModelDetail:
    access = Access.CLIENT

    def __init__(self, models: Models) -> None:
        self._models = models

    async def on_get(self, req: Request, resp: falcon.asgi.Response, model_id: str) -> None:
        """Raises ModelNotFound."""
        name, engine = self._models.resolve(model_id)
        resp.data = orjson.dumps(describe(name, engine.info))


def describe(name: str, info: ModelInfo) -> dict[str, Any]:
    """OpenAI's model object; ``max_model_len`` as vLLM has it, ``meta`` as llama-server has it."""
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "mullama",
        "max_model_len": info.n_ctx,
        "meta": {
            "description": info.description,
            "architecture": info.architecture,
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
