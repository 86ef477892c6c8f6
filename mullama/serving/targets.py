"""What a swap's ``to`` means: a path, a reference, or only a quantisation of the model that is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mullama.errors import InvalidRequest, PermissionDenied, ReferenceNotFound
from mullama.models.child.probe import check_model
from mullama.models.parse import parse_spec
from mullama.models.quantizing import check_type, quantize_variant
from mullama.models.reference import aliases
from mullama.models.resolve import resolve_model
from mullama.models.sources.selection import quant_of
from mullama.models.store.entry import Entry
from mullama.models.store.store import Store

#: (what is being done, done, in all)
Progress = Callable[[str, int, int | None], None]


@dataclass(slots=True, frozen=True)
class Target:
    """A verified file, and the name of its weights in profiles."""

    path: Path
    label: str
    reference: str


def find_target(to: str, reference: str, *, store: Store, progress: Progress, may_read_files: bool) -> Target:
    """The file that ``to`` stands for, made or fetched where it has to be, and checked by a child process.

    A bare quantisation means that variant of the model at ``reference``, which is quantised when there is none. A
    file of this machine takes ``may_read_files``. Blocks. Raises InvalidRequest, ReferenceNotFound, StoreError,
    ModelLoadError.
    """
    ftype = _type(to)
    if ftype is not None and store.find(to) is None:
        return _variant(ftype, reference, store, progress)
    spec = parse_spec(to, store.lookup)
    if spec.reference.is_local and not may_read_files:
        raise PermissionDenied("to: a file of the server can only be named when --admin-key is set", param="to")
    found = resolve_model(to, store=store, progress=progress)
    return _checked(found.path, found.entry, spec.reference.key)


def _type(to: str) -> str | None:
    try:
        return check_type(to)
    except InvalidRequest:
        return None


def _variant(ftype: str, reference: str, store: Store, progress: Progress) -> Target:
    """The served model in another quantisation."""
    spec = parse_spec(reference, store.lookup)
    base: Entry | Path
    if spec.reference.is_local:
        base = Path(spec.reference.locations[0])
        if not base.is_file():
            raise ReferenceNotFound(f"{base} is not there any more, so that it cannot be quantised", param="to")
        name, path = base.name, base
    else:
        entry = store.find(spec.reference.key)
        if entry is None:
            raise ReferenceNotFound(f"'{reference}' is not in the store, so that it cannot be quantised", param="to")
        if entry.variant_of and (above := store.find(entry.variant_of)):
            entry = above
        base, name, path = entry, entry.filename, store.checked_path(entry, progress)
    if (quant_of(name) or "").upper() == ftype:
        return _checked(path, base if isinstance(base, Entry) else None, reference)
    made = quantize_variant(store, base, ftype, progress)
    return _checked(store.checked_path(made, progress), made, made.key)


def _checked(path: Path, entry: Entry | None, reference: str) -> Target:
    digest, is_known = known_digest(entry)
    check_model(path, digest=digest, known_good=is_known)
    return Target(path, entry.key if entry is not None else path.stem, reference)


def known_digest(entry: Entry | None) -> tuple[str | None, bool]:
    """The sha256 that a file of the store must have, and whether it is one that came with mullama.

    A split model's is that of its parts' digests, which no file has.
    """
    if entry is None or entry.parts:
        return None, False
    return entry.sha256, any(alias.sha256 == entry.sha256 for alias in aliases().values())
