"""KV events as blocks: what routers know of a server's cache, in the words of vLLM's KV events.

mullama keeps stretches of tokens of any length; a router wants blocks of equal length. A block is ``block_size`` tokens
of a path, from a multiple of ``block_size`` on. It is stored when some tier holds all of it and of what comes before
it, and removed when a part of that is in no tier any more:

    path     | You are a helpful assistant … | What is the capital …
    blocks   [0, 16) [16, 32) [32, 48) …      whole ones only; each knows its parent

A block's hash is the first 8 bytes (big-endian, unsigned) of SHA-256(parent's 8 bytes + the tokens as 32-bit integers
in the machine's byte order). The parent of a first block is 8 zero bytes, or in a namespace of its own (cache salt,
adapters) the first 8 bytes of SHA-256(namespace).

Events come in order, and rest on the law of ``kv/index/tree.py``: KV is of use only with all that comes before it. So
an event that [start, end) is held says that [0, end) is, and one that it is gone says that what continued it is gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from mullama.kv.events import KvEvent, KvEventKind
from mullama.kv.index.namespaces import short_namespace
from mullama.kv.index.tree import TOKEN_BYTES, unpack

HASH_BYTES = 8


class WireEvent(msgspec.Struct, array_like=True, tag=True, gc=False):
    """An array that begins with its class's name. SOURCE: vLLM, vllm/distributed/kv_events.py (v0.11 to v0.19)."""


class BlockStored(WireEvent, gc=False):
    block_hashes: list[int]  # in the order of the path
    parent_block_hash: int | None
    token_ids: list[int]  # of all these blocks
    block_size: int
    lora_id: int | None = None
    medium: str | None = None  # which tier; None: this says no more than that one holds it
    lora_name: str | None = None
    extra_keys: list[list[str] | None] | None = None  # one a block; the first of a path has its short namespace


class BlockRemoved(WireEvent, gc=False):
    block_hashes: list[int]  # children before parents
    medium: str | None = None


class AllBlocksCleared(WireEvent, gc=False):
    pass


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """One message. Its rank is always given, as vLLM's publisher does."""

    ts: float  # Unix time
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int = 0


class _Block:
    __slots__ = ("children", "digest", "key")

    def __init__(self, key: bytes, digest: bytes) -> None:
        self.key = key  # its tokens, packed
        self.digest = digest
        self.children: dict[bytes, _Block] = {}

    @property
    def hash(self) -> int:
        return int.from_bytes(self.digest, "big")


class BlockIndex:
    """The stored blocks of one model. ``apply`` turns an event into what a router must be told."""

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError("a block has at least one token")
        self.block_size = block_size
        self.n_blocks = 0
        self._size = block_size * TOKEN_BYTES
        self._roots: dict[bytes, _Block] = {}

    def apply(self, event: KvEvent) -> BlockStored | BlockRemoved | None:
        """None: no block came or went."""
        if event.gone:
            return self._remove(event)
        if event.kind in (KvEventKind.STORED, KvEventKind.REUSED) and event.end >= self.block_size:
            return self._store(event)
        return None

    def clear(self) -> None:
        """Forget all blocks."""
        self._roots.clear()
        self.n_blocks = 0

    def stored(self) -> Iterator[BlockStored]:
        """Every block there is, parents first."""
        for namespace, root in self._roots.items():
            # Each entry begins a run: a block whose parent has been told, and is None for the first of a path.
            stack: list[tuple[_Block | None, _Block]] = [(None, block) for block in root.children.values()]
            while stack:
                parent, block = stack.pop()
                run = [block]
                while len(block.children) == 1:
                    (block,) = block.children.values()
                    run.append(block)
                stack.extend((block, child) for child in block.children.values())
                yield self._told(namespace, parent, run)

    def _store(self, event: KvEvent) -> BlockStored | None:
        tokens, size = event.tokens, self._size
        block = self._root(event.namespace)
        parent: _Block | None = None
        at, end = 0, event.end // self.block_size * size
        while at < end and (child := block.children.get(tokens[at : at + size])) is not None:
            parent = block = child
            at += size
        run = []
        for start in range(at, end, size):
            key = tokens[start : start + size]
            child = _Block(key, hashlib.sha256(block.digest + key).digest()[:HASH_BYTES])
            block.children[key] = child
            run.append(child)
            block = child
        self.n_blocks += len(run)
        return self._told(event.namespace, parent, run) if run else None

    def _remove(self, event: KvEvent) -> BlockRemoved | None:
        """Take out every block with the first token that is gone in it, and all that continue it."""
        tokens, size = event.tokens, self._size
        block = self._roots.get(event.namespace)
        at = event.start // self.block_size * size
        for start in range(0, at, size):
            block = block.children.get(tokens[start : start + size]) if block is not None else None
        if block is None:
            return None
        common = tokens[at : (event.start + 1) * TOKEN_BYTES]
        going = [child for key, child in block.children.items() if key.startswith(common)]
        hashes: list[int] = []
        for child in going:
            del block.children[child.key]
        while going:
            child = going.pop()
            hashes.append(child.hash)
            going.extend(child.children.values())
        hashes.reverse()
        self.n_blocks -= len(hashes)
        if not self._roots[event.namespace].children:
            del self._roots[event.namespace]
        return BlockRemoved(hashes) if hashes else None

    def _root(self, namespace: bytes) -> _Block:
        root = self._roots.get(namespace)
        if root is None:
            digest = hashlib.sha256(namespace).digest()[:HASH_BYTES] if namespace else bytes(HASH_BYTES)
            root = self._roots[namespace] = _Block(b"", digest)
        return root

    def _told(self, namespace: bytes, parent: _Block | None, run: list[_Block]) -> BlockStored:
        extra: list[list[str] | None] | None = None
        if namespace:
            extra = [None] * len(run)
            if parent is None:
                extra[0] = [short_namespace(namespace)]
        return BlockStored(
            block_hashes=[block.hash for block in run],
            parent_block_hash=None if parent is None else parent.hash,
            token_ids=unpack(b"".join(block.key for block in run)),
            block_size=self.block_size,
            extra_keys=extra,
        )
