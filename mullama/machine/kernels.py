"""The ways of computing that this process uses: found out once for a processor and a build, remembered, put in charge.

``prepare()`` is called with the matrices of a model before its weights are loaded. What is not known yet is tried in a
child (``trials.py``) and remembered (``remembered.py``); the choice (``choice.py``) is put into llama.cpp's tables,
which hold for the whole process.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mullama.errors import ModelLoadError
from mullama.machine import choice as choices
from mullama.machine.choice import Choice
from mullama.machine.cores import usable_threads
from mullama.machine.remembered import ATTENTION_WEIGHTS, OfType, Remembered, Weights, timed_shape
from mullama.machine.trials import ATTENTION, LAYOUTS

#: Threads that proofs take, at most: two tell whether the number of them changes anything.
PROOF_THREADS = 4

_ADOPT = "MULLAMA_ADOPT_KERNELS"


@dataclass(frozen=True, slots=True)
class InCharge:
    """How one type of weights is computed, what that was decided by, and for which shape ("": no times decided)."""

    name: str
    known: OfType
    shape: str
    choice: Choice


_lock = threading.Lock()
_in_charge: dict[int, InCharge] = {}
_named = "auto"


def prepare(
    weights: Iterable[Weights],
    *,
    named: str = "auto",
    root: Path | None = None,
    niceness: int = 0,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Find out how to compute these weights here, and put it in charge of the process.

    ``named``: a way that the user wants, or ``auto``. ``niceness``: of the child, where there is something to try.
    Raises ModelLoadError where the way that the user named does not work here, with the reason.
    """
    global _named
    by_type = _by_type(weights)
    with _lock:
        known = Remembered(root).find(by_type, _threads(), niceness=niceness, progress=progress)
        for kind, of in known.items():
            _refuse_broken(of, named)
            shape = timed_shape(by_type[kind])
            before = _in_charge.get(kind)
            if before is not None and named == _named and (before.shape or not shape):
                continue  # what runs goes on as it began: its answers do not change in the middle
            _in_charge[kind] = InCharge(of.name, of, shape, choices.choose(of.found, shape, named))
            _put_in_charge(_in_charge[kind].choice)
        _named = named


def _threads() -> int:
    return max(2, min(usable_threads(), PROOF_THREADS))


def _by_type(weights: Iterable[Weights]) -> dict[int, list[Weights]]:
    """With attention, which every model has or could have."""
    by_type = {ATTENTION: [ATTENTION_WEIGHTS]}
    for each in weights:
        by_type.setdefault(each.type, []).append(each)
    return by_type


def _refuse_broken(of: OfType, named: str) -> None:
    if named in of.ways and (fault := of.ways[named].fault):
        raise ModelLoadError(
            f"kernels {named} cannot be used for {of.name} weights on this machine: in a trial it {fault}; "
            "choose auto, or another one (mullama doctor shows them)",
            param="kernels",
        )


def _put_in_charge(chosen: Choice) -> None:
    from mullama._core import kernels

    if chosen.type == ATTENTION:
        kernels.set_attention(chosen.layout == "attention")
        return
    for log2, way in enumerate(chosen.by_columns):
        kernels.set_kernel(chosen.type, log2, way)
    for way, layout in LAYOUTS.items():
        kernels.allow_layout(chosen.type, layout, way in chosen.layouts)


def in_charge() -> dict[int, InCharge]:
    """What this process computes with, by type of weights."""
    with _lock:
        return dict(_in_charge)


def named_way() -> str:
    """The way that the user asked for, or ``auto``."""
    return _named


def for_child(weights: Iterable[Weights], *, root: Path | None = None) -> dict[str, str]:
    """What a child that loads these weights needs in its environment, to compute in ways that work (``adopt()``)."""
    by_type = _by_type(weights)
    known = Remembered(root).find(by_type, _threads())
    chosen = [choices.choose(of.found, timed_shape(by_type[kind])) for kind, of in known.items()]
    return {_ADOPT: json.dumps([each.to_json() for each in chosen])}


def adopt() -> None:
    """In a child: compute as the parent said (``for_child()``)."""
    for fields in json.loads(os.environ.get(_ADOPT, "[]")):
        _put_in_charge(Choice.from_json(fields))
