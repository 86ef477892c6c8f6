"""From what a user wrote to a file that can be loaded: the one call of ``serve``, ``run`` and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mullama.errors import ReferenceNotFound
from mullama.models.files import gguf
from mullama.models.parse import ModelSpec, check_quant, parse_spec
from mullama.models.reference import Reference
from mullama.models.sources.base import Progress
from mullama.models.sources.selection import quant_of
from mullama.models.store import pulling
from mullama.models.store.entry import Entry
from mullama.models.store.store import Store, no_progress


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
    must_be_quant: bool = True,
) -> ResolvedModel:
    """Resolve ``[NAME=]REFERENCE``, pulling it when it is not here (``pull=False``: refuse), and check its header.

    ``quant``: in this quantisation; a variant in the store is taken first. ``must_be_quant=False``: a reference that
    names a file of another one is taken as it is. Raises ReferenceNotFound, ConfigError (a bad NAME or quant),
    StoreError, ModelLoadError (not a sound GGUF).
    """
    store = store or Store()
    spec = parse_spec(text, store.lookup)
    if quant:
        spec = in_quant(text, spec, quant, store, must_be_quant=must_be_quant)
    reference = spec.reference
    entry = None if reference.is_local else store.find(reference.key)
    if entry is None and not reference.is_local:
        found = store.read(reference.key)
        # A damaged model is not fetched again behind the user's back: the disk may be dying.
        if found is not None and store.is_damaged(found):
            store.checked_path(found)
        if pull:
            entry = pulling.pull(store, reference, progress)
    path = store.checked_path(entry, progress) if entry else store.resolve(reference)
    gguf.check(path)
    return ResolvedModel(spec.served_name(entry.filename if entry else path.name), path, spec, entry)


def in_quant(text: str, spec: ModelSpec, quant: str, store: Store, *, must_be_quant: bool = True) -> ModelSpec:
    """The same model in another quantisation: one that is in the store as a variant, else the source's.

    It keeps the name under which the model is served. Raises ConfigError for what is no quantisation, and unless
    ``must_be_quant`` is False ReferenceNotFound where the reference names a file of another one.
    """
    quant = check_quant(quant)
    here = variant_of(spec.reference, quant, store)
    if here is not None:
        name = spec.name or spec.reference.alias or (None if spec.reference.is_local else _name(spec, store))
        return ModelSpec(name, here.to_reference())
    other = parse_spec(text, store.lookup, quant=quant)
    if must_be_quant and other.reference == spec.reference:
        _check_quant_of(text, spec.reference, quant, store)
    return other


def _check_quant_of(text: str, reference: Reference, quant: str, store: Store) -> None:
    """Raise ReferenceNotFound, saying what is here, unless a reference that names its file is of this quantisation."""
    entry = None if reference.is_local else store.find(reference.key)
    own = (entry.quant if entry is not None else None) or quant_of(reference.locations[0].replace("#", "/"))
    if own is None or own.upper() == quant or reference.quant == quant:
        return
    others = [] if reference.is_local else store.variants(reference.key)
    here = [own, *(f"{one.quant} ({one.key})" for one in others)]
    raise ReferenceNotFound(
        f"'{text}' is not here in {quant}, and names a file, so that no other can be fetched; here are "
        f"{', '.join(here)}; mullama quantize {text} {quant} makes one"
    )


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
