"""Whether tree, slots and host memory agree about the cached KV. Engine thread only."""

from __future__ import annotations

from mullama.kv.cache import KvCache
from mullama.kv.index.payload import Rows
from mullama.kv.index.tree import TOKEN_BYTES


def differences(kv: KvCache) -> list[str]:
    """In words; empty when all agree, with llama.cpp's own cells as well."""
    if kv.core.is_vacant:
        return []  # nothing to compare with
    return kv.core.audit() + _of_slots(kv) + _of_host(kv)


def _of_slots(kv: KvCache) -> list[str]:
    core, found = kv.core, []
    for slot in range(core.n_slots):
        n_past, _ = core.slot_fill(slot)
        end = kv.tree.end_of(slot)
        if end is None:
            if n_past and not core.shifted(slot):
                found.append(f"slot {slot} holds {n_past} tokens that the tree does not know")
            continue
        path = end.tokens()
        if core.packed(slot)[: len(path)] != path[: TOKEN_BYTES * n_past]:
            found.append(f"slot {slot}: its tokens are not those of its path in the tree")
        if core.retained(slot)[0] not in (0, end.end):
            found.append(f"slot {slot} retains {n_past} tokens, the tree says {end.end}")
    return found


def _of_host(kv: KvCache) -> list[str]:
    used, found = 0, []
    for node in kv.tree.nodes():
        used += node.n_bytes
        above = node.parent
        if node.host is not None and above is not None and above.parent is not None and above.host is None:
            found.append(f"{node} is in host memory, but not what comes before it")
        if isinstance(node.host, Rows) and sum(map(len, node.host.chunks)) != node.host.n_bytes:
            found.append(f"{node}: its rows have a wrong size")
    if used != kv.host.used:
        found.append(f"host memory: {used} bytes in the tree, {kv.host.used} accounted for")
    return found
