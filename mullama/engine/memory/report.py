"""What one engine takes in memory, part by part: allocated, and resident as the system has it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from mullama.observe import process_memory as system
from mullama.types import SeqState

if TYPE_CHECKING:
    from mullama._core import Core, Embedder
    from mullama.engine.parts import EngineParts
    from mullama.engine.requests.sequences import LiveSequence
    from mullama.engine.weights.loras import LoadedLora

KV_PARTS = ("full", "window", "recurrent")
Buffer = tuple[str, str, int, int]  # part, kind, address (0: on a device), bytes


class LoadMeter:
    """What loading takes beside the buffers: the vocabulary, the tables of tensors and graphs, the token ring.

    Made before a model is loaded. Two measures, of which the smaller one counts: by how much the process's own memory
    grew, where what other engines take meanwhile slips in, and by how much the C allocator handed out, where memory
    slips in that was asked for and never touched.
    """

    def __init__(self) -> None:
        system.note_baseline()
        self._grown = _own_bytes()
        self._handed = system.heap_in_use()

    def tables(self, core: Core | Embedder) -> int:
        """Bytes since it was made, less the buffers of the model and the context; 0 where nobody says."""
        grown, handed = _own_bytes(), system.heap_in_use()
        here = [(kind, address, size) for _, kind, address, size in core.context.buffers() if address]
        output = core.memory()["output"]
        measures = []
        pages = system.resident((address, size) for _, address, size in here)
        if grown is not None and self._grown is not None and pages is not None:
            measures.append(grown - self._grown - sum(one.anonymous for one in pages) - output)
        if handed is not None and self._handed is not None:
            allocated = sum(size for kind, _, size in here if not kind.endswith("_Mapped"))
            measures.append(handed - self._handed - allocated - output)
        return max(min(measures, default=0), 0)


def _own_bytes() -> int | None:
    found = system.process_memory()
    return None if found is None else found.anonymous


async def report(parts: EngineParts) -> dict[str, Any]:
    """``memory_report`` (see EngineClient): looked up at a step boundary, the pages counted afterwards."""
    found, buffers = await asyncio.wrap_future(parts.commands.call(lambda: _at_boundary(parts)))
    return await asyncio.to_thread(measured, found, buffers)


def report_sync(parts: EngineParts) -> dict[str, Any]:
    """The same for a thread without an event loop."""
    return measured(*parts.commands.call(lambda: _at_boundary(parts)).result())


def _at_boundary(parts: EngineParts) -> tuple[dict[str, Any], list[Buffer]]:
    core, kv = parts.core, parts.kv
    is_asleep = core.is_vacant  # all that is left then is what waits in host memory
    buffers = [] if is_asleep else core.context.buffers()
    output = 0 if is_asleep else core.memory()["output"]
    found: dict[str, Any] = {
        "weights_shared_by": 1 if is_asleep else max(core.model.n_twins, 1),
        "kv": _kv(parts, buffers),
        "output": {"allocated_bytes": output, "resident_bytes": output},
        "tables_bytes": parts.tables_bytes,
        "adapters": [_adapter(one) for one in parts.loras.all() if one.native.is_on],
        "host_tier_bytes": kv.host.used,
        "disk_tier_bytes": kv.disk.store.bytes_used if kv.disk is not None else None,
        "parked_sequences": sum(seq.parked is not None for seq in parts.seqs.live.values()),
        "parked_bytes": core.parked_bytes(),
        "staging_bytes": core.staging_bytes() + parts.weights.saved_bytes,
        "is_changing_weights": core.is_switching() or parts.weights.change is not None,
    }
    return found, buffers


def without_cache(core: Embedder, tables_bytes: int) -> dict[str, Any]:
    """The same of an engine that keeps no KV, as ``measured`` takes it. Its own thread."""
    output = core.memory()["output"]
    return {
        "weights_shared_by": max(core.model.n_twins, 1),
        "kv": {"parts": {}, "used_bytes": 0, "retained_bytes": 0, "shared_bytes": 0, "requests": []},
        "output": {"allocated_bytes": output, "resident_bytes": output},
        "tables_bytes": tables_bytes,
        "adapters": [],
        "host_tier_bytes": 0,
        "disk_tier_bytes": None,
        "parked_sequences": 0,
        "parked_bytes": 0,
        "staging_bytes": 0,
        "is_changing_weights": False,
    }


def _adapter(one: LoadedLora) -> dict[str, Any]:
    """Its tensors, which loading has written, so that what is in this process's memory is resident."""
    native = one.native
    return {"id": one.id, "allocated_bytes": native.n_bytes, "resident_bytes": native.n_host_bytes}


def _kv(parts: EngineParts, buffers: list[Buffer]) -> dict[str, Any]:
    """The cells by kind, and who uses them, as llama.cpp counts them."""
    core, seqs = parts.core, parts.seqs
    if core.is_vacant:
        return {"parts": {}, "used_bytes": 0, "retained_bytes": 0, "shared_bytes": 0, "requests": []}
    truth = core.cells()
    size = core.context.cell_bytes()
    cells = {
        "full": truth["used"],
        "window": truth["window"],
        "recurrent": [sum(owner == slot for owner in truth["recurrent"]) for slot in range(core.n_slots)],
    }
    by_slot = [sum(cells[part][slot] * size[part] for part in size) for slot in range(core.n_slots)]
    per_seq_ns = {row.handle: row.kv_cell_ns for row in parts.page.rows() if row.handle}
    requests = []
    for seq in seqs.live.values():
        if seq.view.state is SeqState.WAITING:
            continue
        now = by_slot[seq.slot] if seq.slot >= 0 else 0
        cell_ns = per_seq_ns.get(seq.view.id)
        requests.append(
            {
                "id": seq.request.id,
                "state": str(seq.view.state),
                "kv_bytes": now,
                "kv_bytes_peak": max(now, _peak(seq, size, cells["window"])),
                "kv_byte_seconds": None if cell_ns is None else round(cell_ns * parts.token_bytes / 1e9, 3),
                "parked_bytes": seq.parked.n_bytes if seq.parked is not None else 0,
            }
        )
    used = {part: sum(cells[part]) * size[part] for part in size}
    shared = 0
    if "full" in size:  # a cell that several sequences hold is there once
        shared = (sum(truth["used"]) - truth["total_used"]) * size["full"]
        used["full"] -= shared
    by_part = {
        part: {
            "allocated_bytes": sum(n for kind, _, _, n in buffers if kind == part),
            "resident_bytes": 0,
            "used_bytes": used[part],
            "bytes_per_cell": size[part],
        }
        for part in size
    }
    return {
        "parts": by_part,
        "used_bytes": sum(used.values()),
        "retained_bytes": sum(n for n, handle in zip(by_slot, seqs.slots, strict=True) if not handle),
        "shared_bytes": shared,
        "requests": requests,
    }


def _peak(seq: LiveSequence, size: dict[str, int], window: list[int]) -> int:
    """Bytes at the most tokens it ever had; of the sliding window those that it has now."""
    cells = max(seq.peak, seq.view.cells)
    now = window[seq.slot] if seq.slot >= 0 else 0
    return cells * size.get("full", 0) + now * size.get("window", 0) + (size.get("recurrent", 0) if cells else 0)


def _held(kind: str, size: int) -> system.Pages:
    """What to take for resident where the system does not say: what is allocated."""
    return system.Pages(file=size) if kind.endswith("_Mapped") else system.Pages(anonymous=size)


def measured(found: dict[str, Any], buffers: list[Buffer]) -> dict[str, Any]:
    """Add what is resident of each buffer. What lies on a device is not of this process."""
    here = [buffer for buffer in buffers if buffer[2]]
    pages = system.resident((address, size) for _, _, address, size in here)
    weights: dict[str, dict[str, int]] = {}
    for part, kind, _, size in buffers:
        if part == "weights":
            one = weights.setdefault(kind, {"allocated_bytes": 0, "mapped_bytes": 0, "copied_bytes": 0})
            one["allocated_bytes"] += size
    resident = dict.fromkeys((*KV_PARTS, "weights", "compute"), 0)
    for i, (part, kind, _, size) in enumerate(here):
        held = _held(kind, size) if pages is None else pages[i]
        resident[part] += held.total
        if part == "weights":
            weights[kind]["mapped_bytes"] += held.file
            weights[kind]["copied_bytes"] += held.anonymous
    shared_by = found.pop("weights_shared_by")  # each model that has them counts its part
    weights = {kind: {key: size // shared_by for key, size in one.items()} for kind, one in weights.items()}
    resident["weights"] //= shared_by
    kv = found["kv"]
    for part, entry in kv["parts"].items():
        entry["resident_bytes"] = resident[part]
    requests, parts = kv.pop("requests"), kv.pop("parts")
    kv = {
        "allocated_bytes": sum(entry["allocated_bytes"] for entry in parts.values()),
        "resident_bytes": sum(entry["resident_bytes"] for entry in parts.values()),
        **kv,
        **parts,
    }
    compute = {
        "allocated_bytes": sum(size for part, _, _, size in buffers if part == "compute"),
        "resident_bytes": resident["compute"],
    }
    total = resident["weights"] + kv["resident_bytes"] + compute["resident_bytes"]
    total += found["output"]["resident_bytes"] + found["tables_bytes"]
    total += sum(one["resident_bytes"] for one in found["adapters"])
    total += found["host_tier_bytes"] + found["parked_bytes"] + found["staging_bytes"]
    return {
        "resident_bytes": total,
        "device_bytes": sum(size // (shared_by if part == "weights" else 1) for part, _, at, size in buffers if not at)
        + sum(one["allocated_bytes"] - one["resident_bytes"] for one in found["adapters"]),
        "weights": {
            "allocated_bytes": sum(entry["allocated_bytes"] for entry in weights.values()),
            "resident_bytes": resident["weights"],
            "mapped_bytes": sum(entry["mapped_bytes"] for entry in weights.values()),
            "copied_bytes": sum(entry["copied_bytes"] for entry in weights.values()),
            "shared_by": shared_by,
            "buffers": weights,
        },
        "compute": compute,
        **found,
        "kv": kv,
        "requests": requests,
    }
