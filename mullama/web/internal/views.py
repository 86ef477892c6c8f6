"""What a client is shown of what an operator is shown whole: its own requests, and nothing of the server's machine.

Every function names the fields that a client gets, so that a field that is added later is an operator's first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_SCHEDULER = ("model", "policy", "step", "plans", "repeated_plans", "preemptions", "swaps")
_KV = (
    *("model", "layout", "type_k", "type_v", "bytes_per_token", "needs_checkpoints", "cells_per_slot", "cells_total"),
    *("bytes_total", "cells_used", "cells_free", "cells_running", "cells_retained"),
)
_MODEL = (
    *("name", "state", "pinned", "in_use", "requests", "waiting_for_load", "idle_s", "keep_alive_s", "expires_in_s"),
    *("memory_bytes", "asleep", "weights", "description", "size_bytes", "n_ctx", "n_parallel", "running", "waiting"),
    *("kv_tokens", "tokens_per_second", "completion_tokens"),
)
_ADAPTER = ("id", "scale", "rank", "size_bytes", "requests")
LOAD_FAILED = "the last load failed; the server's log says why"


def scheduler_for_client(found: Mapping[str, Any], tenant: str | None) -> dict[str, Any]:
    """``PlanningClient.snapshot`` with the tenant's own sequences only."""
    return _only(_SCHEDULER, found) | {state: _own(found[state], tenant) for state in ("waiting", "running")}


def kv_for_client(found: Mapping[str, Any], tenant: str | None) -> dict[str, Any]:
    """``KvClient.asnapshot`` with the slots of the tenant's own requests only."""
    busy = [row for row in found.get("slots", ()) if row["request"] is not None]
    return _only(_KV, found) | {"slots": _own(busy, tenant)}


def model_for_client(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``/internal/models`` without paths and without the words of errors."""
    return _only(_MODEL, row) | {"error": LOAD_FAILED if row.get("error") else None}


def adapter_for_client(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """A LoRA adapter without its file."""
    return _only(_ADAPTER, adapter)


def _only(names: Iterable[str], found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


def _own(items: Iterable[dict[str, Any]], tenant: str | None) -> list[dict[str, Any]]:
    return [item for item in items if item["tenant"] == tenant]
