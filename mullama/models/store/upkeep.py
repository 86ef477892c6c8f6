"""Looking after the store: what changed or was damaged, what it takes on disk, what nobody uses any more."""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mullama.errors import StoreError
from mullama.files import disk_errors
from mullama.models.sources.base import Progress
from mullama.models.store.digests import hash_file
from mullama.models.store.entry import Entry

if TYPE_CHECKING:
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
                    set_aside(store, entry)
                    return DAMAGED
                store.digests.note(path, digest)
        except FileNotFoundError:
            return MISSING
    return SOUND


def set_aside(store: Store, entry: Entry) -> None:
    """Take a damaged model out of use: its blob moves to ``quarantine/``; files elsewhere only get a mark there."""
    store.quarantine.mkdir(parents=True, exist_ok=True)
    target = store.quarantine_path(entry)
    with store.store_lock():
        for path, _, _ in store.files_of(entry):
            store.digests.forget(path)
        if entry.place is not None:
            target.touch()
        elif entry.parts:
            target.touch()
            shutil.rmtree(target.with_suffix(".parts"), ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                store.path_of(entry).parent.rename(target.with_suffix(".parts"))
        else:
            with contextlib.suppress(FileNotFoundError):
                store.path_of(entry).replace(target)
    log.error("%s is damaged; it was set aside in %s", entry.key, store.quarantine)


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
            unfinished=_size_of(store.tmp),
            quarantine=_size_of(store.quarantine),
            free=shutil.disk_usage(disk).free,
        )


def drop_unused(store: Store) -> int:
    """Remove the blobs of no ref; the bytes freed. The caller holds the store's lock; an unreadable ref keeps all."""
    if store.is_any_ref_damaged():
        log.warning("a file in %s is damaged; no model file is removed", store.refs)
        return 0
    used = {entry.sha256 for entry in store.entries()}
    freed = 0
    for folder in (store.blobs, store.quarantine):
        for path in [*folder.glob("sha256-*.gguf"), *folder.glob("sha256-*.parts")]:
            if path.stem.removeprefix("sha256-") in used:
                continue
            freed += _size_of(path)
            for file in path.glob("*") if path.is_dir() else (path,):
                store.digests.forget(file)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return freed


def remove_in_place(store: Store, entry: Entry) -> int:
    """Remove an entry's files from another program's cache, where this store put them there and no entry needs
    them; the bytes freed. The caller holds the store's lock."""
    if entry.is_borrowed or store.is_any_ref_damaged():
        return 0
    needed = {path for other in store.entries() for path, _, _ in store.files_of(other)}
    freed = 0
    for path, _, _ in store.files_of(entry):
        if path in needed or not path.exists():
            continue
        target, size = path.resolve(), path.stat().st_size
        is_link = path.is_symlink()
        if not is_link or not _is_linked(target, but=path):
            store.digests.forget(path)
            freed += size
        path.unlink()
        # The cache's snapshots are links to files that several revisions may share.
        if is_link and not _is_linked(target, but=path):
            target.unlink(missing_ok=True)
    store.quarantine_path(entry).unlink(missing_ok=True)
    return freed


def _is_linked(target: Path, *, but: Path) -> bool:
    """Whether another link of a hub's cache (``models--a--b/snapshots``) leads to the file ``target`` in ``blobs``."""
    snapshots = target.parent.parent / "snapshots"
    return any(link != but and link.is_symlink() and link.resolve() == target for link in snapshots.rglob("*"))


def _size_of(path: Path) -> int:
    """Bytes of a file, or of everything in a folder."""
    total = 0
    with contextlib.suppress(OSError):
        for file in path.rglob("*") if path.is_dir() else (path,):
            with contextlib.suppress(OSError):
                total += file.stat().st_size if file.is_file() else 0
    return total


def entry_of(store: Store, name: str) -> Entry:
    """The entry that a user means, complete or not. Raises ReferenceNotFound."""
    from mullama.errors import ReferenceNotFound
    from mullama.models.reference import parse_reference

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
