"""What the built-in eviction policies share."""

from __future__ import annotations

from mullama.kv.eviction.policy import Entry
from mullama.plugins.parameters import Policy


class Eviction(Policy):
    """Declared parameters, and no memory of what went."""

    def evicted(self, entry: Entry, score: float) -> None:
        """Nothing to learn from it."""
