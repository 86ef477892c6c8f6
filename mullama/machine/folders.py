"""Folders that a server writes to: whether it can, and what room their disks have."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mullama import abi


@dataclass(frozen=True, slots=True)
class Folder:
    """``problem``: why nothing can be written there, None: it can. ``free``: bytes on its disk, None: unknown."""

    path: Path
    problem: str | None
    free: int | None


def look(path: Path) -> Folder:
    """Try to write into a folder, and leave nothing behind; one that is missing is made and removed again."""
    return Folder(path, _problem(path), free_bytes(path))


def page_folder(asked: str) -> Folder:
    """The folder of the instrumentation pages, the one that was asked for or the usual one."""
    try:
        return look(Path(asked).expanduser() if asked else abi.runtime_dir())
    except OSError as error:  # there is no folder for temporary files
        return Folder(Path(os.environ.get("TMPDIR", "/tmp")), error.strerror or str(error), None)


def free_bytes(path: Path) -> int | None:
    """Bytes that are free on the disk of a folder, or of the one that it would be made in."""
    for there in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(there).free
    return None


def _problem(path: Path) -> str | None:
    missing = []
    for folder in (path, *path.parents):
        if os.path.lexists(folder):
            break
        missing.append(folder)
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir(mode=0o700)
            made.append(folder)
        with tempfile.TemporaryFile(dir=path):
            return None
    except OSError as error:
        return error.strerror or str(error)
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # somebody else uses it meanwhile
                folder.rmdir()
