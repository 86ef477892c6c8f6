"""Who is unloaded when another model needs the room: a policy names one of the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mullama.plugins.groups import PluginGroup


@dataclass(frozen=True, slots=True)
class ModelView:
    """A loaded model that may be unloaded: nobody has pinned it. Times in seconds."""

    name: str
    n_bytes: int
    idle_s: float
    loaded_s: float  # since it was loaded
    n_requests: int
    in_use: int  # requests that would have to end first


class ModelPolicy(Protocol):
    """Made without arguments."""

    def victim(self, candidates: Sequence[ModelView]) -> str:
        """Name of the one to unload; there is at least one."""


class Lru:
    """The one that has been idle longest; one that is in use only where all are."""

    def victim(self, candidates: Sequence[ModelView]) -> str:
        return min(candidates, key=lambda one: (one.in_use > 0, -one.idle_s, one.name)).name


class Largest:
    """The one that frees the most memory, idle ones first."""

    def victim(self, candidates: Sequence[ModelView]) -> str:
        return min(candidates, key=lambda one: (one.in_use > 0, -one.n_bytes, -one.idle_s, one.name)).name


POLICIES = PluginGroup(
    "mullama.model_policies",
    "model policy",
    {"lru": "mullama.serving.model_eviction:Lru", "largest": "mullama.serving.model_eviction:Largest"},
)
