"""What /internal/kv shows of the KV cache, and what an operator may do to it. Engine thread only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mullama import abi
from mullama.kv.choice import KvSource
from mullama.kv.events import KvTier
from mullama.kv.index.namespaces import short_namespace
from mullama.kv.index.tree import Node, pack, unpack
from mullama.kv.tiers.disk_tier import DiskRows, DiskTier
from mullama.types import ModelInfo

if TYPE_CHECKING:
    from mullama._core import Core
    from mullama.engine.requests.sequences import Sequences
    from mullama.kv.cache import KvCache


EXCERPT = 32  # tokens at either end of a node whose text is shown


def snapshot(info: ModelInfo, core: Core, seqs: Sequences, kv: KvCache) -> dict[str, Any]:
    """Layout, bytes, cells used and by whom (llama.cpp's own cells), tiers, policy, totals."""
    truth = core.cells()
    states = core.states()
    rows: list[dict[str, Any]] = []
    for slot in range(core.n_slots):
        state, handle, n_past = states[slot], seqs.slots[slot], core.slot_fill(slot)[0]
        seq = seqs.live.get(handle)
        end = kv.tree.end_of(slot)
        rows.append(
            {
                "slot": slot,
                "state": abi.SLOT_STATES[state],
                "handle": handle or None,
                "request": seq.request.id if seq is not None else None,
                "tenant": seq.request.tenant if seq is not None else None,
                "cells": truth["used"][slot] if truth["caches"] > 0 else n_past,
                "window_cells": truth["window"][slot] if truth["caches"] > 1 else None,
                "fragments": fragments(core, slot) if truth["caches"] > 0 else 0,
                "last_used_ms_ago": _ago(end.used_ns) if state == abi.RETAINED and end is not None else None,
            }
        )
    used = truth["total_used"] if truth["caches"] > 0 else sum(row["cells"] for row in rows)
    total = truth["size"] * (1 if core.unified else core.n_slots)
    layers = kv.cells.layers()
    counters = core.counters_dict()
    return {
        "model": info.name,
        "layout": "unified" if core.unified else "streams",
        "type_k": layers[0]["type_k"] if layers else None,
        "type_v": layers[0]["type_v"] if layers else None,
        "bytes_per_token": kv.cells.token_bytes,
        "needs_checkpoints": kv.cells.needs_checkpoint,
        "cells_per_slot": truth["size"],
        "cells_total": total,
        "bytes_total": total * kv.cells.token_bytes,
        "cells_used": used,
        "cells_free": max(total - used, 0),  # a recurrent model has states, no cells
        "cells_running": sum(row["cells"] for row in rows if row["state"] not in ("free", "retained")),
        "cells_retained": sum(row["cells"] for row in rows if row["state"] == "retained"),
        "parked_sequences": sum(seq.parked is not None for seq in seqs.live.values()),
        "parked_bytes": core.parked_bytes(),
        "tiers": tiers(kv),
        "policy": policy(kv),
        "totals": {
            "kv_cache_hit": counters["kv_hit_tokens"],
            "kv_cache_miss": counters["kv_miss_tokens"],
            "kv_cache_evict": counters["kv_evict_tokens"],
            "hit_by_source": {str(source): kv.hits[source] for source in KvSource if source is not KvSource.NONE},
        },
        "index": {"nodes": kv.tree.n_nodes},
        "costs_ns": {
            "prefill_token": round(kv.costs().prefill_token, 1),
            "save_byte": round(kv.costs().save_byte, 4),
            "restore_byte": round(kv.costs().restore_byte, 4),
            "copy_byte": round(kv.costs().copy_byte, 4),
        },
        "slots": rows,
        "audit": kv.audit(),
    }


def tiers(kv: KvCache) -> dict[str, Any]:
    host_tokens = disk_tokens = 0
    for node in kv.tree.nodes():
        host_tokens += node.n_tokens if node.host is not None else 0
        disk_tokens += node.n_tokens if node.disk is not None else 0
    return {
        "host": {"bytes_used": kv.tier.used, "bytes_budget": kv.tier.budget, "tokens": host_tokens},
        "disk": None
        if kv.disk is None
        else {
            "bytes_used": kv.disk.store.bytes_used,
            "bytes_budget": kv.disk.store.budget_bytes,
            "tokens": disk_tokens,
            "not_written": kv.disk.n_not_written,
            "error": kv.disk.last_error.message if kv.disk.is_failing and kv.disk.last_error is not None else None,
            "refused": dict(kv.disk.store.skipped),
        },
    }


def policy(kv: KvCache) -> dict[str, Any]:
    guarded: Any = kv.tier.policy
    return {"policy": guarded.name, "params": dict(guarded.params()), "fallback": guarded.fallback}


def fragments(core: Core, slot: int) -> int:
    """Runs of neighbouring cells that a sequence's tokens lie in: 1 is the best there is."""
    if core.slot_fill(slot)[0] == 0:
        return 0
    return sum(owner == slot for _, _, owner in core.cell_runs(slot))


def cell_runs(core: Core) -> dict[str, Any]:
    """Which cells belong to which sequence, as runs of equal cells."""
    truth = core.cells()
    caches = []
    for cache in range(truth["caches"]):
        streams = []
        for stream in range(1 if core.unified else core.n_slots):
            runs = core.cell_runs(stream, cache)
            streams.append({"stream": stream, "cells": sum(n for _, n, _ in runs), "runs": runs})
        caches.append({"name": ("full", "window")[cache], "streams": streams})
    return {"caches": caches, "recurrent": truth["recurrent"]}


def tree(
    kv: KvCache, seqs: Sequences, limit: int, text: Callable[[Sequence[int]], str] | None = None
) -> dict[str, Any]:
    """The prefix tree, parents first; with ``text``, which makes texts of token ids, also what nodes hold."""
    owner = {slot: seqs.live[handle].request.id for slot, handle in enumerate(seqs.slots) if handle}
    now = time.monotonic_ns()
    nodes: list[dict[str, Any]] = []
    for node in kv.tree.nodes():
        if len(nodes) >= limit:
            break
        above = node.parent
        nodes.append(
            {
                "id": node.id,
                "parent": above.id if above is not None and above.parent is not None else None,
                "start": node.start,
                "end": node.end,
                "tokens": node.n_tokens,
                "slots": sorted(node.slots),
                "owners": sorted(owner[slot] for slot in node.slots if slot in owner),
                "tiers": [
                    str(tier)
                    for tier, held in (
                        (KvTier.DEVICE, bool(node.slots)),
                        (KvTier.HOST, node.host is not None),
                        (KvTier.DISK, node.disk is not None),
                    )
                    if held
                ],
                "host_bytes": node.host.n_bytes if node.host is not None else 0,
                "checkpoint_bytes": node.checkpoint.n_bytes if node.checkpoint is not None else 0,
                "hits": node.hits,
                "last_used_ms_ago": _ago(node.used_ns),
                "created_ms_ago": _ago(node.created_ns),
                "cost_ms": round(node.cost_ns / 1e6, 3),
                "pinned_s": max(round((node.pinned_until_ns - now) / 1e9, 3), 0.0),
                "namespace": short_namespace(node.namespace),
                **({"text": _excerpt(unpack(node.key), text)} if text is not None else {}),
            }
        )
    return {"nodes": nodes, "n_nodes": kv.tree.n_nodes, "truncated": len(nodes) < kv.tree.n_nodes}


def _excerpt(tokens: list[int], text: Callable[[Sequence[int]], str]) -> str:
    """The text of a node, the middle of a long one left out."""
    if len(tokens) <= 2 * EXCERPT:
        return text(tokens)
    return f"{text(tokens[:EXCERPT])} … {text(tokens[-EXCERPT:])}"


def _ago(then_ns: int) -> float:
    return round((time.monotonic_ns() - then_ns) / 1e6, 3)


# -- what an operator may do --------------------------------------------------------------------------------------


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
        scope = {below for top in tops for below in _below(top)}
    else:
        scope = {node for node in kv.tree.nodes() if namespace is None or node.namespace == namespace}
    cells = 0
    host_before = kv.tier.used
    if KvTier.DEVICE in tiers:
        for slot, runs in enumerate(running):
            if not runs and kv.tree.end_of(slot) in scope:
                cells += kv.forget(slot)
    disk = kv.drop_nodes(list(scope), tiers & {KvTier.HOST, KvTier.DISK})
    return {"cells_freed": cells, "host_bytes_freed": host_before - kv.tier.used, "disk_bytes_freed": disk}


def _below(node: Node) -> list[Node]:
    found = [node]
    for child in node.children.values():
        found.extend(_below(child))
    return found


def save(kv: KvCache, disk: DiskTier, namespace: bytes, tokens: Sequence[int]) -> None:
    """Hand what is cached of a prefix to the disk's writer."""
    match = kv.tree.match(namespace, pack(tokens))
    for slot, shared in match.slots.items():
        if shared == match.n_tokens:
            kv.store(slot, upto=None if kv.cells.needs_checkpoint else shared)
            break
    for node in kv.tree.match(namespace, pack(tokens)).nodes:
        disk.keep(node)


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
            if read is None or not kv.tier.put(node, read[0], now, read[1]):
                break
            n_bytes += node.n_bytes
        if node.host is None:
            break
        n_tokens = node.end
    return {"tokens": min(n_tokens, len(tokens)), "bytes": n_bytes}
