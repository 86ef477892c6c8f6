"""What becomes of a text that has more tokens than it may."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Cut:
    """What becomes of a text that is too long: cut to ``most`` tokens, or refused where that is None."""

    most: int | None = None
    keeps_end: bool = False

    def of(self, tokens: list[int], head: list[int], tail: list[int]) -> list[int]:
        """The tokens that stay; what the vocabulary puts around a text (``head``, ``tail``) does."""
        if self.most is None or len(tokens) <= self.most:
            return tokens
        before = len(head) if tokens[: len(head)] == head else 0
        behind = len(tail) if tail and tokens[-len(tail) :] == tail else 0
        room = max(self.most - before - behind, 0)
        inner = tokens[before : len(tokens) - behind]
        kept = inner[len(inner) - room :] if self.keeps_end else inner[:room]
        return [*tokens[:before], *kept, *tokens[len(tokens) - behind :]]
