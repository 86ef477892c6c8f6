"""Files and sizes: durable renames, what tells one file from another, the system's errors and bytes in words."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mullama.errors import DiskFull, StoreError


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable. Windows cannot open folders, and has no need to."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """What the system refuses inside becomes a StoreError: "cannot ACTION: reason"."""
    try:
        yield
    except OSError as error:
        raise store_error(action, error) from error
    except NotImplementedError as error:  # filelock: the file system has no locks
        raise StoreError(f"cannot {action}: {error}") from error


def store_error(action: str, error: OSError) -> StoreError:
    """The StoreError that says why something could not be done."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"cannot {action}: the disk is full")
    where = f" ({error.filename})" if error.filename else ""
    return StoreError(f"cannot {action}: {error.strerror or error}{where}")


def identity_of(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does: inode, size, time of the last change. None: there is no such file."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def human_size(size: int) -> str:
    """Bytes in decimal units, as file managers and package indexes show them."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
