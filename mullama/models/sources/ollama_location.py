"""What a user writes for a model of an Ollama registry: ``[HOST/][NAMESPACE/]NAME[:TAG]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mullama.errors import ReferenceNotFound

_LOCATION = re.compile(
    r"(?:(?P<host>(?:https?://)?[A-Za-z0-9](?:[A-Za-z0-9-]*\.[A-Za-z0-9.-]*[A-Za-z0-9]|[A-Za-z0-9.-]*:\d{1,5}"
    r"|[A-Za-z0-9.-]*\.[A-Za-z0-9.-]*:\d{1,5}))/)?"
    r"(?:(?P<namespace>[A-Za-z0-9][A-Za-z0-9_.-]{0,79})/)?"
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,79})"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}))?"
)


@dataclass(frozen=True, slots=True)
class Location:
    host: str | None  # with a port, and a scheme where one was written
    namespace: str
    name: str
    tag: str

    @property
    def repository(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def short(self) -> str:
        """As Ollama shows it: without the library's namespace."""
        name = self.name if self.namespace == "library" else self.repository
        return f"{name}:{self.tag}"

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}:{self.tag}" if self.host else self.short


def parse_location(text: str) -> Location:
    """Raises ReferenceNotFound when it is not ``[HOST/][NAMESPACE/]NAME[:TAG]``."""
    match = _LOCATION.fullmatch(text.strip())
    if match is None or ".." in text:
        raise ReferenceNotFound(f"'ollama:{text[:120]}' is not of the form ollama:[HOST/][NAMESPACE/]NAME[:TAG]")
    host = match["host"].removeprefix("https://") if match["host"] else None
    return Location(host, match["namespace"] or "library", match["name"], match["tag"] or "latest")
