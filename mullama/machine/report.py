"""All that is known of the machine and of this build, as one object: ``mullama doctor --json``, /internal/machine."""

from __future__ import annotations

import platform
import sys
from typing import Any

from mullama.errors import MachineUnfit
from mullama.installation import VERSION, instructions, libraries
from mullama.machine import cgroups, memory
from mullama.machine.cores import own_cores
from mullama.machine.folders import Folder
from mullama.machine.processor import amx_tiles, processor
from mullama.machine.ways import ways_report


def machine_report(n_threads: int, folders: dict[str, Folder]) -> dict[str, Any]:
    """Processor, threads, memory, folders, build, libraries, devices, what constrains texts, ways of computing. Unknown
    values are None.

    ``n_threads``: those that were asked for, 0: automatic. ``folders`` by what they are for. Sizes are bytes.
    """
    own = own_cores()
    return {
        "processor": _processor(),
        "threads": {
            "online": own.online,
            "affinity": list(own.affinity),
            "cpuset": own.cpuset,
            "quota": own.quota,
            "asked": n_threads,
            "used": n_threads or own.threads,
        },
        "memory": {
            "total_bytes": memory.total_memory(),
            "free_bytes": memory.available_memory(),
            "limit_bytes": cgroups.memory_limit(),
        },
        "folders": {
            name: {"path": str(one.path), "problem": one.problem, "free_bytes": one.free}
            for name, one in folders.items()
        },
        "build": _build(),
        "libraries": [
            {"name": one.name, "path": str(one.path), "size_bytes": one.size, "problem": one.fault}
            for one in libraries.libraries()
        ],
        "devices": _devices(),
        "constraints": _constraints(),
        "ways": _ways(),
    }


def provenance() -> dict[str, Any]:
    """What a number needs of the machine so that it can be reproduced or doubted. Unknown values are None."""
    own, total = own_cores(), memory.total_memory()
    return {
        "cpu": processor().name,
        "instruction_sets": list(processor().instruction_sets),
        "cores": len(own.affinity),
        "quota": own.quota,
        "memory_mib": None if total is None else total >> 20,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> dict[str, Any]:
    one, tiles = processor(), amx_tiles()
    return {
        "name": one.name,
        "architecture": one.architecture,
        "vendor": one.vendor,
        "family": one.family,
        "model": one.model,
        "stepping": one.stepping,
        "instruction_sets": list(one.instruction_sets),
        "amx": None if tiles is None else {"supported": tiles.supported, "permitted": tiles.permitted},
    }


def _build() -> dict[str, Any]:
    record, carried = instructions.build_record(), instructions.carried()
    used = record.get("instructions", [])
    return {
        "mullama": VERSION,
        "python": platform.python_version(),
        **{name: record.get(name) for name in ("compiler", "build_type", "c_flags", "cxx_flags", "cpu_flags")},
        "core_flags": record.get("core_flags"),
        "instructions": used,
        "missing_instructions": None if carried is None else instructions.missing(used, carried),
    }


def _ways() -> list[dict[str, Any]]:
    try:
        return ways_report()
    except MachineUnfit:  # the libraries do not load, which is told elsewhere
        return []


def _constraints() -> dict[str, Any] | None:
    """The library that holds texts to grammars: ``version`` and ``problem``; None where the core is not loaded."""
    core = sys.modules.get("mullama._core")
    return None if core is None else dict(core.constraint_library())


def _devices() -> list[dict[str, Any]]:
    """What ggml can compute on; empty where its libraries are not loaded."""
    core = sys.modules.get("mullama._core")
    return [] if core is None else list(core.devices())
