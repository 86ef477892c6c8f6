"""Sources: what turns a reference into the bytes of a GGUF file.

A source is a class registered under its scheme in the entry-point group ``mullama.sources``; the built-in ones are
declared in :data:`SOURCES` in the same form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

from mullama.faults import crash_point
from mullama.models.reference import LOCAL, Reference
from mullama.plugins.groups import PluginGroup

#: Called with what is being done, bytes done, and bytes in all (None while unknown).
Progress = Callable[[str, int, int | None], None]

#: Of one whose references may mean newer bytes later, ``store/entry.py`` has the name too; ``parse.py`` has the forms.
SOURCES = PluginGroup(
    "mullama.sources",
    "model source",
    {
        LOCAL: "mullama.models.sources.local:LocalSource",
        "pypi": "mullama.models.sources.pypi:PypiSource",
        "hf": "mullama.models.sources.hub:HubSource",
        "ollama": "mullama.models.sources.ollama:OllamaSource",
        "https": "mullama.models.sources.web:WebSource",
        "http": "mullama.models.sources.web:PlainWebSource",
    },
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
        crash_point("pull:in-download")

    @property
    def sha256(self) -> str:
        """Of everything written so far, in hex."""
        return self._hash.hexdigest()


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """One file that a source has ready, with the digest of the bytes that are on disk."""

    path: Path
    filename: str  # what the source calls it, without folders
    sha256: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a resumable source hands to the store: one file, or the parts of a split GGUF in order."""

    files: tuple[FetchedFile, ...]
    is_in_place: bool = False  # the files stay where they are, and the store only refers to them
    is_borrowed: bool = False  # in place, and they were there before
    license: str | None = None
    license_text: str | None = None
    revision: str | None = None
    quant: str | None = None
    template: str | None = None
    system: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """One pull, as a resumable source sees it."""

    folder: Path  # for what is being downloaded; after a failure it is kept, and the next attempt finds it
    progress: Progress
    allow_private: bool  # whether addresses that are not public, and plain HTTP, are allowed
    is_forced: bool  # nothing that was fetched before is to be trusted
    check_space: Callable[[int], None]  # raises StoreError when so many bytes do not fit
    have: Callable[[str], Path | None]  # a file of the store by its sha256, verified; to be left as it is


class Source(Protocol):
    """Resolves the references of one scheme. Made without arguments.

    A source that can resume has ``obtain`` instead of ``fetch`` (:class:`ResumableSource`). Two more methods are
    optional. ``with_quant(location, quant) -> str`` is the location that asks for this quantisation, or the same one
    where it names a file already. ``served_name(location, filename) -> str | None`` is the name clients use by
    default; None leaves it to the file's name.
    """

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


@runtime_checkable
class ResumableSource(Protocol):
    """A source whose downloads go on where they stopped, or whose models are more than one file."""

    def normalise(self, location: str) -> str: ...

    def locate(self, reference: Reference) -> Path | None: ...

    def obtain(self, reference: Reference, job: Job) -> Fetched:
        """Have the model's files ready, in ``job.folder`` or in place.

        What raises StoreError or KeyboardInterrupt may leave half a file in the folder for the next attempt.
        Raises ReferenceNotFound (no such model), StoreError (a failed download).
        """


def load_source(scheme: str) -> Source | ResumableSource:
    """The source of a scheme. Raises PluginError."""
    return cast("Source | ResumableSource", SOURCES.load(scheme)())
