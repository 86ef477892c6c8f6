"""From what a user wrote to a file that can be loaded: the one call of ``serve``, ``run`` and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mullama.models import gguf
from mullama.models.reference import ModelSpec, Reference, check_quant, parse_spec
from mullama.models.sources import Progress
from mullama.models.store import Entry, Store, no_progress


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """``name`` is what clients call it; ``path`` is what is loaded, of a split model the first part; ``entry`` is None
    for a local file."""

    name: str
    path: Path
    spec: ModelSpec
    entry: Entry | None


def resolve_model(
    text: str,
    *,
    store: Store | None = None,
    pull: bool = True,
    progress: Progress = no_progress,
    quant: str | None = None,
) -> ResolvedModel:
    """Resolve ``[NAME=]REFERENCE``, pulling it when it is not here (``pull=False``: refuse), and check its header.

    ``quant`` is asked of a reference that names no file; a variant of that quantisation in the store is taken first.
    Raises ReferenceNotFound, ConfigError (a bad NAME or quant), StoreError, ModelLoadError (not a sound GGUF).
    """
    store = store or Store()
    spec = parse_spec(text, store.lookup)
    if quant:
        spec = in_quant(text, spec, quant, store)
    reference = spec.reference
    entry = None if reference.is_local else store.find(reference.key)
    if entry is None and not reference.is_local:
        found = store.read(reference.key)
        # A damaged model is not fetched again behind the user's back: the disk may be dying.
        if found is not None and store.is_damaged(found):
            store.checked_path(found)
        if pull:
            entry = store.pull(reference, progress)
    path = store.checked_path(entry, progress) if entry else store.resolve(reference)
    gguf.check(path)
    return ResolvedModel(spec.served_name(entry.filename if entry else path.name), path, spec, entry)


def in_quant(text: str, spec: ModelSpec, quant: str, store: Store) -> ModelSpec:
    """The same model in another quantisation: one that is in the store as a variant, else the source's.

    It keeps the name under which the model is served. Raises ConfigError.
    """
    quant = check_quant(quant)
    here = variant_of(spec.reference, quant, store)
    if here is not None:
        name = spec.name or spec.reference.alias or (None if spec.reference.is_local else _name(spec, store))
        return ModelSpec(name, here.to_reference())
    return parse_spec(text, store.lookup, quant=quant)


def variant_of(reference: Reference, quant: str, store: Store) -> Entry | None:
    """The entry of a model in this quantisation, where the store has one; the model itself where it is of that one."""
    if reference.is_local:
        return None
    own = store.find(reference.key)
    if own is not None and own.quant is not None and own.quant.upper() == quant.upper():
        return own
    return next(
        (entry for entry in store.variants(reference.key) if (entry.quant or "").upper() == quant.upper()), None
    )


def _name(spec: ModelSpec, store: Store) -> str | None:
    """What a model without a name of its own is served as, so that its variants are served as the same."""
    entry = store.find(spec.reference.key)
    return spec.served_name(entry.filename) if entry is not None else None
