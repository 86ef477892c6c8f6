"""The engine that a model file wants: one that generates, or one that makes vectors of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mullama.engine.embedding.embedding_engine import EmbeddingEngine
from mullama.engine.engine import Engine
from mullama.engine.memory import fits
from mullama.errors import ModelLoadError
from mullama.models.files.kind import kind_of
from mullama.types import ModelKind

AnyEngine = Engine | EmbeddingEngine


def load_engine(path: str | Path, **how: Any) -> AnyEngine:
    """Load a model as its file says; ``how`` are the keyword arguments of Engine.load, and its errors."""
    try:
        kind = kind_of(fits.header_of(path))
    except ModelLoadError:  # what is wrong with it, loading it tells
        kind = ModelKind.GENERATE
    return Engine.load(path, **how) if kind is ModelKind.GENERATE else EmbeddingEngine.load(path, **how)
