"""What an eviction policy is asked. Sans-I/O: no clock, thread, model or event loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Entry(Protocol):
    """A stretch of cached tokens as a policy sees it; it is kept up to date, and a policy only reads it."""

    @property
    def start(self) -> int:
        """Tokens before it: [start, end) of its prompts."""

    @property
    def end(self) -> int: ...

    @property
    def n_tokens(self) -> int: ...

    @property
    def n_bytes(self) -> int:
        """Host memory it takes."""

    @property
    def n_served(self) -> int:
        """Tokens of its prompt, from the start, that have served another prompt; ``end`` if it has itself."""

    created_ns: int
    used_ns: int  # when it last served a prompt, or was stored
    hits: int  # prompts that it served
    cost_ns: float  # what computing it took; 0 while unknown


class EvictionPolicy(Protocol):
    """Decides which stretch of KV goes first when a tier is full. Called on the engine thread.

    Only stretches that nothing depends on can go (the leaves of the prefix tree), so a policy need not think of that.
    """

    @property
    def name(self) -> str:
        """What it is called; a class attribute will do."""

    def score(self, entry: Entry, now_ns: int) -> float:
        """The lowest goes first. Asked when an entry was stored, served a prompt, or can now go; kept until then."""

    def evicted(self, entry: Entry, score: float) -> None:
        """It goes (or a part of it)."""

    def params(self) -> Mapping[str, Any]:
        """The policy's parameters and their values."""
