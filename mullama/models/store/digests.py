"""The sha256 of files, remembered: a file that did not change since it was hashed is not hashed again.

A record lies in ``digests/`` of the store, one a file, found by device and inode. It holds the size and the time of
the last change as they were when the file was hashed; where either differs now, the record says nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from mullama.errors import StoreError
from mullama.files import store_error
from mullama.home import default_root

#: Called with the bytes done.
Done = Callable[[int], None]

_BLOCK = 1 << 20
#: A file changed this shortly before it was hashed may change again without a new time, which ticks every few ms.
_SETTLED_NS = 50_000_000


def hash_file(path: Path, progress: Done | None = None) -> str:
    """The sha256 of a file in hex; ``progress`` is called with the bytes done."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


class Digests:
    """Remembered digests in a folder. Several processes may use it at once; a folder that cannot be written, or a
    damaged record, only means that files are hashed again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def known(self, path: Path) -> str | None:
        """The digest of a file that did not change since it was hashed; None: it must be hashed. Raises OSError."""
        info = path.stat()
        try:
            record = json.loads(self._record(info).read_bytes())
            is_same = record["size"] == info.st_size and record["mtime_ns"] == info.st_mtime_ns
            digest: object = record["sha256"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return digest if is_same and isinstance(digest, str) else None

    def note(self, path: Path, sha256: str) -> None:
        """Remember a digest of a file that nobody else can be writing. Raises OSError when the file is gone."""
        self._write(path, path.stat(), sha256)

    def of(self, path: Path, progress: Done | None = None) -> str:
        """The digest of a file, from the record or by hashing. Raises StoreError (it changes meanwhile), OSError."""
        if digest := self.known(path):
            return digest
        before = path.stat()
        digest = hash_file(path, progress)
        after = path.stat()
        if _identity(before) != _identity(after):
            raise StoreError(f"{path} was changed while it was read")
        if time.time_ns() - after.st_mtime_ns > _SETTLED_NS:
            self._write(path, after, digest)
        return digest

    def forget(self, path: Path) -> None:
        """Drop the record of a file. Never raises."""
        with contextlib.suppress(OSError):
            self._record(path.stat()).unlink()

    def prune(self) -> None:
        """Drop the records of files that are gone. Never raises."""
        with contextlib.suppress(OSError):
            for record in self._folder.glob("*.json"):
                try:
                    path = Path(json.loads(record.read_bytes())["path"])
                    is_stale = not path.exists() or self._record(path.stat()) != record
                except (OSError, ValueError, TypeError, KeyError):
                    is_stale = True
                if is_stale:
                    record.unlink(missing_ok=True)

    def _record(self, info: os.stat_result) -> Path:
        return self._folder / f"{info.st_dev:x}-{info.st_ino:x}.json"

    def _write(self, path: Path, info: os.stat_result, sha256: str) -> None:
        record = self._record(info)
        # Whole or not at all, without a lock: a name of its own, then a rename.
        part = record.with_suffix(f".{secrets.token_hex(4)}")
        fields = {"path": str(path), "size": info.st_size, "mtime_ns": info.st_mtime_ns, "sha256": sha256}
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(fields), encoding="utf-8")
            part.replace(record)


def digest_of(path: str | Path, progress: Done | None = None, *, root: Path | None = None) -> str:
    """The sha256 of any file, hashed only when it changed since the last time (device, inode, size, time of change).

    ``root`` is the store whose records are used. Raises StoreError: the file cannot be read, or changes meanwhile.
    """
    try:
        return Digests((root or default_root()) / "digests").of(Path(path), progress)
    except OSError as error:
        raise store_error(f"read {path}", error) from None


def _identity(info: os.stat_result) -> tuple[int, int, int, int]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
