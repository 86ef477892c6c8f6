"""Looking after the store: what changed or was damaged, what it takes on disk, what nobody uses any more."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass

from mullama.errors import ReferenceNotFound, StoreError
from mullama.files import disk_errors, size_on_disk
from mullama.models.parse import parse_reference
from mullama.models.sources.base import Progress
from mullama.models.store.digests import hash_file
from mullama.models.store.entry import Entry
from mullama.models.store.store import Store

log = logging.getLogger(__name__)

SOUND, DAMAGED, MISSING = "ok", "damaged", "missing"


@dataclass(frozen=True, slots=True)
class Usage:
    """What the store takes on disk; bytes."""

    models: tuple[tuple[Entry, int, int], ...]  # entry, its size, and how much of that no other entry shares
    total: int  # of the models; what several share counts once
    elsewhere: int  # of the total: files that lie in another program's cache
    unfinished: int  # downloads in progress or broken off
    quarantine: int
    free: int  # on the disk


def verify(store: Store, entry: Entry, progress: Progress) -> str:
    """Hash every file of an entry again: ``ok``, ``damaged`` (and set aside), or ``missing``.

    Raises StoreError when a file cannot be read.
    """
    if store.is_damaged(entry):
        return DAMAGED
    with disk_errors(f"verify {entry.key}"):
        try:
            for path, sha256, size in store.files_of(entry):
                digest = hash_file(path, lambda done, size=size: progress("verifying", done, size))  # type: ignore[misc]
                if digest != sha256:
                    store.set_aside(entry)
                    return DAMAGED
                store.digests.note(path, digest)
        except FileNotFoundError:
            return MISSING
    return SOUND


def usage(store: Store) -> Usage:
    """Raises StoreError when the disk cannot be read."""
    with disk_errors(f"measure the store {store.root}"):
        entries = store.list()
        sizes: dict[str, int] = {}
        users: dict[str, int] = {}
        outside: set[str] = set()
        for entry in entries:
            for _, sha256, size in store.files_of(entry):
                sizes[sha256] = size
                users[sha256] = users.get(sha256, 0) + 1
                if entry.place is not None:
                    outside.add(sha256)
        models = tuple(
            (entry, entry.size, sum(size for _, sha256, size in store.files_of(entry) if users[sha256] == 1))
            for entry in entries
        )
        disk = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
        return Usage(
            models=models,
            total=sum(sizes.values()),
            elsewhere=sum(sizes[sha256] for sha256 in outside),
            unfinished=size_on_disk(store.tmp),
            quarantine=size_on_disk(store.quarantine),
            free=shutil.disk_usage(disk).free,
        )


def entry_of(store: Store, name: str) -> Entry:
    """The entry that a user means, complete or not. Raises ReferenceNotFound."""
    for key in (name, name.lower()):
        if entry := store.read(key):
            return entry
    reference = parse_reference(name, store.lookup)
    if reference.is_local:
        raise ReferenceNotFound(f"{name} is a file of yours and not in the store")
    entry = store.read(reference.key)
    if entry is None:
        if store.has(reference.key):
            raise StoreError(f"the record of {reference.key} is damaged; remove it with: mullama rm {reference.key}")
        raise ReferenceNotFound(f"{reference.key} is not in the store")
    return entry
