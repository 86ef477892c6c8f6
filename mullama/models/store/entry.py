"""What the store knows of one model: an entry, written as one JSON file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mullama.models.reference import Reference

#: The source of entries that were made here (a quantised variant) and can be fetched from nowhere.
MADE = "made"
#: Sources whose references mean what is newest there: a branch, a tag, what a server has at an address.
_MOVING = ("hf", "ollama", "https", "http")

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a model in several files."""

    filename: str
    sha256: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One ref: what was pulled, under which name, and the blob it is."""

    key: str
    source: str
    locations: tuple[str, ...]
    filename: str  # what the source called the file; of several parts the first
    sha256: str  # of several parts: see set_digest
    size: int  # bytes, of all parts
    license: str | None
    pulled_at: str  # UTC, ISO 8601
    parts: tuple[Part, ...] = ()  # a split GGUF, in order; empty: one file
    place: str | None = None  # the folder of files that are not the store's own (the cache of the hub's client)
    is_borrowed: bool = False  # those files were there before; ``rm`` leaves them
    revision: str | None = None  # what the source resolved: a commit, a manifest's digest, an ETag
    quant: str | None = None
    variant_of: str | None = None  # key of the model of which this is another quantisation
    defaults: dict[str, Any] = field(default_factory=dict)  # parameters that came with it (temperature, stop, num_ctx)
    template: str | None = None  # a template that came beside the file (Ollama's, in Go's language)
    system: str | None = None  # a system message that came beside the file
    license_text: str | None = None

    @property
    def is_named(self) -> bool:
        """Whether the key is a name (an alias, or NAME of ``pull NAME=REFERENCE``) and not the reference itself."""
        return not self.key.startswith(f"{self.source}:")

    def to_reference(self) -> Reference:
        """The reference that this entry answers, pinned to its bytes unless its source may have newer ones by now."""
        is_pinned = self.source not in _MOVING and not self.parts
        return Reference(
            key=self.key,
            source=self.source,
            locations=self.locations,
            alias=self.key if self.is_named else None,
            sha256=self.sha256 if is_pinned else None,
            size=self.size if is_pinned else None,
            license=self.license,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that say something, for the ref's file and for ``--json``."""
        optional = {name for name, default in _OPTIONAL.items() if getattr(self, name) == default}
        return {name: value for name, value in asdict(self).items() if name not in optional}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Raises ValueError, TypeError or KeyError for what is no entry.

        SAFETY: digests and file names become paths, so nothing else may pass for one.
        """
        parts = tuple(Part(**part) for part in data.get("parts", ()))
        entry = cls(**{**data, "locations": tuple(data["locations"]), "parts": parts})
        names = [part.filename for part in parts] or [entry.filename]
        digests = [entry.sha256, *(part.sha256 for part in parts)]
        sizes = [entry.size, *(part.size for part in parts)]
        if not all(map(is_digest, digests)) or not all(type(size) is int for size in sizes):
            raise ValueError("not a digest or not a size")
        if (parts or entry.place is not None) and not all(map(is_plain_name, names)):
            raise ValueError("not a file name")
        if not isinstance(entry.key, str) or not isinstance(entry.defaults, dict):
            raise ValueError("not a key")
        return entry


_OPTIONAL: dict[str, Any] = {
    "parts": (), "place": None, "is_borrowed": False, "revision": None, "quant": None, "variant_of": None,
    "defaults": {}, "template": None, "system": None, "license_text": None,
}  # fmt: skip


def is_digest(text: str) -> bool:
    """Whether a text is a sha256 in lower-case hex. SAFETY: only such a text becomes part of a path."""
    return _HEX.fullmatch(text) is not None


def is_plain_name(name: str) -> bool:
    """Whether a text names a file in a folder and nothing outside it."""
    return bool(name) and name not in (".", "..") and not re.search(r"[/\\\0]", name) and len(name.encode()) <= 255


def set_digest(digests: Iterable[str]) -> str:
    """One digest for a set of files: the sha256 of the files' digests, in order, a line each."""
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
