"""What a resource says of itself: an ``Operation`` a method, beside its ``access``. ``document.py`` reads it.

A resource has ``operations``, by method: ``{"POST": Operation(…)}``. Behind a space follows what the path has below a
route that ends with ``{name:path}`` (``"POST /load"``), or the suffix of a route (``"GET one"``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, frozen=True)
class Parameter:
    """Of a query, or a header (``where``)."""

    name: str
    says: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    where: str = "query"


@dataclass(slots=True, frozen=True)
class Operation:
    """``body`` and ``answer`` are types that msgspec knows; an answer of None is empty, a str is its media type."""

    does: str
    body: Any = None
    answer: Any = dict[str, Any]
    streams: str = ""  # media type of the answer where it is streamed
    parameters: tuple[Parameter, ...] = ()
    takes: str = "application/json"  # media type of the body
    statuses: tuple[int, ...] = (200,)  # of answers that are no errors, or are no error objects


PROFILE = Parameter("X-Profile", "true: with the profile of the request", where="header")
#: Of most routes under /internal, and of those that llama-server has.
MODEL = Parameter("model", "a served name; without it the first model")


def unbuilt_schemas(unbuilt: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """For ``field_schemas``: fields that are refused while they are true as Python has it, and what they ask for."""
    idle: list[Any] = [None, False, 0, "", [], {}]
    return {name: {"enum": idle, "description": f"Not there yet: {what}."} for name, what in unbuilt.items()}


def flag(name: str, says: str) -> Parameter:
    """One that ``Request.flag`` reads."""
    return Parameter(name, says, {"enum": ["true", "false", "1", "0"]})
