"""Uploaded files and those that batches make, in a folder: ``ID.data`` beside ``ID.json``, which comes last.

Any thread; every method that says so raises FilesError, or FilesFull where the disk or the limit leaves no room, and
then what was there is there still. One server at a time has a folder.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import msgspec

from mullama.errors import FilesError, FilesFull, NotFound
from mullama.files import human_size, sync_folder
from mullama.home import NOWHERE, default_root, expand

log = logging.getLogger(__name__)

LEAST = 4096  # bytes that a file counts for, however little it holds
PART = ".part"  # ends the name of a file that is being written


def files_folder(named: str) -> Path | None:
    """The folder that ``--files-dir`` names, or the one in the home; None: there is no home."""
    if named:
        return expand(named).absolute()
    root = default_root()
    return None if root == NOWHERE else root / "files"


class StoredFile(msgspec.Struct, kw_only=True):
    id: str
    tenant: str | None
    filename: str
    purpose: str
    bytes: int
    created_at: int

    def shown(self) -> dict[str, object]:
        """As OpenAI's clients read it."""
        told = {name: getattr(self, name) for name in ("id", "bytes", "created_at", "filename", "purpose")}
        return {"object": "file", **told, "status": "processed", "status_details": None, "expires_at": None}


_decoder = msgspec.json.Decoder(StoredFile)


class FileStore:
    """``max_bytes``: of all files; a tenant may have half of it."""

    def __init__(self, folder: Path | None, max_bytes: int) -> None:
        """``folder`` None: there is nowhere to keep files."""
        self._folder = folder
        self.max_bytes = max_bytes
        self._files: dict[str, StoredFile] = {}
        self._lock = threading.Lock()
        self._folder_lock: filelock.BaseFileLock | None = None
        self._n_pending = 0  # bytes of uploads that go on

    @property
    def is_there(self) -> bool:
        """Whether anybody has kept a file yet."""
        return self._folder is not None and self._folder.is_dir()

    def open(self) -> Path:
        """The folder, made if need be; found files are known from now on. Raises FilesError. Idempotent."""
        with self._lock:
            if self._folder is None:
                raise FilesError("there is no home folder to keep files in; name one with --files-dir")
            if self._folder_lock is None:
                with _disk_errors("keep files"):
                    self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                    self._folder_lock = _locked(self._folder)
                    self._scan(self._folder)
            return self._folder

    def close(self) -> None:
        """Let another server have the folder. Idempotent."""
        with self._lock:
            if self._folder_lock is not None:
                self._folder_lock.release()
                self._folder_lock = None

    def _scan(self, folder: Path) -> None:
        for found in folder.glob("file-*.json"):
            try:
                one = _decoder.decode(found.read_bytes())
            except (OSError, msgspec.MsgspecError) as error:
                log.warning("%s is not read: %s", found, error)
                continue
            self._files[one.id] = one
        for left in folder.glob(f"file-*{PART}"):  # of an upload that was cut
            left.unlink(missing_ok=True)

    # -- what there is

    def get(self, file_id: str, tenant: str | None) -> StoredFile:
        """Raises NotFound, also for another tenant's, and FilesError."""
        self.open()
        one = self._files.get(file_id)
        if one is None or one.tenant != tenant:
            raise NotFound(f"there is no file '{file_id[:80]}'", param="file_id")
        return one

    def of_tenant(self, tenant: str | None) -> list[StoredFile]:
        """The oldest first. Raises FilesError."""
        self.open()
        return sorted(
            (one for one in list(self._files.values()) if one.tenant == tenant), key=lambda one: one.created_at
        )

    def path_of(self, one: StoredFile) -> Path:
        return self.open() / f"{one.id}.data"

    def delete(self, file_id: str, tenant: str | None) -> None:
        """Raises NotFound, FilesError."""
        one = self.get(file_id, tenant)
        with _disk_errors("delete the file"):
            (self.open() / f"{one.id}.json").unlink(missing_ok=True)
            self.path_of(one).unlink(missing_ok=True)
        self._files.pop(one.id, None)

    # -- new ones

    def keep(self, part: Path, tenant: str | None, filename: str, purpose: str) -> StoredFile:
        """A file that is written already, at ``part`` in the folder, becomes one of the store. Raises FilesError."""
        folder = self.open()
        with _disk_errors("keep the file"):
            one = StoredFile(
                id=f"file-{secrets.token_hex(12)}",
                tenant=tenant,
                filename=filename,
                purpose=purpose,
                bytes=part.stat().st_size,
                created_at=int(time.time()),
            )
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(self.path_of(one))
            write_whole(folder / f"{one.id}.json", msgspec.json.encode(one))
        self._files[one.id] = one
        return one

    def upload(self, tenant: str | None) -> Upload:
        """Raises FilesError."""
        return Upload(self, self.open() / f"file-{secrets.token_hex(12)}{PART}", tenant)

    def take_room(self, n: int, tenant: str | None, n_so_far: int) -> None:
        """Count ``n`` more bytes of an upload. Raises FilesFull."""
        with self._lock:
            files = list(self._files.values())
            held = sum(max(one.bytes, LEAST) for one in files) + self._n_pending
            mine = sum(max(one.bytes, LEAST) for one in files if one.tenant == tenant) + n_so_far
            share = self.max_bytes if tenant is None else self.max_bytes // 2
            if held + n > self.max_bytes or mine + n > share:
                raise FilesFull(f"files may take {human_size(share)} here (--files-bytes); delete some", param="file")
            self._n_pending += n

    def give_room(self, n: int) -> None:
        with self._lock:
            self._n_pending -= n


class Upload:
    """A file that comes piece by piece; ``with`` takes it away again where it was not kept."""

    def __init__(self, store: FileStore, part: Path, tenant: str | None) -> None:
        self._store = store
        self._part = part
        self._tenant = tenant
        self.n_bytes = 0

    def __enter__(self) -> Upload:
        self._store.take_room(LEAST, self._tenant, 0)
        try:
            with _disk_errors("keep the file"):
                self._file = self._part.open("wb")
        except FilesError:
            self._store.give_room(LEAST)
            raise
        return self

    def write(self, data: bytes) -> None:
        """Raises FilesFull, FilesError."""
        self._store.take_room(len(data), self._tenant, self.n_bytes + LEAST)
        self.n_bytes += len(data)
        with _disk_errors("keep the file"):
            self._file.write(data)

    def keep(self, filename: str, purpose: str) -> StoredFile:
        """Raises FilesFull, FilesError."""
        with _disk_errors("keep the file"):
            self._file.close()
        return self._store.keep(self._part, self._tenant, filename, purpose)

    def __exit__(self, *exc: object) -> None:
        self._store.give_room(self.n_bytes + LEAST)
        with contextlib.suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """The file has all of it or is what it was. Raises OSError."""
    part = path.with_name(f"{path.name}{PART}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _locked(folder: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise FilesError(f"another server keeps its files in {folder}; name another folder with --files-dir") from None
    return lock


@contextlib.contextmanager
def _disk_errors(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FilesFull(f"cannot {action}: the disk is full", param="file") from error
        raise FilesError(f"cannot {action}: {error}") from error
    except NotImplementedError as error:  # filelock: the file system has no locks
        raise FilesError(f"cannot {action}: {error}") from error
