"""What /internal/scheduler and /internal/kv show."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mullama import abi
from mullama.scheduling import Scheduler
from mullama.types import ModelInfo, SeqState

if TYPE_CHECKING:
    from mullama._core import Core
    from mullama.engine.engine import LiveSequence


def scheduler(
    info: ModelInfo, policy: Scheduler, seqs: Sequence[LiveSequence], page: abi.Reader, core: Core
) -> dict[str, Any]:
    """Policy, waiting and running sequences, counters. Read from any thread: a moment's view, not a lock's."""
    now = time.monotonic_ns()
    counters = page.counters()
    rows = {row.handle: row for row in page.rows() if row.handle}
    waiting, running = [], []
    for seq in seqs:
        view = seq.view
        item: dict[str, Any] = {
            "id": seq.request.id,
            "state": str(view.state),
            "priority": view.priority,
            "prompt_tokens": view.prompt_tokens,
            "max_tokens": view.max_tokens,
            "age_ms": round((now - view.arrival_ns) / 1e6, 3),
        }
        if view.state is SeqState.WAITING:
            waiting.append(item)
            continue
        row = rows.get(view.id)
        item["slot"] = seq.slot
        if row is not None:
            item["prompt_tokens_done"] = min(row.cells, view.prompt_tokens)
            item["completion_tokens"] = row.completion_tokens
            item["kv_cache_hit"] = row.kv_cache_hit
        running.append(item)
    return {
        "model": info.name,
        "policy": policy.name,
        "params": dict(policy.params()),
        "waiting": waiting,
        "running": running,
        "step": counters.steps,
        "plans": counters.plans,
        "mean_plan_ms": round(counters.plan_ns / counters.plans / 1e6, 4) if counters.plans else None,
        "threads": core.governor.snapshot(),
        "counters": abi.as_dict(counters),
    }


def kv(info: ModelInfo, core: Core, slots: Sequence[int]) -> dict[str, Any]:
    """Cells used and by whom, from llama.cpp's own cells. Engine thread only."""
    truth = core.cells()
    rows: list[dict[str, Any]] = []
    for slot in range(core.n_slots):
        state, handle, n_past, _, last_used = core.slot_info(slot)
        rows.append(
            {
                "slot": slot,
                "state": abi.SLOT_STATES[state],
                "handle": handle or None,
                "cells": truth["used"][slot] if truth["caches"] > 0 else n_past,
                "window_cells": truth["window"][slot] if truth["caches"] > 1 else None,
                "last_used_step": last_used if state == abi.RETAINED else None,
            }
        )
    used = sum(row["cells"] for row in rows)
    total = truth["size"] * core.n_slots
    return {
        "model": info.name,
        "layout": "streams",
        "cells_per_slot": truth["size"],
        "cells_total": total,
        "cells_used": used,
        "cells_free": max(total - used, 0),  # a recurrent model has states, no cells
        "cells_running": sum(row["cells"] for row in rows if row["state"] not in ("free", "retained")),
        "cells_retained": sum(row["cells"] for row in rows if row["state"] == "retained"),
        "slots": rows,
        "audit": core.audit(),
    }
