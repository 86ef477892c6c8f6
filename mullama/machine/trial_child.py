"""The throw-away process in which ways of computing are tried.

``python -m mullama.machine.trial_child THREADS NICENESS`` reads what to try from the variable ``MULLAMA_TRIAL`` and
tells on stdout, a JSON object a line, what it is about to do and what came of it. Where it dies instead, the last thing
told is what killed it. What each of them means stands in ``trials.py``.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from typing import Any, Literal

from mullama import faults
from mullama.child import become_child
from mullama.machine.trials import ATTENTION, ATTENTION_CELLS, LAYOUTS, PROOF_SHAPES, TASKS, TIMED, Task

#: Bytes of weights that timing goes over, so that they come from memory as in a model; most matrices, least and most.
STREAMED, FEWEST, MOST = 64 << 20, 2, 64
#: Columns up to which reading the weights is what a product costs; from there on, fewer matrices take as long.
FEW = 4
#: Rounds over the ways, of which the best counts: as few as show the same twice, to within so much of it.
MIN_ROUNDS, MAX_ROUNDS, AGREEMENT = 3, 12, 1.08
#: Rows and values of a matrix of a model that are proved, at most; the end that fills no tile stays as it is.
PROVED_ROWS, PROVED_VALUES = 512, 2 << 20

Lie = Literal["dense", "strided", "batched"]
#: What is proved with several threads as well: on a busy machine each meeting of threads takes milliseconds.
_THREADED: frozenset[tuple[Lie, int]] = frozenset((("dense", 1), ("dense", 33), ("strided", 4), ("batched", 3)))
_COLUMNS: tuple[tuple[Lie, tuple[int, ...]], ...] = (
    ("dense", (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64)),
    ("strided", (1, 4, 9)),
    ("batched", (1, 3, 8)),
)


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main(threads: int, niceness: int) -> int:
    become_child(niceness)
    for fields in json.loads(os.environ[TASKS]):
        task = Task(**fields)
        if task.type == ATTENTION:
            _try_attention(task, threads)
        elif task.is_timing:
            times, is_quiet = _times(task)
            tell(at="end", times=times, is_quiet=is_quiet)
        else:
            _prove(task, task.ways[0], threads)
    return 0


def _try_attention(task: Task, threads: int) -> None:
    """Prove one way of attention, or time several."""
    from mullama._core.kernels import products as kernels

    if task.is_timing:
        times: dict[str, dict[int, float]] = {}
        for way in task.ways:
            tell(at="start", way=way)
            kernels.set_attention(way == "attention")
            seconds = kernels.check_attention(ATTENTION_CELLS, 1, 1)[3]
            times[way] = {1: 10.0 * seconds if faults.trial_fault(way) == "slow" else seconds}
        tell(at="end", times=times, is_quiet=True)
        return
    (way,) = task.ways
    tell(at="start", way=way)
    _misbehave(way)
    kernels.set_attention(way == "attention")
    if way == "attention" and not kernels.has_attention():
        tell(at="end", there=False)
        return
    found = [
        kernels.check_attention(cells, tokens, n_threads)
        for cells, tokens in ((1, 1), (40, 1), (100, 5), (ATTENTION_CELLS, 1))
        for n_threads in sorted({1, threads})
    ]
    error = max(off if is_finite else math.inf for is_finite, _, off, _ in found)
    if faults.trial_fault(way) == "differ":
        error = math.inf
    is_exact = all(exact for _, exact, _, _ in found[:-2])  # many cells are cut up among the threads
    tell(at="end", there=True, is_exact=is_exact, is_steady=is_exact, error=min(error, 1e9))


def _misbehave(way: str) -> None:
    """Do what a test has put into the trial of this way."""
    fault = faults.trial_fault(way)
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGILL)
    if fault == "hang":
        time.sleep(3600)


def _take(task: Task, way: str) -> str:
    """Have products of the type computed that way. Returns the layout that their weights must have."""
    from mullama._core.kernels import products as kernels

    layout = LAYOUTS.get(way, "")
    for log2 in range(kernels.N_CLASSES):
        kernels.set_kernel(task.type, log2, "plain" if layout else way)
    return layout


def proved_shape(k: int, n: int) -> tuple[int, int]:
    """The part of a matrix that is proved."""
    whole = max(64, min(PROVED_ROWS, PROVED_VALUES // k // 64 * 64))
    return k, min(n, whole + n % 64)


def _prove(task: Task, way: str, threads: int) -> None:
    from mullama._core.kernels import products as kernels

    tell(at="start", way=way)
    _misbehave(way)
    layout = _take(task, way)
    there = is_exact = is_steady = True
    error = 0.0
    n_proved = 0
    if layout and layout not in kernels.layouts():
        there = False
    for k, n in (*PROOF_SHAPES, *(proved_shape(*shape) for shape in task.shapes)) if there else ():
        if k % task.block:
            continue
        plain = kernels.Products(task.type, k, n)
        try:
            tried = kernels.Products(task.type, k, n, layout) if layout else plain
        except ValueError:  # no matrix of this type or shape lies so
            continue
        before_shape = n_proved
        for columns, counts in _COLUMNS:
            for m in counts:
                if not tried.can(m, columns):
                    continue
                before = kernels.counts()[way]
                numbers = {1, threads} if (columns, m) in _THREADED else {1}
                found = [tried.check(plain, m, columns, n_threads) for n_threads in sorted(numbers)]
                if kernels.counts()[way] == before:
                    continue  # it went another way
                n_proved += 1
                for is_finite, exact, off in found:
                    is_exact = is_exact and exact
                    error = max(error, off if is_finite else math.inf)
        if n_proved > before_shape:
            is_steady = is_steady and all(tried.is_steady(8, threads))
    if faults.trial_fault(way) == "differ":
        error = math.inf
    tell(at="end", there=n_proved > 0, is_exact=is_exact, is_steady=is_steady, error=min(error, 1e9))


def _times(task: Task) -> tuple[dict[str, dict[int, float]], bool]:
    """Seconds of one product by way and number of columns, and whether the machine was quiet enough to believe them.

    Numbers of columns that do not go a way are left out. One thread: several meet at a barrier after every product, and
    one that loses its core for a moment would make the others' times anything.
    """
    from mullama._core.kernels import products as kernels

    ((k, n),) = task.shapes
    copies = max(FEWEST, min(MOST, -(-STREAMED // (task.row_bytes(k) * n))))
    products: dict[str, kernels.Products] = {}
    for layout in {LAYOUTS.get(way, "") for way in task.ways}:
        try:
            products[layout] = kernels.Products(task.type, k, n, layout, copies)
        except ValueError:
            continue
    seen: dict[tuple[str, int], list[float]] = {}
    is_quiet = False
    for i in range(MAX_ROUNDS):
        for way in task.ways:
            layout = _take(task, way)
            if layout not in products:
                continue
            tell(at="start", way=way)
            factor = 10.0 if faults.trial_fault(way) == "slow" else 1.0
            for m in TIMED:
                before = kernels.counts()[way]
                matrices = copies if m <= FEW else max(FEWEST, copies * FEW // m)
                seconds = factor * products[layout].time(m, 1, matrices, 1)
                if kernels.counts()[way] > before:
                    seen.setdefault((way, m), []).append(seconds)
        is_quiet = all(sorted(each)[1] <= AGREEMENT * min(each) for each in seen.values()) if i else False
        if is_quiet and i + 1 >= MIN_ROUNDS:
            break
    best: dict[str, dict[int, float]] = {way: {} for way in task.ways}
    for (way, m), each in seen.items():
        best[way][m] = min(each)
    return best, is_quiet


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
