"""LoRA adapters over HTTP: what a request names, and ``/internal/models/NAME/adapters``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import falcon.asgi
import msgspec
import orjson

from mullama.engine.client import EngineClient
from mullama.errors import AdapterNotFound, ModelNotFound, no_adapter
from mullama.serving.lora_files import find_adapter
from mullama.serving.manager import ModelManager
from mullama.types import LoraUse
from mullama.web.internal.views import adapter_for_client

SEPARATOR = "+"  # between a model and its adapters in a name
MAX_NAMED = 16


class LoraBody(msgspec.Struct):
    """An entry of a request's ``lora``."""

    id: str
    scale: float | None = None


class AdapterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A file to load, by ``path`` or by ``reference``."""

    path: str | None = None
    reference: str | None = None
    id: str | None = None
    scale: float = 1.0

    object_schema: ClassVar = {
        "oneOf": [{"properties": {name: {"type": "string"}}, "required": [name]} for name in ("path", "reference")]
    }


# -- requests


def split_name(name: str | None, models: ModelManager) -> tuple[str, tuple[str, ...]]:
    """``base+adapter+…`` as the served name and the adapters' ids. A served name that has a plus is itself first.

    Raises ModelNotFound, InvalidRequest where a request must name its model.
    """
    if name is None or SEPARATOR not in name:
        return models.asked(name).name, ()
    parts = name.split(SEPARATOR, MAX_NAMED + 1)
    for n in range(len(parts), 0, -1):
        with contextlib.suppress(ModelNotFound):
            return models.get(SEPARATOR.join(parts[:n])).name, tuple(parts[n:])
    return models.asked(name).name, ()


def uses_of(ids: Sequence[str], lora: Sequence[LoraBody] | None) -> tuple[LoraUse, ...]:
    """What the name and the field ``lora`` of a request ask for together. Raises InvalidRequest."""
    if not ids and not lora:
        return ()
    return (*(LoraUse(one) for one in ids), *(LoraUse(one.id, one.scale) for one in lora or ()))


def check_named(model: str, ids: Sequence[str], engine: EngineClient) -> tuple[str, ...]:
    """The adapters that the name of a model asks for, in any case, as they are called. Raises ModelNotFound."""
    if not ids:
        return ()
    loaded = [one["id"] for one in engine.weights.loras()]
    in_any_case = {one.lower(): one for one in loaded}
    found = []
    for one in ids:
        if one in loaded:
            found.append(one)
        elif one.lower() in in_any_case:
            found.append(in_any_case[one.lower()])
        else:
            raise ModelNotFound(
                f"the model '{model}' has no adapter '{one[:80]}'; loaded adapters: {', '.join(loaded) or 'none'}",
                param="model",
            )
    return tuple(found)


# -- administration


def split_path(path: str) -> tuple[str, str] | None:
    """(model, adapter or empty) of ``NAME/adapters`` and ``NAME/adapters/ID``; None for another path."""
    model, separator, adapter = path.rpartition("/adapters/")
    if separator and model and "/" not in adapter:
        return model, adapter
    return (path.removesuffix("/adapters"), "") if path.endswith("/adapters") and path != "/adapters" else None


async def show(models: ModelManager, model: str, adapter: str, resp: falcon.asgi.Response, *, sees_files: bool) -> None:
    """All adapters of a loaded model, or one. Raises ModelNotFound, ModelNotLoaded, AdapterNotFound."""
    name, engine = models.resolve(model)
    found = engine.weights.loras() if sees_files else [adapter_for_client(one) for one in engine.weights.loras()]
    if adapter:
        resp.data = orjson.dumps(_one(adapter, found))
    else:
        resp.data = orjson.dumps({"model": name, "adapters": found})


def _one(adapter: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    for one in found:
        if one["id"] == adapter:
            return one
    raise AdapterNotFound(no_adapter(adapter, [one["id"] for one in found]), param="id")


async def load(engine: EngineClient, body: AdapterBody, *, may_read_files: bool) -> bytes:
    """Find, check and load a file. Raises what ``find_adapter`` and ``WeightsClient.load_lora`` raise."""
    path = await asyncio.to_thread(partial(find_adapter, body.path, body.reference, may_read_files=may_read_files))
    return orjson.dumps(await asyncio.to_thread(engine.weights.load_lora, path, body.id, body.scale))


async def unload(models: ModelManager, model: str, adapter: str, resp: falcon.asgi.Response) -> None:
    """Free one; the answer lists those that stay. Raises what ``WeightsClient.unload_lora`` raises."""
    lease = models.borrow(model)
    try:
        await asyncio.to_thread(lease.engine.weights.unload_lora, adapter)
        resp.data = orjson.dumps({"model": lease.name, "adapters": lease.engine.weights.loras()})
    finally:
        lease.release()
