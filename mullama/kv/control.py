"""What an operator may do to cached KV: pin, drop, save, load. Engine thread only."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mullama.kv.cache import KvCache
from mullama.kv.events import KvTier
from mullama.kv.index.tree import pack
from mullama.kv.tiers.disk_tier import DiskRows, DiskTier


def pin(kv: KvCache, namespace: bytes, tokens: Sequence[int], until_ns: int) -> int:
    """Nothing cached of this prefix is evicted before ``until_ns``. Returns the tokens that are cached of it."""
    match = kv.tree.match(namespace, pack(tokens))
    for node in match.nodes:
        n = match.n_tokens - node.start
        # The last one may reach beyond the prefix: only what was named is pinned.
        upper = kv.tree.split(node, n) if n < node.n_tokens else node
        upper.pinned_until_ns = until_ns
    return match.n_tokens


def drop(
    kv: KvCache, running: Sequence[bool], namespace: bytes | None, tokens: Sequence[int] | None, tiers: set[KvTier]
) -> dict[str, int]:
    """Give up cached KV of prompts that start with ``tokens`` (None: of all); what runs keeps its own."""
    if tokens is not None:
        match = kv.tree.match(namespace or b"", pack(tokens))
        # The prefix may end within a stretch: all of it goes, because whoever passes through it begins so.
        tops = match.nodes[-1:] if match.n_tokens == len(tokens) else []
        scope = {below for top in tops for below in top.subtree()}
    else:
        scope = {node for node in kv.tree.nodes() if namespace is None or node.namespace == namespace}
    cells = 0
    host_before = kv.host.used
    if KvTier.DEVICE in tiers:
        for slot, runs in enumerate(running):
            if not runs and kv.tree.end_of(slot) in scope:
                cells += kv.forget(slot)
    disk = kv.drop_nodes(list(scope), tiers & {KvTier.HOST, KvTier.DISK})
    return {"cells_freed": cells, "host_bytes_freed": host_before - kv.host.used, "disk_bytes_freed": disk}


def save(kv: KvCache, disk: DiskTier, namespace: bytes, tokens: Sequence[int]) -> None:
    """Hand what is cached of a prefix to the disk's writer."""
    match = kv.tree.match(namespace, pack(tokens))
    for slot, shared in match.slots.items():
        if shared == match.n_tokens:
            kv.store(slot, upto=None if kv.cells.needs_checkpoint else shared)
            break
    now = time.monotonic_ns()
    for node in kv.tree.match(namespace, pack(tokens)).nodes:
        disk.put(node, node.host, now, node.checkpoint)


def saved(kv: KvCache, disk: DiskTier, namespace: bytes, tokens: Sequence[int], n_failed: int) -> dict[str, int]:
    """What the disk holds of a prefix after ``save``.

    ``n_failed``: the tier's count before. Raises StoreError when the disk did not take what is cached of the prefix.
    """
    n_tokens = n_bytes = 0
    match = kv.tree.match(namespace, pack(tokens))
    for node in match.nodes:
        if disk.lacks(node, False):
            break
        n_tokens, n_bytes = min(node.end, len(tokens)), n_bytes + node.n_tokens * kv.cells.token_bytes
    error = disk.error_since(n_failed)
    if n_tokens < match.n_tokens and error is not None:
        raise type(error)(f"{n_tokens} of {match.n_tokens} cached tokens are on disk: {error.message}")
    return {"tokens": n_tokens, "bytes": n_bytes}


def load(kv: KvCache, namespace: bytes, tokens: Sequence[int]) -> dict[str, int]:
    """Bring what is on disk of a prefix into host memory."""
    assert kv.disk is not None
    now = time.monotonic_ns()
    n_tokens = n_bytes = 0
    for node in kv.tree.match(namespace, pack(tokens)).nodes:
        if node.host is None and isinstance(node.disk, DiskRows):
            read = kv.disk.read(node)
            if read is None or not kv.host.put(node, read[0], now, read[1]):
                break
            n_bytes += node.n_bytes
        if node.host is None:
            break
        n_tokens = node.end
    return {"tokens": min(n_tokens, len(tokens)), "bytes": n_bytes}
