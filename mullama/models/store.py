"""The store: verified model files under ``$MULLAMA_HOME``, addressed by their sha256.

::

    blobs/sha256-<hex>.gguf   the files; never changed after they appear
    refs/<key>.json           what was pulled, and which blob it is
    tmp/<hash of key>/        one download in progress; locks/<hash of key>.lock says by a living process
    locks/store.lock          held for the moment in which blobs and refs change together

A blob appears by an atomic rename after its sha256 was verified and its bytes were synced, its ref after it. So a
ref whose blob has the recorded size is complete, and resolving one costs a read and a stat.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mullama.errors import ReferenceNotFound, StoreError
from mullama.files import disk_errors, store_error, sync_folder
from mullama.models import gguf
from mullama.models.reference import Reference, aliases
from mullama.models.sources import Progress, Sink, load_source

if TYPE_CHECKING:
    from filelock import BaseFileLock

HOME_VARIABLE = "MULLAMA_HOME"

log = logging.getLogger(__name__)
_HEX = re.compile(r"[0-9a-f]{64}")


def no_progress(what: str, done: int, total: int | None) -> None:
    """The Progress of callers who do not want any."""


def default_root() -> Path:
    """``$MULLAMA_HOME``, else the platform's cache folder for mullama."""
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home).expanduser().absolute()
    # Imported here: it costs more than a lookup in the store.
    import platformdirs

    return Path(platformdirs.user_cache_dir("mullama", appauthor=False))


@dataclass(frozen=True, slots=True)
class Entry:
    """One ref: what was pulled, under which name, and the blob it is."""

    key: str
    source: str
    locations: tuple[str, ...]
    filename: str  # what the source called the file
    sha256: str
    size: int  # bytes
    license: str | None
    pulled_at: str  # UTC, ISO 8601

    @property
    def is_named(self) -> bool:
        """Whether the key is a name (an alias, or NAME of ``pull NAME=REFERENCE``) and not the reference itself."""
        return not self.key.startswith(f"{self.source}:")

    def to_reference(self) -> Reference:
        """The reference that this entry answers, pinned to its bytes."""
        return Reference(
            key=self.key,
            source=self.source,
            locations=self.locations,
            alias=self.key if self.is_named else None,
            sha256=self.sha256,
            size=self.size,
            license=self.license,
        )


class Store:
    """May be used by several processes at once. Making one touches nothing; folders appear with the first pull."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else default_root()
        self._blobs = self.root / "blobs"
        self._refs = self.root / "refs"
        self._tmp = self.root / "tmp"
        self._locks = self.root / "locks"

    # -- reading

    def find(self, key: str) -> Entry | None:
        """The entry of a key, when its blob is there in full size; no hashing."""
        entry = self._read_ref(self._ref_path(key))
        if entry is None or entry.key != key or not self._is_complete(entry):
            return None
        return entry

    def has(self, key: str) -> bool:
        """Whether there is a ref of that key, complete or damaged, that ``remove`` would remove."""
        return self._ref_path(key).exists()

    def lookup(self, name: str) -> Reference | None:
        """What was pulled under a name or reference, for ``parse_spec``."""
        entry = self.find(name) or self.find(name.lower())
        return entry.to_reference() if entry else None

    def path_of(self, entry: Entry) -> Path:
        return self._blobs / f"sha256-{entry.sha256}.gguf"

    def resolve(self, reference: Reference) -> Path:
        """The file of a reference, without network and without hashing.

        Raises ReferenceNotFound: not pulled, or a local file that does not exist.
        """
        # PERF: the store first; importing a source (pip, zip files) costs ten times the lookup.
        entry = None if reference.is_local else self.find(reference.key)
        if entry is not None:
            return self.path_of(entry)
        located = load_source(reference.source).locate(reference)
        if located is None:
            raise ReferenceNotFound(f"{reference.key} is not in the store; fetch it with: mullama pull {reference.key}")
        return located

    def list(self) -> list[Entry]:
        """Every complete entry, by key."""
        try:
            paths = sorted(self._refs.glob("*.json"))
        except OSError as error:
            raise store_error("read the store", error) from None
        entries = [entry for path in paths if (entry := self._read_ref(path)) and self._is_complete(entry)]
        return sorted(entries, key=lambda entry: entry.key)

    # -- changing

    def pull(self, reference: Reference, progress: Progress = no_progress, *, force: bool = False) -> Entry:
        """Fetch a reference unless it is there, verify it and place it.

        ``force`` trusts nothing that is there: it is hashed again where the sha256 is known, else fetched again.
        A second process that pulls the same waits and finds it done. Raises ReferenceNotFound (no such model,
        or a local file, which is used where it lies), StoreError (network, disk full, wrong checksum),
        ModelLoadError (what was fetched is not a sound GGUF). Whatever is raised, nothing half-placed stays.
        """
        if reference.is_local:
            raise ReferenceNotFound(f"{reference.key} is a local file; it is used where it lies and needs no pull")
        if not force and (entry := self.find(reference.key)):
            return entry
        with disk_errors(f"keep {reference.key} in the store {self.root}"):
            for folder in (self._blobs, self._refs, self._tmp, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
            with self._key_lock(reference.key, progress):
                if not force and (entry := self.find(reference.key)):
                    return entry
                self._sweep(own=_hash(reference.key))
                return self._adopt(reference, progress) or self._fetch(reference, progress)

    def remove(self, key: str) -> int:
        """Forget a key, and its blob when no other key uses it; returns the bytes freed.

        A server that has the file open keeps its pages. Raises ReferenceNotFound, StoreError.
        """
        path = self._ref_path(key)
        if not self.has(key):
            raise ReferenceNotFound(f"'{key}' is not in the store")
        with disk_errors(f"remove {key} from the store"), self._store_lock():
            path.unlink(missing_ok=True)
            sync_folder(self._refs)
            return self._drop_unused_blobs()

    # -- the steps of a pull; the caller holds the key's lock

    def _adopt(self, reference: Reference, progress: Progress) -> Entry | None:
        """A blob that is here already under another key, verified again; None when there is none."""
        if reference.sha256 is None or not _HEX.fullmatch(reference.sha256):
            return None
        path = self._blobs / f"sha256-{reference.sha256}.gguf"
        try:
            size = path.stat().st_size
            if hash_file(path, lambda done: progress("verifying", done, size)) != reference.sha256:
                return None
            with self._store_lock():
                path.stat()  # it may have been removed meanwhile
                return self._write_ref(reference, _filename_of(reference), reference.sha256, size)
        except FileNotFoundError:
            return None

    def _fetch(self, reference: Reference, progress: Progress) -> Entry:
        folder = self._tmp / _hash(reference.key)
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed: we hold its lock
        folder.mkdir()
        try:
            self._check_space(reference)
            scratch = folder / "source"
            scratch.mkdir()
            part = folder / "model.gguf"
            with part.open("wb") as file:
                sink = Sink(file)
                filename = load_source(reference.source).fetch(reference, sink, scratch, progress)
                file.flush()
                os.fsync(file.fileno())
            _verify(reference, sink)
            header = gguf.check(part, label=reference.key)
            licence = header.get("general.license")
            if reference.license is None and isinstance(licence, str):
                # It is printed later; the file must not steer the terminal then.
                reference = replace(reference, license="".join(filter(str.isprintable, licence[:100])) or None)
            with self._store_lock():
                blob = self._blobs / f"sha256-{sink.sha256}.gguf"
                # One that is there already is replaced, for it may be damaged; who has it open keeps the old one.
                # On Windows an open file cannot be replaced, and need not be.
                with contextlib.suppress(*((PermissionError,) if blob.exists() else ())):
                    part.replace(blob)
                sync_folder(self._blobs)
                return self._write_ref(reference, filename, sink.sha256, sink.size)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write_ref(self, reference: Reference, filename: str, sha256: str, size: int) -> Entry:
        """Place the ref atomically. The caller holds the store's lock."""
        from datetime import UTC, datetime

        entry = Entry(
            key=reference.key,
            source=reference.source,
            locations=reference.locations,
            filename=filename,
            sha256=sha256,
            size=size,
            license=reference.license,
            pulled_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        path = self._ref_path(entry.key)
        part = self._tmp / f"{_hash(entry.key)}.json"
        with part.open("w", encoding="utf-8") as file:
            json.dump(asdict(entry), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(self._refs)
        return entry

    def _check_space(self, reference: Reference) -> None:
        """Refuse before the download what cannot fit, where the size is known."""
        if reference.size is None:
            return
        free = shutil.disk_usage(self._tmp).free
        if free < reference.size:
            raise StoreError(
                f"cannot pull {reference.key}: it needs {reference.size / 1e6:.0f} MB and the disk of {self.root} "
                f"has {free / 1e6:.0f} MB free"
            )

    def _sweep(self, own: str) -> None:
        """Remove what killed processes left: temporary folders whose lock nobody holds."""
        import filelock

        for path in self._tmp.iterdir():
            name = path.name.removesuffix(".json")
            if name == own:  # we hold that lock, and overwrite what lies there
                continue
            with contextlib.suppress(filelock.Timeout), self._lock(name).acquire(timeout=0):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _drop_unused_blobs(self) -> int:
        """Remove the blobs of no ref. The caller holds the store's lock; an unreadable ref keeps everything."""
        entries = [self._read_ref(path) for path in self._refs.glob("*.json")]
        if None in entries:
            log.warning("a file in %s is damaged; no model file is removed", self._refs)
            return 0
        used = {entry.sha256 for entry in entries if entry}
        freed = 0
        for blob in self._blobs.glob("sha256-*.gguf"):
            if blob.stem.removeprefix("sha256-") not in used:
                freed += blob.stat().st_size
                blob.unlink()
        return freed

    # -- files and locks

    def _ref_path(self, key: str) -> Path:
        """SAFETY: every character that could leave the folder is percent-encoded; a dot never starts the name."""
        name = quote(key, safe="")
        if len(name) > 150 or not name or name.startswith("."):
            name = f"{name.lstrip('.')[:100]}~{_hash(key)}"
        return self._refs / f"{name}.json"

    def _read_ref(self, path: Path) -> Entry | None:
        try:
            data: dict[str, Any] = json.loads(path.read_bytes())
            entry = Entry(**{**data, "locations": tuple(data["locations"])})
            if not _HEX.fullmatch(entry.sha256) or not isinstance(entry.size, int) or not isinstance(entry.key, str):
                raise ValueError
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            log.warning("%s is damaged and ignored", path)
            return None
        return entry

    def _is_complete(self, entry: Entry) -> bool:
        try:
            return self.path_of(entry).stat().st_size == entry.size
        except OSError:
            return False

    def _lock(self, name: str) -> BaseFileLock:
        import filelock

        return filelock.FileLock(self._locks / f"{name}.lock")

    @contextlib.contextmanager
    def _key_lock(self, key: str, progress: Progress) -> Iterator[None]:
        import filelock

        lock = self._lock(_hash(key))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            progress("waiting for another process that pulls the same", 0, None)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _store_lock(self) -> BaseFileLock:
        self._locks.mkdir(parents=True, exist_ok=True)
        return self._lock("store")


def named(reference: Reference, name: str) -> Reference:
    """The reference to be kept under a name of the user's. Raises StoreError for a name that means something else."""
    name = name.lower()
    if name in aliases() and aliases()[name].sha256 != reference.sha256:
        raise StoreError(f"'{name}' is an alias that comes with mullama; choose another name")
    return replace(reference, key=name, alias=name)


def _filename_of(reference: Reference) -> str:
    """What the source would call the file, as far as the reference tells."""
    name = re.split(r"[#/]", reference.locations[0])[-1]
    return re.sub(r"(\.gguf)\..*$", r"\1", name, flags=re.IGNORECASE)


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file in hex; ``progress`` is called with the bytes done."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            done += len(block)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


def _verify(reference: Reference, sink: Sink) -> None:
    if reference.sha256 is not None and sink.sha256 != reference.sha256:
        raise StoreError(
            f"{reference.key}: what was downloaded is not the file that was expected "
            f"(sha256 {sink.sha256}, expected {reference.sha256}); nothing was kept"
        )


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]
