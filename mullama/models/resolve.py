"""From what a user wrote to a file that can be loaded: the one call of ``serve``, ``run`` and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mullama.models import gguf
from mullama.models.reference import ModelSpec, parse_spec
from mullama.models.sources import Progress
from mullama.models.store import Entry, Store, no_progress


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """``name`` is what clients call it; ``entry`` is None for a local file."""

    name: str
    path: Path
    spec: ModelSpec
    entry: Entry | None


def resolve_model(
    text: str, *, store: Store | None = None, pull: bool = True, progress: Progress = no_progress
) -> ResolvedModel:
    """Resolve ``[NAME=]REFERENCE``, pulling it when it is not here (``pull=False``: refuse), and check its header.

    Raises ReferenceNotFound, ConfigError (a bad NAME), StoreError, ModelLoadError (not a sound GGUF).
    """
    store = store or Store()
    spec = parse_spec(text, store.lookup)
    reference = spec.reference
    entry = None if reference.is_local else store.find(reference.key)
    if entry is None and pull and not reference.is_local:
        entry = store.pull(reference, progress)
    path = store.path_of(entry) if entry else store.resolve(reference)
    gguf.check(path)
    return ResolvedModel(spec.served_name(entry.filename if entry else path.name), path, spec, entry)
