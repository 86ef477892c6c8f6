"""``GET /v1/models`` and ``/v1/models/{id}``."""

from __future__ import annotations

from typing import Any

import falcon.asgi
import orjson

from mullama.serving.manager import ModelManager
from mullama.serving.states import Served
from mullama.web.http.request import Request
from mullama.web.internal.lora_routes import SEPARATOR, check_named, split_name
from mullama.web.openapi.answer_types import ModelObject, ModelObjects
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access
from mullama.web.services import Services


class ModelList:
    access = Access.CLIENT
    operations = {"GET": Operation("The served models", answer=ModelObjects)}

    def __init__(self, models: ModelManager, services: Services) -> None:
        self._models = models
        self._services = services

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Served names first, loaded or not, then what the store has besides."""
        data = [
            entry
            for served in self._models.all()
            for entry in (describe(served), *self._aliased(served), *with_adapters(served))
        ]
        others = await self._services.offload(True, self._models.others) if self._models.has_others else []
        data += [_unloaded(name, "unloaded") for name, _ in others]
        resp.data = orjson.dumps({"object": "list", "data": data})

    on_head = on_get  # probes use it

    def _aliased(self, served: Served) -> list[dict[str, Any]]:
        """An entry for each further name, for clients that look for theirs; ``root`` is the served one."""
        return [
            {**describe(served), "id": alias, "root": served.name} for alias in self._models.names.of_model(served.name)
        ]


class ModelDetail:
    access = Access.CLIENT
    operations = {"GET": Operation("One model", answer=ModelObject)}

    def __init__(self, models: ModelManager) -> None:
        self._models = models

    async def on_get(self, req: Request, resp: falcon.asgi.Response, model_id: str) -> None:
        """Raises ModelNotFound."""
        name, named = split_name(model_id, self._models)
        served = self._models.get(name)
        if not named:
            resp.data = orjson.dumps(describe(served))
            return
        _, engine = self._models.resolve(name)
        named = check_named(name, named, engine)
        resp.data = orjson.dumps({**describe(served), "id": SEPARATOR.join((name, *named)), "parent": name})


def describe(served: Served) -> dict[str, Any]:
    """OpenAI's model object; ``max_model_len`` as vLLM has it, ``meta`` as llama-server has it.

    Of a model that is not loaded there is its name and state.
    """
    engine = served.engine
    if engine is None:
        return _unloaded(served.name, served.state.shown)
    info = engine.info
    return {
        "id": served.name,
        "object": "model",
        "created": info.created,
        "owned_by": "mullama",
        "state": served.state.shown,
        "kind": info.kind,
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
            **({"n_out": info.n_out, "pooling": info.pooling} if info.pooling is not None else {}),
        },
    }


def with_adapters(served: Served) -> list[dict[str, Any]]:
    """The model with each of its LoRA adapters, by the name that a request gives; ``parent`` is the model alone."""
    if served.engine is None:
        return []
    return [
        {**describe(served), "id": f"{served.name}{SEPARATOR}{one['id']}", "parent": served.name}
        for one in served.engine.weights.loras()
    ]


def _unloaded(name: str, state: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mullama", "state": state, "meta": None}
