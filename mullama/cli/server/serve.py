"""``mullama serve``."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mullama import logs
from mullama.cli.interrupt import ends_by_signal
from mullama.cli.options import Grouped, config_from, config_options
from mullama.config import DEFAULT_MODEL, unknown_variables

if TYPE_CHECKING:
    from mullama.config import ServeConfig
    from mullama.models.resolve import ResolvedModel
    from mullama.serving.manager import ModelManager

log = logging.getLogger(__name__)


@click.command(cls=Grouped, short_help="Serve models over HTTP.")
@config_options()
def command(**params: Any) -> None:
    """Serve models over an OpenAI-compatible HTTP API, in this process. SIGTERM drains running requests, SIGHUP reads
    the keys again.

    Every option can also be an environment variable or a line of a TOML file; a flag wins over the environment, and
    that over the file.
    """
    with ends_by_signal() as ending:
        _serve(params, ending.over if ending is not None else lambda: None)


def _serve(params: dict[str, Any], on_ready: Callable[[], None]) -> None:
    """``on_ready`` is called before the server runs, which looks after signals itself."""
    from mullama.serving.readiness import require

    config = config_from(params)
    logs.set_up(config.log_level, config.log_format)
    for problem in (*unknown_variables(), *require(config).notes):
        log.warning("%s", problem)

    from mullama.cli.server.serving import make_manager, make_swaps
    from mullama.engine.background import share_cores
    from mullama.web.server import bind, run_server

    # First of all: a port in use is known before minutes of download and loading.
    sock = bind(config)
    models = make_manager(config)
    # Until the server runs there is nothing that a hang-up could mean.
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN) if hasattr(signal, "SIGHUP") else None
    try:
        share_cores(config.arbiter)
        _load_first(models, config)
        _summary(models, config)
        swaps = make_swaps(config, models)
        on_ready()
        run_server(config, models, sock, swaps, lambda: config_from(params))
    finally:
        sock.close()
        models.close()
        if hang_up is not None:
            signal.signal(signal.SIGHUP, hang_up)


def _summary(models: ModelManager, config: ServeConfig) -> None:
    """What is served, in a line each: what one looks for first when something is slow or refused."""
    from mullama.installation import VERSION, llama_commit
    from mullama.machine.cores import usable_threads
    from mullama.machine.ways import words_of

    log.info("mullama %s, llama.cpp %s", VERSION, (llama_commit() or "unknown")[:12])
    for served in models.all():
        engine = served.engine
        if engine is None:
            log.info("%s is loaded when it is asked for", served.name)
            continue
        info = engine.info
        log.info(
            "%s is loaded", served.name,
            extra=logs.facts(
                model=info.description, weights=info.weights, mb=round(info.size_bytes / 1e6), context=info.n_ctx,
                slots=info.n_parallel, threads=config.threads or usable_threads(), scheduler=config.scheduler,
                kv=f"{config.kv_type_k}/{config.kv_type_v}",
                computes="; ".join(f"{name} {way}" for name, way in words_of(info.kernels).items()) or None,
            ),
        )  # fmt: skip


def _load_first(models: ModelManager, config: ServeConfig) -> None:
    """Load the named models as far as the limit allows; the others wait for a request."""
    from mullama.cli.load_progress import load_any

    for n, found in enumerate(_find_models(config)):
        reference = found.spec.reference.key
        if config.max_models and n >= config.max_models:
            models.add(found.name, reference)
        else:
            models.add_loaded(found.name, load_any(found, config), reference)


def _find_models(config: ServeConfig) -> list[ResolvedModel]:
    """The files of all models, before the first is loaded. Raises ConfigError when two have one name."""
    from mullama.cli.load_progress import find_model
    from mullama.errors import ConfigError

    found: dict[str, ResolvedModel] = {}
    for text in config.model or [DEFAULT_MODEL]:
        model = find_model(text, config=config, must_be_quant=False)
        if model.name in found:
            raise ConfigError(f"two models are served as '{model.name}'; give one another name with NAME=REFERENCE")
        found[model.name] = model
    return list(found.values())
