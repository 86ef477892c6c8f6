"""A world of cached paths that says what happens to it in KV events, and a router that listens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from mullama.kv.events import KvEvent, KvEventKind, KvEventLog, KvTier
from mullama.kv.index.tree import pack

Path = tuple[bytes, tuple[int, ...]]  # namespace, tokens


@dataclass
class World:
    """Holders (slots, host, disk) of one path each; a holder holds every prefix of its path."""

    log: KvEventLog = field(default_factory=lambda: KvEventLog(100_000))
    held: dict[str, Path] = field(default_factory=dict)

    def positions(self) -> set[Path]:
        return {(space, path[:n]) for space, path in self.held.values() for n in range(1, len(path) + 1)}

    def blocks(self, size: int) -> set[Path]:
        """Brute force: the paths whose last token ends a block."""
        return {(space, path) for space, path in self.positions() if len(path) % size == 0}

    def say(self, kind: KvEventKind, tier: KvTier, start: int, path: Path, *, end: int = 0, **more: Any) -> None:
        space, tokens = path
        end = end or len(tokens)
        self.log.append(
            KvEvent(self.log.next_seq(), 0, kind, tier, start, end, space, pack(tokens), request=None, **more)
        )

    def hold(self, holder: str, path: Path) -> None:
        """The holder gives up what it had, and then holds this path."""
        self.free(holder)
        start = max((n for n in range(len(path[1]) + 1) if (path[0], path[1][:n]) in self.positions()), default=0)
        self.held[holder] = path
        self.say(KvEventKind.STORED, tier_of(holder), start, path)

    def reuse(self, holder: str, n: int) -> None:
        """A request takes over the first ``n`` tokens; the event's tokens go on behind them."""
        if holder in self.held:
            path = self.held[holder]
            self.say(KvEventKind.REUSED, KvTier.DEVICE, 0, path, end=min(max(n, 1), len(path[1])), slot=0)

    def move(self) -> None:
        self.log.append(
            KvEvent(self.log.next_seq(), 0, KvEventKind.MOVED, KvTier.DEVICE, 0, 9, b"", b"", request=None, slot=1)
        )

    def free(self, holder: str, keep: int = 0) -> None:
        """The holder gives up its tokens from ``keep`` on."""
        if holder not in self.held or keep >= len(self.held[holder][1]):
            return
        before = self.positions()
        space, tokens = self.held.pop(holder)
        if keep:
            self.held[holder] = (space, tokens[:keep])
        gone = before - self.positions()
        first = next((n for n in range(1, len(tokens) + 1) if (space, tokens[:n]) in gone), None)
        if first is None:
            self.say(KvEventKind.EVICTED, tier_of(holder), keep, (space, tokens))
        else:
            self.say(KvEventKind.EVICTED, tier_of(holder), first - 1, (space, tokens), gone=True)


def tier_of(holder: str) -> KvTier:
    return {"h": KvTier.HOST, "d": KvTier.DISK}.get(holder[0], KvTier.DEVICE)


class Router:
    """Knows blocks by their hashes alone, from decoded MessagePack (plain lists), and checks what it is told."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: dict[int, Path] = {}
        self.n_cleared = 0

    @property
    def known(self) -> set[Path]:
        return set(self.blocks.values())

    def take(self, events: list[list[Any]], spaces: dict[str, bytes]) -> None:
        """``spaces``: short names of namespaces and what they stand for."""
        for tag, *fields in events:
            if tag == "AllBlocksCleared":
                assert fields == []
                self.blocks.clear()
                self.n_cleared += 1
            elif tag == "BlockRemoved":
                hashes, medium = fields
                assert hashes and medium is None
                for one in hashes:
                    del self.blocks[one]  # it was there
            else:
                assert tag == "BlockStored"
                self._store(fields, spaces)

    def _store(self, fields: list[Any], spaces: dict[str, bytes]) -> None:
        hashes, parent, tokens, size, lora_id, medium, lora_name, extra = fields
        assert size == self.block_size
        assert (lora_id, medium, lora_name) == (None, None, None)
        assert len(tokens) == len(hashes) * size > 0
        if parent is None:
            space = b"" if extra is None else spaces[extra[0][0]]
            before: tuple[int, ...] = ()
            digest = hashlib.sha256(space).digest()[:8] if space else bytes(8)
        else:
            space, before = self.blocks[parent]  # it is there
            digest = parent.to_bytes(8, "big")
        assert (extra is None) == (space == b"")
        assert extra is None or extra[parent is None :] == [None] * (len(hashes) - (parent is None))
        for i, one in enumerate(hashes):
            part = tuple(tokens[i * size : (i + 1) * size])
            digest = hashlib.sha256(digest + pack(part)).digest()[:8]
            assert one == int.from_bytes(digest, "big")
            before += part
            self.blocks[one] = (space, before)
