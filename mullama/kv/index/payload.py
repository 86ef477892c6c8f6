"""What nodes of the prefix tree hold: rows of KV in host memory, checkpoints, marks of what was evicted."""

from __future__ import annotations

from dataclasses import dataclass


class Rows:
    """KV of a stretch of tokens as the core packs it: chunks of bytes, each of whole tokens.

    ``token_bytes`` is 0 for models whose KV is all checkpoint; then there are no chunks.
    """

    __slots__ = ("chunks", "n_tokens", "token_bytes")

    def __init__(self, chunks: list[bytes], n_tokens: int, token_bytes: int) -> None:
        self.chunks = chunks
        self.n_tokens = n_tokens
        self.token_bytes = token_bytes

    @property
    def n_bytes(self) -> int:
        return self.n_tokens * self.token_bytes

    def split(self, n_tokens: int) -> tuple[Rows, Rows]:
        """Copies one chunk at most."""
        left: list[bytes] = []
        right: list[bytes] = []
        cut = n_tokens * self.token_bytes
        for chunk in self.chunks:
            if len(chunk) <= cut:
                left.append(chunk)
            elif cut > 0:
                left.append(chunk[:cut])
                right.append(chunk[cut:])
            else:
                right.append(chunk)
            cut = max(cut - len(chunk), 0)
        return (
            Rows(left, n_tokens, self.token_bytes),
            Rows(right, self.n_tokens - n_tokens, self.token_bytes),
        )

    def part(self, start: int, end: int) -> list[bytes]:
        """The chunks of the tokens [start, end)."""
        found: list[bytes] = []
        at, first, last = 0, start * self.token_bytes, end * self.token_bytes
        for chunk in self.chunks:
            low, high = max(first - at, 0), min(last - at, len(chunk))
            if low < high:
                found.append(chunk if high - low == len(chunk) else chunk[low:high])
            at += len(chunk)
        return found


class Checkpoint:
    """What of a sequence's state cannot be cut, as it was at the end of a node."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def n_bytes(self) -> int:
        return len(self.data)

    def split(self, n_tokens: int) -> tuple[Checkpoint, Checkpoint]:
        raise TypeError("a checkpoint holds at one position and cannot be cut")


@dataclass(slots=True, frozen=True)
class Ghost:
    """A stretch that was cached once: when it went, and for whose request, of which namespace."""

    evicted_ns: int
    request: str | None
    namespace: bytes = b""

    @property
    def n_bytes(self) -> int:
        return 0

    def split(self, n_tokens: int) -> tuple[Ghost, Ghost]:
        return self, self
