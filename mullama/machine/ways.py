"""Ways of computing: which there are here, what came of proving and timing them, and which compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mullama.machine import kernels, way_choice
from mullama.machine.remembered import OfType, Remembered
from mullama.machine.trials import TIMED
from mullama.machine.way_choice import Choice


def ways_report(root: Path | None = None) -> list[dict[str, Any]]:
    """What is known of each way for each type of weights, for ``mullama doctor`` and ``GET /internal/machine``.

    A dict a type: ``type``, ``in_charge`` (in this process), ``shape`` (the matrices that were timed), ``ways`` (a dict
    each: ``way``, ``verdict``, ``exact``, ``steady``, ``error``, ``times_us`` by number of columns) and ``chosen`` (the
    way by number of columns). Attention is among the types. Empty: nothing was tried here yet.
    """
    running = kernels.in_charge()
    known = {**Remembered(root).read(), **{kind: each.known for kind, each in running.items()}}
    return [_of_type(of, running.get(kind)) for kind, of in sorted(known.items())]


def ways_of(weights: Mapping[tuple[str, str], int], *, reference: bool = False) -> dict[str, dict[str, Any]]:
    """How the matrices of a loaded model are computed, by type; ``weights``: bytes by type and buffer.

    ``columns``: the way by the smallest number of columns from which on it is taken. ``bytes``: by the name of the
    buffers they lie in. ``reference``: by the reference computations only.
    """
    chosen = {each.name: each.choice for each in kernels.in_charge().values()}
    found: dict[str, dict[str, Any]] = {}
    for (name, buffer), n_bytes in sorted(weights.items()):
        if reference or name in chosen:
            of = found.setdefault(name, {"columns": {"1": "plain"}, "bytes": {}})
            of["bytes"][buffer] = n_bytes
            if not reference:
                of["columns"] = _by_columns(chosen[name])
    return found


def words_of(ways: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The same in a word each: "tiles", or "plain, from 8 columns on tiled"."""
    words = {}
    for name, of in ways.items():
        first, *others = of["columns"].items()
        words[name] = ", ".join([first[1], *(f"from {m} columns on {way}" for m, way in others)])
    return words


def _of_type(of: OfType, running: kernels.InCharge | None) -> dict[str, Any]:
    shape = running.shape if running else next((shape for each in of.found for shape in each.times), "")
    chosen = running.choice if running else way_choice.choose(of.found, shape)
    return {
        "type": of.name,
        "in_charge": running is not None,
        "shape": shape,
        "chosen": _by_columns(chosen),
        "ways": [
            {
                "way": each.way,
                "verdict": each.fault or "right",
                "exact": each.is_exact,
                "steady": each.is_steady,
                "error": each.error,
                "times_us": {str(m): round(1e6 * s, 1) for m, s in each.times.get(shape, {}).items()},
            }
            for each in of.found
            if each.is_there
        ],
    }


def _by_columns(chosen: Choice) -> dict[str, str]:
    """The way by the smallest number of columns from which on it is taken."""
    found: dict[str, str] = {}
    for m in TIMED:
        way = chosen.way_for(m)
        if not found or list(found.values())[-1] != way:
            found[str(m)] = way
    return found
