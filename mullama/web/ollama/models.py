"""Models in Ollama's words: ``GET /api/tags, ps, version``; ``POST /api/show, pull, copy``; ``DELETE /api/delete``.

``push``, ``create`` and the embeddings are refused in so many words.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar

import falcon
import falcon.asgi
import msgspec
import orjson

from mullama.engine.client import EngineClient
from mullama.errors import InvalidRequest, ModelBusy, MullamaError, ReferenceNotFound
from mullama.installation import VERSION
from mullama.models.parse import parse_spec
from mullama.models.sources.private_addresses import allow_private
from mullama.models.store.background_pulls import Pulls
from mullama.models.store.entry import Entry
from mullama.models.store.store import Store, named
from mullama.models.store.upkeep import entry_of
from mullama.serving.states import Lease, ModelState, Served
from mullama.types import ModelInfo, ModelKind
from mullama.web.http.request import Request
from mullama.web.internal.pull_routes import GAP_SECONDS, Watch
from mullama.web.ollama.answers import LINES, OllamaRoute, now
from mullama.web.ollama.ollama_bodies import LATEST, served_name
from mullama.web.openai.opening import with_lease
from mullama.web.openai.schemas import decode_body
from mullama.web.openapi.answer_types import OllamaModels, Status, VersionObject
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access
from mullama.web.services import Services
from mullama.web.stream.event_stream import event_json, start_stream

FOREVER = "9999-12-31T23:59:59Z"


class NameBody(msgspec.Struct, kw_only=True):
    """``name`` is the older spelling of ``model``."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None

    object_schema: ClassVar = {
        "anyOf": [
            {"properties": {name: {"type": "string", "minLength": 1}}, "required": [name]} for name in ("model", "name")
        ]
    }


class CopyBody(msgspec.Struct, kw_only=True):
    source: str
    destination: str


_name_decoder = msgspec.json.Decoder(NameBody)
_copy_decoder = msgspec.json.Decoder(CopyBody)


def _name_of(data: bytes) -> tuple[str, bool]:
    body = decode_body(_name_decoder, data)
    name = body.model or body.name
    if not name:
        raise InvalidRequest("model: it is missing; it must be the name of a model", param="model")
    return name, body.stream is not False


class Version(OllamaRoute):
    operations = {"GET": Operation("The version of the server", answer=VersionObject)}

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        resp.data = orjson.dumps({"version": VERSION})


class Tags(OllamaRoute):
    operations = {"GET": Operation("Models that are served or in the store", answer=OllamaModels)}

    def __init__(self, services: Services, store: Store | None = None) -> None:
        super().__init__(services)
        self._store = store or Store()

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Served names first, loaded or not, then what the store has besides."""
        models = self._services.models
        entries = await self._services.offload(True, self._store.entries)
        known = {entry.key: entry for entry in entries}
        rows = [_row(one, known) for one in models.all()]
        others = await self._services.offload(True, models.others) if models.has_others else []
        rows += [_stored(name, known.get(name) or known.get(reference)) for name, reference in others]
        resp.data = orjson.dumps({"models": rows})


class Running(OllamaRoute):
    operations = {"GET": Operation("Models that are loaded", answer=OllamaModels)}

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """What is loaded, and until when it stays so if nobody asks for it."""
        models = self._services.models
        rows = []
        for one in models.all():
            if one.engine is None:
                continue
            idle_s = 0.0 if one.in_use else max(models.now() - one.last_used, 0.0)
            ends = datetime.now(UTC) + timedelta(seconds=max(one.keep_alive_s - idle_s, 0)) if _ends(one) else None
            stamp = FOREVER if ends is None else ends.isoformat().replace("+00:00", "Z")
            row = _row(one, {}) | {"expires_at": stamp, "size": one.memory_bytes or one.engine.info.size_bytes}
            rows.append(row | {"size_vram": 0, "context_length": one.engine.info.n_ctx})
        resp.data = orjson.dumps({"models": rows})


class Show(OllamaRoute):
    operations = {"POST": Operation("Template, sizes and abilities of a model", body=NameBody)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """A model's template, sizes and abilities; it is loaded if need be. Raises InvalidRequest, ModelNotFound."""
        services = self._services
        name, _ = await services.parse(req, _name_of)
        name = served_name(name, services.models)

        async def look(lease: Lease) -> dict[str, Any]:
            errand = services.errand(req)
            found = await errand.run(True, partial(_shown, lease.engine))
            lease.release()
            return found

        resp.data = orjson.dumps(await with_lease(services, req, services.models.get(name).name, look))


class Pull(OllamaRoute):
    access = Access.OPERATOR
    operations = {"POST": Operation("Fetch a model", body=NameBody, answer=Status, streams=LINES)}

    def __init__(self, services: Services, store: Store | None = None) -> None:
        super().__init__(services)
        self._pulls = Pulls(store or Store())

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Fetch a model; a plain name that is no alias here is one of Ollama's registry. Raises InvalidRequest,
        ReferenceNotFound, StoreError, QueueFull."""
        services, store = self._services, self._pulls.store
        name, streams = await services.parse(req, _name_of)
        allow_private(services.config.allow_private_sources)
        reference = await services.offload(True, lambda: _reference(name, store))
        watch = Watch(self._pulls, reference, False, req.receive)
        services.end_at_shutdown(watch)
        if streams:
            start_stream(resp, _progress(watch), LINES)
            return
        try:
            await watch.result()
            resp.data = b'{"status":"success"}'
        finally:
            watch.close()


class Delete(OllamaRoute):
    access = Access.OPERATOR
    operations = {"DELETE": Operation("Remove a model of the store", body=NameBody, answer=None)}

    async def on_delete(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Remove a model of the store that is not loaded. Raises InvalidRequest, ReferenceNotFound, ModelBusy."""
        services = self._services
        name, _ = await services.parse(req, _name_of)
        key = await services.offload(True, lambda: _entry(name, Store()).key)
        for one in services.models.all():
            is_free = one.state in (ModelState.UNLOADED, ModelState.FAILED)  # one that sleeps would not wake again
            if not is_free and key in (one.name, one.reference):
                raise ModelBusy(f"{name} is {one.state.shown}; unload it first", param="model")
        await services.offload(True, lambda: Store().remove(key))


class Copy(OllamaRoute):
    access = Access.OPERATOR
    operations = {"POST": Operation("Another name for a model of the store", body=CopyBody, answer=None)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Another name for a model of the store. Raises InvalidRequest, ReferenceNotFound."""
        body = await self._services.parse(req, partial(decode_body, _copy_decoder))

        def copy() -> None:
            store = Store()
            store.copy(_entry(body.source, store).key, body.destination)

        await self._services.offload(True, copy)


class Unbuilt(OllamaRoute):
    """A route that is there to say that its work is not."""

    def __init__(self, services: Services, what: str) -> None:
        super().__init__(services)
        self._what = what
        self.operations = {"POST": Operation(f"Not there yet: {what}", statuses=())}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        raise falcon.HTTPNotImplemented(description=f"this server does not support {self._what} yet")


def _reference(name: str, store: Store) -> Any:
    plain = name.removesuffix(LATEST)
    try:
        spec = parse_spec(plain, store.lookup)
    except (InvalidRequest, ReferenceNotFound):
        spec = parse_spec(f"ollama:{plain}", store.lookup)
    # SAFETY: what lies on this machine is for those who have a shell on it.
    if spec.reference.is_local:
        raise InvalidRequest("model: a file of the server cannot be pulled, it is used where it lies", param="model")
    return named(spec.reference, spec.name) if spec.name else spec.reference


def _entry(name: str, store: Store) -> Entry:
    """Raises ReferenceNotFound."""
    try:
        return entry_of(store, name)
    except ReferenceNotFound:
        if not name.endswith(LATEST):
            raise
        return entry_of(store, name.removesuffix(LATEST))


async def _progress(watch: Watch) -> AsyncIterator[bytes]:
    try:
        yield b'{"status":"pulling manifest"}\n'
        while not watch.pull.is_finished:
            if watch.has_ended:
                return
            await watch.wait()
            state = watch.pull.state
            line: dict[str, Any] = {"status": state.step, "completed": state.done}
            yield event_json(line | ({"total": state.total} if state.total is not None else {})) + b"\n"
            await asyncio.sleep(GAP_SECONDS)
        try:
            await watch.result()
            yield b'{"status":"success"}\n'
        except MullamaError as error:
            yield event_json({"error": error.message}) + b"\n"
    finally:
        watch.close()


def _ends(one: Served) -> bool:
    return one.keep_alive_s >= 0 and not one.pinned


def _row(one: Served, known: dict[str, Entry]) -> dict[str, Any]:
    """A served model as ``tags`` shows it."""
    entry = known.get(one.name) or known.get(one.reference)
    row = _stored(one.name, entry)
    if one.engine is not None:
        info = one.engine.info
        row["size"] = row["size"] or info.size_bytes
        row["details"] = _details(info)
    return row


def _stored(name: str, entry: Entry | None) -> dict[str, Any]:
    details = {"format": "gguf", "quantization_level": (entry.quant if entry else None) or ""}
    return {
        "name": name,
        "model": name,
        "modified_at": entry.pulled_at if entry else now(),
        "size": entry.size if entry else 0,
        "digest": entry.sha256 if entry else "",
        "details": {"parent_model": "", "family": "", "families": [], "parameter_size": "", **details},
    }


def _details(info: ModelInfo) -> dict[str, Any]:
    size = f"{info.n_params / 1e9:.1f}B" if info.n_params >= 1e9 else f"{info.n_params / 1e6:.0f}M"
    return {
        "parent_model": "",
        "format": "gguf",
        "family": info.architecture,
        "families": [info.architecture],
        "parameter_size": size,
        "quantization_level": info.description.rpartition(" ")[2],
    }


def _shown(engine: EngineClient) -> dict[str, Any]:
    info, known = engine.info, engine.vocabulary()
    kind = info.architecture
    return {
        "modelfile": "",
        "parameters": "",
        "template": known["chat_template"],
        "details": _details(info),
        "model_info": {
            "general.architecture": kind,
            "general.parameter_count": info.n_params,
            f"{kind}.context_length": info.n_ctx_train,
            f"{kind}.embedding_length": info.n_embd,
            f"{kind}.block_count": info.n_layer,
        },
        "capabilities": ["completion" if info.kind is ModelKind.GENERATE else "embedding"],
        "modified_at": datetime.fromtimestamp(info.created, UTC).isoformat().replace("+00:00", "Z"),
    }
