"""The store: verified model files under ``$MULLAMA_HOME``, addressed by their sha256.

::

    blobs/sha256-<hex>.gguf     the files; read-only, never changed after they appear
    blobs/sha256-<hex>.parts/   the files of a split GGUF, under names by which llama.cpp finds the others
    refs/<key>.json             what was pulled, and which blob it is
    digests/                    size and time of each file when it was hashed (digests.py)
    quarantine/                 blobs that were found damaged, and marks for damaged files elsewhere
    tmp/<hash of key>/          one download in progress; locks/<hash of key>.lock says by a living process
    locks/store.lock            held for the moment in which blobs and refs change together

A blob appears by an atomic rename after its sha256 was verified and its bytes were synced, its ref after it. So a
ref whose blob has the recorded size is complete. Using one costs a read and a stat, unless the file's size or time
of change is not the recorded one: then it is hashed again first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mullama.errors import ReferenceNotFound, StoreError
from mullama.files import disk_errors, size_on_disk, store_error, sync_folder
from mullama.home import default_root, need_home
from mullama.models.reference import Reference, aliases, check_name
from mullama.models.sources.base import SOURCES, Progress, load_source
from mullama.models.store.digests import Digests
from mullama.models.store.entry import MADE, Entry

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger(__name__)


def no_progress(what: str, done: int, total: int | None) -> None:
    """The Progress of callers who do not want any."""


class Store:
    """May be used by several processes at once. Making one touches nothing; folders appear with the first pull."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else default_root()
        self.blobs = self.root / "blobs"
        self.refs = self.root / "refs"
        self.tmp = self.root / "tmp"
        self.locks = self.root / "locks"
        self.quarantine = self.root / "quarantine"
        self.digests = Digests(self.root / "digests")

    # -- reading

    def find(self, key: str) -> Entry | None:
        """The entry of a key, when its files are there in full size; no hashing."""
        entry = self.read(key)
        return entry if entry is not None and self.is_complete(entry) else None

    def read(self, key: str) -> Entry | None:
        """The entry of a key, whatever became of its files."""
        entry = self._read_ref(self._ref_path(key))
        return entry if entry is not None and entry.key == key else None

    def has(self, key: str) -> bool:
        """Whether there is a ref of that key, complete or damaged, that ``remove`` would remove."""
        return self._ref_path(key).exists()

    def lookup(self, name: str) -> Reference | None:
        """What was pulled under a name or reference, for ``parse_spec``."""
        for key in dict.fromkeys((name, name.lower())):
            entry = self.read(key)
            if entry is not None and (self.is_complete(entry) or self.is_damaged(entry)):
                return entry.to_reference()
        return None

    def path_of(self, entry: Entry) -> Path:
        """The file that is loaded: the model's, or the first part of a split one."""
        return self.files_of(entry)[0][0]

    def files_of(self, entry: Entry) -> Sequence[tuple[Path, str, int]]:
        """Path, sha256 and size of each file."""
        if entry.parts:
            folder = Path(entry.place) if entry.place is not None else self.blobs / f"sha256-{entry.sha256}.parts"
            return [(folder / part.filename, part.sha256, part.size) for part in entry.parts]
        whole = self.blob_path(entry.sha256) if entry.place is None else Path(entry.place) / entry.filename
        return [(whole, entry.sha256, entry.size)]

    def describe(self, entry: Entry, was_there: bool) -> dict[str, Any]:
        """What is told of a model that was pulled."""
        return {
            "name": entry.key,
            "sha256": entry.sha256,
            "size": entry.size,
            "license": entry.license,
            "path": str(self.path_of(entry)),
            "quant": entry.quant,
            "downloaded": not was_there,
        }

    def blob_path(self, sha256: str) -> Path:
        return self.blobs / f"sha256-{sha256}.gguf"

    def resolve(self, reference: Reference) -> Path:
        """The file of a reference, without network; hashed only where it changed since it was verified.

        Raises ReferenceNotFound: not pulled, or a local file that does not exist. Raises StoreError: damaged.
        """
        # PERF: the store first; importing a source (pip, zip files) costs ten times the lookup.
        entry = None if reference.is_local else self.read(reference.key)
        if entry is not None and (self.is_complete(entry) or self.is_damaged(entry)):
            return self.checked_path(entry)
        located = None if reference.source == MADE else load_source(reference.source).locate(reference)
        if located is None:
            raise ReferenceNotFound(f"{reference.key} is not in the store; {how_to_get(reference)}")
        return located

    def checked_path(self, entry: Entry, progress: Progress = no_progress) -> Path:
        """``path_of``, where every file is the one that was verified: one that changed since is hashed again.

        Raises StoreError: damaged. Such a file of the store is set aside, so that it is not used again.
        """
        if self.is_damaged(entry):
            raise self._damaged(entry)
        with disk_errors(f"read {entry.key}"):
            for path, sha256, size in self.files_of(entry):
                if self.digests.known(path) == sha256:
                    continue
                if self.digests.of(path, partial(_report_verifying, progress, size)) != sha256:
                    self.set_aside(entry)
                    raise self._damaged(entry)
        return self.path_of(entry)

    def list(self) -> list[Entry]:
        """Every complete entry, by key."""
        return [entry for entry in self.entries() if self.is_complete(entry)]

    def entries(self) -> Sequence[Entry]:
        """Every entry, complete or not, by key."""
        try:
            paths = sorted(self.refs.glob("*.json"))
        except OSError as error:
            raise store_error("read the store", error) from None
        return sorted(filter(None, map(self._read_ref, paths)), key=lambda entry: entry.key)

    def variants(self, key: str) -> Sequence[Entry]:
        """The complete entries that are other quantisations of a model, by key."""
        return [entry for entry in self.list() if entry.variant_of == key]

    def is_complete(self, entry: Entry) -> bool:
        """Whether all files are there in full size, and none is known to be damaged."""
        try:
            return all(path.stat().st_size == size for path, _, size in self.files_of(entry)) and not (
                entry.place is not None and self.is_damaged(entry)
            )
        except OSError:
            return False

    def is_damaged(self, entry: Entry) -> bool:
        """Whether its file was found damaged and is set aside."""
        if not self.quarantine_path(entry).exists():
            return False
        # A blob that was fetched again since is sound; the old one stays aside until somebody removes it.
        return entry.place is not None or not self.path_of(entry).exists()

    def quarantine_path(self, entry: Entry) -> Path:
        return self.quarantine / f"sha256-{entry.sha256}.gguf"

    def _damaged(self, entry: Entry) -> StoreError:
        return StoreError(
            f"the file of {entry.key} is damaged (it is not the one that was verified) and is not used; "
            f"{how_to_get(entry.to_reference(), 'fetch it again with: mullama pull --force')}"
        )

    # -- changing

    @contextlib.contextmanager
    def temp_folder(self) -> Iterator[Path]:
        """A folder of one's own on the file system of the blobs; gone at the end, after a kill with the next pull."""
        with disk_errors(f"write to the store {self.root}"):
            self.make_folders()
            name = f"work-{secrets.token_hex(8)}"
            lock = self.lock(name)
            lock.acquire()
            folder = self.tmp / name
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            (self.locks / f"{name}.lock").unlink(missing_ok=True)

    def copy(self, old: str, new: str) -> Entry:
        """Give the model of a key another name; no file is copied.

        Raises ReferenceNotFound (no such key), StoreError (the name is taken), ConfigError (not a name).
        """
        entry = self.find(old)
        if entry is None:
            raise ReferenceNotFound(f"'{old}' is not in the store")
        new = check_name(new).lower()
        if new in aliases() or SOURCES.has(new.partition(":")[0]):
            raise StoreError(f"'{new}' means something of its own; choose another name")
        with disk_errors(f"copy {old} to {new}"), self.store_lock():
            if self.has(new):
                raise StoreError(f"'{new}' is in the store already; remove it first with: mullama rm {new}")
            return self.write_entry(replace(entry, key=new))

    def set_aside(self, entry: Entry) -> None:
        """Take a damaged model out of use: its blob moves to ``quarantine/``; files elsewhere only get a mark there."""
        self.quarantine.mkdir(parents=True, exist_ok=True)
        target = self.quarantine_path(entry)
        with self.store_lock():
            for path, _, _ in self.files_of(entry):
                self.digests.forget(path)
            if entry.place is not None:
                target.touch()
            elif entry.parts:
                target.touch()
                shutil.rmtree(target.with_suffix(".parts"), ignore_errors=True)
                with contextlib.suppress(FileNotFoundError):
                    self.path_of(entry).parent.rename(target.with_suffix(".parts"))
            else:
                with contextlib.suppress(FileNotFoundError):
                    self.path_of(entry).replace(target)
        log.error("%s is damaged; it was set aside in %s", entry.key, self.quarantine)

    def remove(self, key: str) -> int:
        """Forget a key, and its blob when no other key uses it; returns the bytes freed.

        A server that has the file open keeps its pages. Raises ReferenceNotFound, StoreError.
        """
        path = self._ref_path(key)
        if not self.has(key):
            raise ReferenceNotFound(f"'{key}' is not in the store")
        entry = self.read(key)
        with disk_errors(f"remove {key} from the store"), self.store_lock():
            path.unlink(missing_ok=True)
            sync_folder(self.refs)
            freed = self._drop_unused()
            if entry is not None and entry.place is not None:
                freed += self._remove_in_place(entry)
            return freed

    def _drop_unused(self) -> int:
        """Remove the blobs of no ref; the bytes freed. The caller holds the store's lock; a damaged ref keeps all."""
        if self.is_any_ref_damaged():
            log.warning("a file in %s is damaged; no model file is removed", self.refs)
            return 0
        used = {entry.sha256 for entry in self.entries()}
        freed = 0
        for folder in (self.blobs, self.quarantine):
            for path in [*folder.glob("sha256-*.gguf"), *folder.glob("sha256-*.parts")]:
                if path.stem.removeprefix("sha256-") in used:
                    continue
                freed += size_on_disk(path)
                for file in path.glob("*") if path.is_dir() else (path,):
                    self.digests.forget(file)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        return freed

    def _remove_in_place(self, entry: Entry) -> int:
        """Remove an entry's files from another program's cache, where this store put them there and no entry needs
        them; the bytes freed. The caller holds the store's lock."""
        if entry.is_borrowed or self.is_any_ref_damaged():
            return 0
        needed = {path for other in self.entries() for path, _, _ in self.files_of(other)}
        freed = 0
        for path, _, _ in self.files_of(entry):
            if path in needed or not path.exists():
                continue
            target, size = path.resolve(), path.stat().st_size
            is_link = path.is_symlink()
            if not is_link or not _is_linked(target, but=path):
                self.digests.forget(path)
                freed += size
            path.unlink()
            # The cache's snapshots are links to files that several revisions may share.
            if is_link and not _is_linked(target, but=path):
                target.unlink(missing_ok=True)
        self.quarantine_path(entry).unlink(missing_ok=True)
        return freed

    def write_entry(self, entry: Entry) -> Entry:
        """Place the ref atomically. The caller holds the store's lock."""
        path = self._ref_path(entry.key)
        part = self.tmp / f"{hash_key(entry.key)}.json"
        self.tmp.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            json.dump(entry.to_json(), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(self.refs)
        return entry

    def make_folders(self) -> None:
        """Raises OSError, ConfigError (no home)."""
        need_home(self.root)
        for folder in (self.blobs, self.refs, self.tmp, self.locks):
            folder.mkdir(parents=True, exist_ok=True)

    # -- files and locks

    def _ref_path(self, key: str) -> Path:
        """SAFETY: every character that could leave the folder is percent-encoded; a dot never starts the name."""
        name = quote(key, safe="")
        if len(name) > 150 or not name or name.startswith("."):
            name = f"{name.lstrip('.')[:100]}~{hash_key(key)}"
        return self.refs / f"{name}.json"

    def _read_ref(self, path: Path) -> Entry | None:
        try:
            return Entry.from_json(json.loads(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            log.warning("%s is damaged and ignored", path)
            return None

    def is_any_ref_damaged(self) -> bool:
        """Whether a ref cannot be read, so that nobody knows which blob it needs."""
        return any(self._read_ref(path) is None for path in self.refs.glob("*.json"))

    def lock(self, name: str) -> BaseFileLock:
        import filelock

        return filelock.FileLock(self.locks / f"{name}.lock")

    def store_lock(self) -> BaseFileLock:
        self.locks.mkdir(parents=True, exist_ok=True)
        return self.lock("store")


def named(reference: Reference, name: str) -> Reference:
    """The reference to be kept under a name of the user's. Raises StoreError for a name that means something else."""
    name = name.lower()
    if name in aliases() and aliases()[name].locations != reference.locations:
        raise StoreError(f"'{name}' is an alias that comes with mullama; choose another name")
    return replace(reference, key=name, alias=name)


def _report_verifying(progress: Progress, size: int, done: int) -> None:
    progress("verifying", done, size)


def hash_key(key: str) -> str:
    """What stands for a key in the names of locks and temporary folders."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def how_to_get(reference: Reference, how: str = "fetch it with: mullama pull") -> str:
    if reference.source == MADE:
        return "it was made here, and only making it again brings it back"
    return f"{how} {reference.key}"


def _is_linked(target: Path, *, but: Path) -> bool:
    """Whether another link of a hub's cache (``models--a--b/snapshots``) leads to the file ``target`` in ``blobs``."""
    snapshots = target.parent.parent / "snapshots"
    return any(link != but and link.is_symlink() and link.resolve() == target for link in snapshots.rglob("*"))
