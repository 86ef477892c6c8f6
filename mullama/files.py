"""Files and sizes: durable renames, what tells one file from another, the system's errors and bytes in words."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mullama.errors import DiskFull, StoreError

STDIO = Path("-")  # stands for stdin where a file is read, for stdout where one is written


def read_file(path: Path) -> bytes:
    """What a file, or stdin, holds. Raises OSError."""
    return sys.stdin.buffer.read() if path == STDIO else path.read_bytes()


def write_text(path: Path, text: str) -> None:
    """Write a text to a file in UTF-8, or to stdout. Raises OSError; then the file is what it was."""
    if path == STDIO:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    target = path.resolve()  # of a link, not the link
    if target.exists() and not target.is_file():  # a pipe, /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    part = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}")
    try:
        part.write_text(text, encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, part)
        part.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY) or not target.exists():
            raise
        path.write_text(
            text, encoding="utf-8"
        )  # it may be written, and its folder not: as a container's mount of one file


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


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?)(b?)|b)?", re.IGNORECASE)


def parse_size(text: str, *, binary: bool = False) -> int:
    """A number as people write it: ``8GB`` is 8 * 10**9, ``8GiB`` 8 * 2**30. ``binary``: ``4k`` is 4096.

    Raises ValueError for anything else, and for what is no whole number.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, unit, i, _ = match.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    value = float(number) * (1024 if i or binary else 1000) ** power
    if not value.is_integer():
        raise ValueError(text)
    return int(value) if power or "." in number else int(number)


def counted(n: int, word: str) -> str:
    """``1 thread``, ``2 threads``, ``1,024 threads``."""
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def count_of(n: int) -> str:
    """A number of parameters as models are named by: 135M, 1.7B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.1f}".rstrip("0").rstrip(".") + unit if n < 10 * size else f"{n / size:.0f}{unit}"
    return str(n)


def human_size(size: int) -> str:
    """Bytes in decimal units, as file managers and package indexes show them."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of everything in a folder."""
    total = 0
    with contextlib.suppress(OSError):
        for file in path.rglob("*") if path.is_dir() else (path,):
            with contextlib.suppress(OSError):
                total += file.stat().st_size if file.is_file() else 0
    return total
