"""The ways of computing that this process uses: found out once for a processor and a build, remembered, put in charge.

``prepare()`` is called with the matrices of a model before its weights are loaded. What is not known yet is tried in a
child (``trials.py``) and remembered (``remembered.py``); the choice (``way_choice.py``) is put into llama.cpp's tables,
which hold for the whole process.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from mullama.errors import ModelLoadError
from mullama.machine import way_choice
from mullama.machine.cores import usable_threads
from mullama.machine.remembered import ATTENTION_WEIGHTS, OfType, Remembered, Weights, timed_shape
from mullama.machine.trials import ATTENTION, LAYOUTS
from mullama.machine.way_choice import Choice

log = logging.getLogger("mullama.machine")

#: Threads that proofs take, at most: two tell whether the number of them changes anything.
PROOF_THREADS = 4

#: Of trials beside models that may be decoding.
NICE_BESIDE = 10

_ADOPT = "MULLAMA_ADOPT_KERNELS"


@dataclass(frozen=True, slots=True)
class InCharge:
    """How one type of weights is computed, what that was decided by, and for which shape ("": no times decided).

    ``named``: the way that the user asked for, or ``auto``.
    """

    name: str
    known: OfType
    shape: str
    choice: Choice
    named: str = "auto"


#: One at a time finds out and decides. Readers need no lock: the table below is replaced whole.
_deciding = threading.Lock()
_in_charge: dict[int, InCharge] = {}
_named = "auto"


def prepare(
    weights: Iterable[Weights],
    *,
    named: str = "auto",
    in_use: Callable[[], Container[int]] = tuple,
    root: Path | None = None,
    niceness: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Find out how to compute these weights here, and put it in charge of the process.

    ``named``: a way that the user wants, or ``auto``. ``in_use()``: types of models that are loaded: what computes them
    stays, since a graph may be under way, and answers do not change in the middle. ``niceness``: of the child, where
    there is something to try; None: a low priority where something computes already. Raises ModelLoadError where the
    way that the user named does not work here, or cannot be had beside what is loaded, with the reason.
    """
    global _in_charge, _named
    by_type = _by_type(weights)
    with _deciding:
        known = Remembered(root).find(by_type, _threads(), niceness=_niceness(niceness), progress=progress)
        for of in known.values():
            _refuse_broken(of, named)
        serving = in_use()
        new: dict[int, InCharge] = {}
        for kind, of in known.items():
            shape = timed_shape(by_type[kind])
            wanted = InCharge(of.name, of, shape, way_choice.choose(of.found, shape, named), named)
            before = _in_charge.get(kind)
            if before is not None and kind in serving:
                _refuse_second(before, wanted)
            elif before is None or before.named != named or shape or not before.shape:
                new[kind] = wanted
        for each in new.values():
            _put_in_charge(each.choice)
        _in_charge, _named = {**_in_charge, **new}, named
    lacking = [of.name for kind, of in known.items() if kind != ATTENTION and named != "auto" and not _can(of, named)]
    if lacking:
        log.warning(
            "kernels %s: there is no such way for %s weights on this machine; they go the plain way",
            named, ", ".join(lacking),
        )  # fmt: skip


def _niceness(told: int | None) -> int:
    return told if told is not None else NICE_BESIDE if _in_charge else 0


def _can(of: OfType, named: str) -> bool:
    return named in of.ways and of.ways[named].may_be_used


def _threads() -> int:
    return max(2, min(usable_threads(), PROOF_THREADS))


def _by_type(weights: Iterable[Weights]) -> dict[int, list[Weights]]:
    """With attention, which every model has or could have."""
    by_type = {ATTENTION: [ATTENTION_WEIGHTS]}
    for each in weights:
        by_type.setdefault(each.type, []).append(each)
    return by_type


def _refuse_second(before: InCharge, wanted: InCharge) -> None:
    if wanted.named != before.named and wanted.choice != before.choice:
        raise ModelLoadError(
            f"kernels {wanted.named} cannot be had beside a model that is loaded with kernels {before.named}: a "
            f"process computes all {_what(before.name)} in one way; close that model first, or use another process",
            param="kernels",
        )


def _refuse_broken(of: OfType, named: str) -> None:
    if named in of.ways and (fault := of.ways[named].fault):
        raise ModelLoadError(
            f"kernels {named} cannot be used for {_what(of.name)} on this machine: in a trial it {fault}; "
            "choose auto, or another one (mullama doctor shows them)",
            param="kernels",
        )


def _what(name: str) -> str:
    return name if name == ATTENTION_WEIGHTS.name else f"{name} weights"


def _put_in_charge(chosen: Choice) -> None:
    from mullama._core.kernels import products as kernels

    if chosen.type == ATTENTION:
        kernels.set_attention(chosen.layout == "attention")
        return
    for log2, way in enumerate(chosen.by_columns):
        kernels.set_kernel(chosen.type, log2, way)
    for way, layout in LAYOUTS.items():
        kernels.allow_layout(chosen.type, layout, way in chosen.layouts)


def in_charge() -> dict[int, InCharge]:
    """What this process computes with, by type of weights. Never waits for trials that are under way."""
    return _in_charge


def for_child(weights: Iterable[Weights], *, root: Path | None = None) -> dict[str, str]:
    """What a child that loads these weights needs in its environment, to compute in ways that work (``adopt()``)."""
    by_type = _by_type(weights)
    known = Remembered(root).find(by_type, _threads(), niceness=_niceness(None))
    chosen = [way_choice.choose(of.found, timed_shape(by_type[kind])) for kind, of in known.items()]
    return {_ADOPT: json.dumps([each.to_json() for each in chosen])}


def adopt() -> None:
    """In a child: compute as the parent said (``for_child()``)."""
    for fields in json.loads(os.environ.get(_ADOPT, "[]")):
        _put_in_charge(Choice.from_json(fields))
