"""The engine that a model file wants: one that generates, or one that makes vectors of texts.

No compiled code is imported before one is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mullama.engine.memory import fits
from mullama.errors import ModelLoadError
from mullama.models.files import kind
from mullama.types import ModelKind

if TYPE_CHECKING:
    from mullama.engine.embedding.embedding_engine import EmbeddingEngine
    from mullama.engine.engine import Engine

    AnyEngine: TypeAlias = Engine | EmbeddingEngine


def kind_at(path: str | Path) -> ModelKind:
    """What a model file is for; of one that is damaged, loading it tells what is wrong."""
    try:
        return kind.kind_of(fits.header_of(path))
    except ModelLoadError:
        return ModelKind.GENERATE


def load_engine(path: str | Path, **how: Any) -> AnyEngine:
    """Load a model as its file says; ``how`` are the keyword arguments of Engine.load, and its errors."""
    if kind_at(path) is ModelKind.GENERATE:
        from mullama.engine.engine import Engine

        return Engine.load(path, **how)
    from mullama.engine.embedding.embedding_engine import EmbeddingEngine

    return EmbeddingEngine.load(path, **how)
