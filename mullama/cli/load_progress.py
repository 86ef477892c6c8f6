"""From a reference to an engine, with progress on stderr; shared by ``serve`` and ``run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from mullama.cli.interrupt import on_interrupt
from mullama.cli.progress import LoadProgress, PullProgress
from mullama.errors import InvalidRequest, LoadCancelled
from mullama.types import ModelKind

if TYPE_CHECKING:
    from mullama.config import ServeConfig
    from mullama.engine.engine import Engine
    from mullama.engine.kinds import AnyEngine
    from mullama.models.resolve import ResolvedModel
    from mullama.models.store.store import Store


def find_model(
    text: str, store: Store | None = None, *, config: ServeConfig | None = None, must_be_quant: bool = True
) -> ResolvedModel:
    """Resolve a reference, pulling it when it is not here, and check the file's header.

    ``config`` says which quantisation is wanted and which sources are allowed; ``must_be_quant``: see resolve_model.
    """
    from mullama.models.resolve import resolve_model
    from mullama.models.sources.private_addresses import allow_private

    with PullProgress(text) as progress:
        if config is not None:
            allow_private(config.allow_private_sources)
        quant = config.quant if config is not None else None
        return resolve_model(text, store=store, progress=progress, quant=quant, must_be_quant=must_be_quant)


def weights_of(model: ResolvedModel) -> str:
    """What profiles call these weights: the store's key, or the file's stem."""
    return model.entry.key if model.entry is not None else model.path.stem


def load_engine(model: ResolvedModel, config: ServeConfig) -> Engine:
    """Load a model that generates (see load_any). Raises InvalidRequest for one that embeds."""
    from mullama.engine.kinds import kind_at

    if kind_at(model.path) is not ModelKind.GENERATE:
        raise InvalidRequest(f"'{model.name}' generates no text: it is for mullama embed, and for /v1/embeddings")
    return cast("Engine", load_any(model, config))


def load_any(model: ResolvedModel, config: ServeConfig) -> AnyEngine:
    """Load a model. A signal gives the load up and raises KeyboardInterrupt, or SystemExit (see ``on_interrupt``)."""
    from mullama.engine import kinds

    with LoadProgress(model.name) as progress, on_interrupt(progress.cancel) as interrupt:
        try:
            engine = kinds.load_engine(
                model.path, name=model.name, config=config, progress=progress, weights=weights_of(model)
            )
        except LoadCancelled:
            interrupt.check()
            raise
        if interrupt.number is not None:  # it came too late to stop the load
            engine.close()
            interrupt.check()
        return engine
