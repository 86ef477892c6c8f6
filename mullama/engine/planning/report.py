"""What /internal/scheduler shows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mullama import abi

if TYPE_CHECKING:
    from mullama.engine.parts import EngineParts
    from mullama.engine.requests.sequences import LiveSequence


def scheduler(parts: EngineParts) -> dict[str, Any]:
    """Policy, waiting and running sequences, plans, counters. Read from any thread: a moment's view, not a lock's."""
    now = time.monotonic_ns()
    info, policy, page, seqs = parts.info, parts.policy, parts.page, list(parts.seqs.live.values())
    counters = page.counters()
    rows = {row.handle: row for row in page.rows() if row.handle}
    items = [_sequence(seq, rows.get(seq.view.id), now) for seq in seqs]
    ids = {seq.view.id: seq.request.id for seq in seqs}
    plan = policy.last_plan
    return {
        "model": info.name,
        "policy": policy.name,
        "params": policy.params(),
        "fallback": policy.fallback,
        "waiting": [item for item in items if item["slot"] is None],
        "running": [item for item in items if item["slot"] is not None],
        "plan": {
            "tokens": {ids[i]: n for i, n in list(plan.tokens.items()) if i in ids},
            "preempt": {ids[i]: str(how) for i, how in list(plan.preempt.items()) if i in ids},
            "repeat": plan.repeat,
        },
        "step": counters.steps,
        "plans": counters.plans,
        "repeated_plans": policy.stats.repeated,
        "preemptions": counters.preemptions,
        "swaps": policy.stats.changes,
        "plan_times": policy.plan_times(),
        "shadow": policy.shadow.snapshot() if policy.shadow is not None else None,
        "threads": parts.core.governor.snapshot(),
        "kernels": info.kernels,
        "counters": abi.as_dict(counters),
    }


def _sequence(seq: LiveSequence, row: abi.Row | None, now: int) -> dict[str, Any]:
    view = seq.view
    spent = dict(seq.spent_ns)
    spent[view.state] = spent.get(view.state, 0) + now - view.state_ns
    generated = row.completion_tokens if row is not None else view.generated
    return {
        "id": seq.request.id,
        "state": str(view.state),
        "slot": seq.slot if seq.slot >= 0 else None,
        "priority": view.priority,
        "user": view.user,
        "tenant": seq.request.tenant,
        "slo_ms": view.slo_ms,
        "prompt_tokens": view.prompt_tokens,
        "prompt_tokens_done": min(row.cells, view.prompt_tokens) if row is not None else 0,
        "prefill_left": view.prefill_left,
        "cached_tokens": view.cached_tokens,
        "completion_tokens": generated,
        "max_tokens": view.max_tokens,
        "tokens_left": max(view.max_tokens - generated, 0),
        "kv_cache_hit": row.kv_cache_hit if row is not None else 0,
        "preemptions": view.preemptions,
        "parked_bytes": seq.parked.n_bytes if seq.parked is not None else 0,
        "age_ms": round((now - view.arrival_ns) / 1e6, 3),
        "state_ms": {str(state): round(ns / 1e6, 3) for state, ns in spent.items()},
    }
