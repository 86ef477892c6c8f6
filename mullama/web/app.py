"""``create_app``: builds the collaborators, injects them, and lists every route."""

from __future__ import annotations

import logging
from typing import Any

import falcon
import falcon.asgi

from mullama.batches.batch_runner import BatchRunner
from mullama.batches.file_store import FileStore, files_folder
from mullama.config import ServeConfig
from mullama.serving.manager import ModelManager
from mullama.web.anthropic.messages import CountTokens, Messages
from mullama.web.batches.asking import Asking
from mullama.web.batches.batch_routes import Batches, CancelBatch, OneBatch
from mullama.web.batches.file_routes import FileContent, Files, OneFile
from mullama.web.error_responses import add_error_handlers
from mullama.web.health import Health, Ready
from mullama.web.http.cors import middleware_of
from mullama.web.http.request import PERMIT, Request
from mullama.web.http.request_log import RequestIds
from mullama.web.internal.kv_routes import (
    KvDrop,
    KvEvents,
    KvLoad,
    KvMap,
    KvPin,
    KvPolicy,
    KvSave,
    KvTree,
    KvUnpin,
    KvView,
)
from mullama.web.internal.machine_routes import MachineView
from mullama.web.internal.memory_routes import MemoryView
from mullama.web.internal.model_routes import ArbiterView, ModelActions, ModelTable, SwapViews
from mullama.web.internal.pull_routes import ModelPull
from mullama.web.internal.scheduler_routes import SchedulerView, ShadowScheduler
from mullama.web.llama_server.completion import LlamaCompletion
from mullama.web.llama_server.server_state import Props, Slots
from mullama.web.llama_server.tokens import ApplyTemplate, Detokenize, Tokenize, TokenizerInfo
from mullama.web.ollama.answers import Answers
from mullama.web.ollama.embed_routes import Embed
from mullama.web.ollama.models import Copy, Delete, Pull, Running, Show, Tags, Unbuilt, Version
from mullama.web.openai.chat_completions import ChatCompletions
from mullama.web.openai.completions import Completions
from mullama.web.openai.context_policy import ContextPolicy, default_policy
from mullama.web.openai.listing import ModelDetail, ModelList
from mullama.web.openapi.doc_routes import Docs, OpenApi
from mullama.web.openapi.document import Route
from mullama.web.responses.responses import (
    CancelResponse,
    Compact,
    InputItems,
    InputTokens,
    OneResponse,
    Responses,
    store_of,
)
from mullama.web.security import Security
from mullama.web.services import Services
from mullama.web.vectors.embeddings import Embeddings
from mullama.web.vectors.rerank import Rerank
from mullama.web.vectors.scores import Scores

log = logging.getLogger(__name__)


class App(falcon.asgi.App[Request, falcon.asgi.Response]):
    """Falcon's, with a table of its routes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.routes: list[Route] = []
        super().__init__(*args, **kwargs)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:  # type: ignore[override]
        try:
            await super().__call__(scope, receive, send)
        finally:
            if (permit := scope.get(PERMIT)) is not None:
                permit.release()

    def add_route(self, uri_template: str, resource: object, **kwargs: Any) -> None:
        self.routes.append(Route(uri_template, resource, kwargs.get("suffix", "")))
        super().add_route(uri_template, resource, **kwargs)


def create_app(config: ServeConfig, models: ModelManager, services: Services | None = None) -> App:
    """The ASGI app. Raises ConfigError for an option that cannot be carried out, such as a file that cannot be opened.

    ``services`` is for callers that close them on their own; without it the ASGI lifespan does.
    """
    _check_context_policy(config, models)
    services = services or Services(config, models)
    services.security = Security(config)
    middleware: list[Any] = [RequestIds(), *middleware_of(config.cors_origin), services.security, services]
    app = App(media_type=falcon.MEDIA_JSON, request_type=Request, middleware=middleware)
    app.req_options.strip_url_path_trailing_slash = True
    add_error_handlers(app)

    for prefix in ("/v1", ""):  # llama-server answers without the prefix as well
        app.add_route(f"{prefix}/chat/completions", ChatCompletions(services))
        app.add_route(f"{prefix}/models", ModelList(models, services))
        app.add_route(f"{prefix}/health", Health())
        app.add_route(f"{prefix}/tokenize", Tokenize(services))
        app.add_route(f"{prefix}/detokenize", Detokenize(services))
        app.add_route(f"{prefix}/rerank", Rerank(services))
        app.add_route(f"{prefix}/score", Scores(services))
    app.add_route("/v2/rerank", Rerank(services, shows_documents=False))
    app.add_route("/v1/embeddings", Embeddings(services))
    for name in ("embedding", "embeddings"):
        app.add_route(f"/{name}", Embeddings(services, is_openai=False))
    app.add_route("/v1/completions", Completions(services))
    for path in ("/completion", "/completions"):
        app.add_route(path, LlamaCompletion(services))
    app.add_route("/v1/models/{model_id:path}", ModelDetail(models))
    app.add_route("/v1/messages", Messages(services))
    app.add_route("/v1/messages/count_tokens", CountTokens(services))
    _add_ollama(app, services)
    _add_responses(app, services)
    _add_batches(app, services)
    app.add_route("/apply-template", ApplyTemplate(services))
    app.add_route("/tokenizer_info", TokenizerInfo(services))
    app.add_route("/props", Props(models, services.defaults))
    app.add_route("/slots", Slots(models))
    app.add_route("/ready", Ready(models))
    app.add_route("/internal/models", ModelTable(services))
    app.add_route("/internal/models/{name:path}", ModelActions(services))
    app.add_route("/internal/swaps", SwapViews(services))
    app.add_route("/internal/swaps/{swap_id}", SwapViews(services), suffix="one")
    app.add_route("/internal/arbiter", ArbiterView(services))
    app.add_route("/internal/memory", MemoryView(models))
    app.add_route("/internal/machine", MachineView(models, config))
    app.add_route("/internal/scheduler", SchedulerView(models, config))
    app.add_route("/internal/scheduler/shadow", ShadowScheduler(models, config))
    app.add_route("/internal/kv", KvView(models))
    app.add_route("/internal/kv/tree", KvTree(models))
    app.add_route("/internal/kv/map", KvMap(models))
    app.add_route("/internal/kv/events", KvEvents(services))
    app.add_route("/internal/kv/policy", KvPolicy(models, config))
    app.add_route("/internal/kv/pin", KvPin(services))
    app.add_route("/internal/kv/unpin", KvUnpin(services))
    app.add_route("/internal/kv/drop", KvDrop(services))
    app.add_route("/internal/kv/save", KvSave(services))
    app.add_route("/internal/kv/load", KvLoad(services))
    app.add_route("/internal/models/pull", ModelPull(services))
    app.add_route("/openapi.json", OpenApi(app.routes, services))
    app.add_route("/docs", Docs())
    return app


def _add_responses(app: App, services: Services) -> None:
    store = store_of(services)
    app.add_route("/v1/responses", Responses(services, store))
    app.add_route("/v1/responses/input_tokens", InputTokens(services, store))
    app.add_route("/v1/responses/compact", Compact(services, store))
    app.add_route("/v1/responses/{response_id}", OneResponse(services, store))
    app.add_route("/v1/responses/{response_id}/cancel", CancelResponse(services, store))
    app.add_route("/v1/responses/{response_id}/input_items", InputItems(services, store))


def _add_batches(app: App, services: Services) -> None:
    asking = Asking(app, services)
    files = FileStore(files_folder(services.config.files_dir), services.config.files_bytes)
    batches = services.batches = BatchRunner(files, asking, asking.has_room)
    app.add_route("/v1/files", Files(files))
    app.add_route("/v1/files/{file_id}", OneFile(files))
    app.add_route("/v1/files/{file_id}/content", FileContent(files))
    app.add_route("/v1/batches", Batches(services, batches))
    app.add_route("/v1/batches/{batch_id}", OneBatch(services, batches))
    app.add_route("/v1/batches/{batch_id}/cancel", CancelBatch(services, batches))


def _add_ollama(app: App, services: Services) -> None:
    app.add_route("/api/chat", Answers(services, is_chat=True))
    app.add_route("/api/generate", Answers(services, is_chat=False))
    app.add_route("/api/tags", Tags(services))
    app.add_route("/api/ps", Running(services))
    app.add_route("/api/show", Show(services))
    app.add_route("/api/version", Version(services))
    app.add_route("/api/pull", Pull(services))
    app.add_route("/api/embed", Embed(services))
    app.add_route("/api/embeddings", Embed(services, is_old=True))
    app.add_route("/api/delete", Delete(services))
    app.add_route("/api/copy", Copy(services))
    for name, what in (
        ("push", "pushing models"),
        ("create", "making models; mullama quantize and mullama cp do it"),
    ):
        app.add_route(f"/api/{name}", Unbuilt(services, what))


def _check_context_policy(config: ServeConfig, models: ModelManager) -> None:
    """Raises ConfigError for a policy that there is not; a model that does not have it is only logged."""
    if default_policy(config.context_policy) is ContextPolicy.SHIFT:
        for name, engine in models.items():
            if not engine.info.can_shift:
                log.warning("--context-policy shift: '%s' cannot shift; 'error' holds for it instead", name)
