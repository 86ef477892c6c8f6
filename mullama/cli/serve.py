"""``mullama serve``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

from mullama.cli.options import config_from, config_options
from mullama.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from mullama.config import ServeConfig
    from mullama.models.resolve import ResolvedModel
    from mullama.serving.manager import ModelManager


@click.command(short_help="Serve models over HTTP.")
@config_options()
def command(**params: Any) -> None:
    """Serve models over an OpenAI-compatible HTTP API, in this process. SIGTERM drains running requests.

    Every option can also be an environment variable or a line of a TOML file; a flag wins over the environment, and
    that over the file.
    """
    from mullama.cli.serving import make_manager, make_swaps
    from mullama.engine.background import share_cores
    from mullama.web.server import bind, run_server

    config = config_from(params)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # First of all: a port in use is known before minutes of download and loading.
    sock = bind(config)
    models = make_manager(config)
    try:
        share_cores(config.arbiter)
        _load_first(models, config)
        run_server(config, models, sock, make_swaps(config, models))
    finally:
        sock.close()
        models.close()


def _load_first(models: ModelManager, config: ServeConfig) -> None:
    """Load the named models as far as the limit allows; the others wait for a request."""
    from mullama.cli.loading import load_engine

    for n, found in enumerate(_find_models(config)):
        reference = found.spec.reference.key
        if config.max_models and n >= config.max_models:
            models.add(found.name, reference)
        else:
            models.add_loaded(found.name, load_engine(found, config), reference)


def _find_models(config: ServeConfig) -> list[ResolvedModel]:
    """The files of all models, before the first is loaded. Raises ConfigError when two have one name."""
    from mullama.cli.loading import find_model
    from mullama.errors import ConfigError

    found: dict[str, ResolvedModel] = {}
    for text in config.model or [DEFAULT_MODEL]:
        model = find_model(text, config=config, must_be_quant=False)
        if model.name in found:
            raise ConfigError(f"two models are served as '{model.name}'; give one another name with NAME=REFERENCE")
        found[model.name] = model
    return list(found.values())
