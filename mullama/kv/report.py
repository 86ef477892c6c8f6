"""What /internal/kv shows of the KV cache. Engine thread only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mullama import abi
from mullama.kv.audit import differences
from mullama.kv.cache import KvCache
from mullama.kv.choice import KvSource
from mullama.kv.events import KvTier
from mullama.kv.index.namespaces import short_namespace
from mullama.kv.index.tree import unpack
from mullama.kv.native import Core
from mullama.kv.tiers.base import Tier

EXCERPT = 32  # tokens at either end of a node whose text is shown


@dataclass(slots=True, frozen=True)
class Owner:
    """The running request of a slot."""

    handle: int
    request: str
    tenant: str | None


def snapshot(model: str, kv: KvCache, owners: Sequence[Owner | None], n_parked: int) -> dict[str, Any]:
    """Layout, bytes, cells used and by whom (llama.cpp's own cells), tiers, policy, totals.

    ``owners``: of every slot; ``n_parked``: preempted requests.
    """
    core = kv.core
    truth = core.cells()
    states = core.states()
    rows: list[dict[str, Any]] = []
    for slot, owner in enumerate(owners):
        state, n_past = states[slot], core.slot_fill(slot)[0]
        end = kv.tree.end_of(slot)
        rows.append(
            {
                "slot": slot,
                "state": abi.SLOT_STATES[state],
                "handle": owner.handle if owner is not None else None,
                "request": owner.request if owner is not None else None,
                "tenant": owner.tenant if owner is not None else None,
                "cells": truth["used"][slot] if truth["caches"] > 0 else n_past,
                "window_cells": truth["window"][slot] if truth["caches"] > 1 else None,
                "fragments": fragments(core, slot) if truth["caches"] > 0 else 0,
                "last_used_ms_ago": _ago(end.used_ns) if state == abi.RETAINED and end is not None else None,
            }
        )
    used = truth["total_used"] if truth["caches"] > 0 else sum(row["cells"] for row in rows)
    total = truth["size"] * (1 if core.unified else core.n_slots)
    layers = kv.cells.layers()
    counters, costs = core.counters_dict(), kv.finder.costs()
    return {
        "model": model,
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
        "parked_sequences": n_parked,
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
            "prefill_token": round(costs.prefill_token, 1),
            "save_byte": round(costs.save_byte, 4),
            "restore_byte": round(costs.restore_byte, 4),
            "copy_byte": round(costs.copy_byte, 4),
        },
        "slots": rows,
        "audit": differences(kv),
    }


def tiers(kv: KvCache) -> dict[str, Any]:
    host_tokens = disk_tokens = 0
    for node in kv.tree.nodes():
        host_tokens += node.n_tokens if node.host is not None else 0
        disk_tokens += node.n_tokens if node.disk is not None else 0
    disk = kv.disk
    return {
        "host": _tier(kv.host, host_tokens),
        "disk": None
        if disk is None
        else {
            **_tier(disk, disk_tokens),
            "not_written": disk.n_not_written,
            "error": disk.last_error.message if disk.is_failing and disk.last_error is not None else None,
            "refused": dict(disk.store.skipped),
        },
    }


def _tier(tier: Tier, n_tokens: int) -> dict[str, int]:
    return {"bytes_used": tier.used, "bytes_budget": tier.budget, "tokens": n_tokens}


def policy(kv: KvCache) -> dict[str, Any]:
    guarded: Any = kv.host.policy
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
    kv: KvCache,
    owners: Sequence[Owner | None],
    limit: int,
    text: Callable[[Sequence[int]], str] | None = None,
) -> dict[str, Any]:
    """The prefix tree, parents first; with ``text``, which makes texts of token ids, also what nodes hold."""
    names = {slot: owner.request for slot, owner in enumerate(owners) if owner is not None}
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
                "owners": sorted(names[slot] for slot in node.slots if slot in names),
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
