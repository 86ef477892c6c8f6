"""What the tiers share: their shape, and the tiers that a cache has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mullama.kv.index.tree import Node, Payload

if TYPE_CHECKING:
    from mullama.kv.tiers.disk_tier import DiskTier
    from mullama.kv.tiers.host_tier import HostTier


class Tier(Protocol):
    """KV of nodes of the prefix tree within a budget of bytes. Who makes it calls back before a node goes for others.

    What can go is a leaf: a node of the tree in this tier below which nothing is in this tier, because KV is of use
    only with all that comes before it.
    """

    @property
    def budget(self) -> int: ...

    @property
    def used(self) -> int: ...

    def put(self, node: Node, payload: Payload | None, now_ns: int, checkpoint: Payload | None = None) -> bool:
        """Keep a node's KV, with the checkpoint at its end. False: it does not fit."""

    def ensure_free(self, n_bytes: int, now_ns: int, keep: Node | None = None) -> bool:
        """Evict until ``n_bytes`` more fit; ``keep`` and what is above it stay, and so does what is pinned.

        False: they do not fit.
        """

    def drop(self, node: Node, now_ns: int) -> int:
        """Give up a node's KV. Returns the bytes that that freed."""


@dataclass(slots=True)
class Tiers:
    """Where KV is kept that slots give up."""

    host: HostTier
    disk: DiskTier | None = None

    @property
    def has_any(self) -> bool:
        """Whether there is anywhere to keep it."""
        return self.host.budget > 0 or self.disk is not None
