"""``create_app``: builds the collaborators, injects them, and lists every route."""

from __future__ import annotations

from typing import Any

import falcon
import falcon.asgi

from mullama.config import ServeConfig
from mullama.web.chat import ChatCompletions
from mullama.web.completions import Completions
from mullama.web.errors import add_error_handlers
from mullama.web.health import Health, Ready
from mullama.web.internal import KvDrop, KvView, SchedulerView, ShadowScheduler
from mullama.web.listing import ModelDetail, ModelList
from mullama.web.models import Models
from mullama.web.request import Request
from mullama.web.security import Security
from mullama.web.services import Services

App = falcon.asgi.App[Request, falcon.asgi.Response]


def create_app(config: ServeConfig, models: Models, services: Services | None = None) -> App:
    """The ASGI app. Raises ConfigError when the profile log cannot be opened.

    ``services`` is for callers that close them on their own; without it the ASGI lifespan does.
    """
    services = services or Services(config, models)
    middleware: list[Any] = [Security(config), services]
    app: App = falcon.asgi.App(media_type=falcon.MEDIA_JSON, request_type=Request, middleware=middleware)
    app.req_options.strip_url_path_trailing_slash = True
    add_error_handlers(app)

    app.add_route("/v1/chat/completions", ChatCompletions(services))
    app.add_route("/v1/completions", Completions(services))
    app.add_route("/v1/models", ModelList(models))
    app.add_route("/v1/models/{model_id:path}", ModelDetail(models))
    app.add_route("/health", Health())
    app.add_route("/ready", Ready(models))
    app.add_route("/internal/scheduler", SchedulerView(models, config))
    app.add_route("/internal/scheduler/shadow", ShadowScheduler(models, config))
    app.add_route("/internal/kv", KvView(models))
    app.add_route("/internal/kv/drop", KvDrop(models))
    return app
