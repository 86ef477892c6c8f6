"""Trying ways of computing in a process of its own: which of them run here, are right, and how fast they are.

A way is a name of ``WAYS``: how products of weights of one type are computed. ``plain`` is a row by a column at a time;
``sgemm``, ``tiles`` (our exact tiles) and ``tiled`` are other kernels for weights as they lie in the file; ``repack``
and ``amx`` are layouts of their own that weights are loaded into. Each way is proved first, one after another: the
child says what it is about to do before it does it, so that a crash or a hang is held against one way, and the rest is
tried in another child. Those that are right are timed then, in turns, so that a machine that is busy for a while is
busy for all of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mullama import child

#: The ways there are. The order is that in which ggml would take them, the plain one last.
WAYS = ("amx", "repack", "tiled", "tiles", "sgemm", "plain")
#: Those that are layouts of weights, by ggml's names of their buffers.
LAYOUTS = {"amx": "AMX", "repack": "CPU_REPACK"}

#: Attention of decoded tokens is tried like a type of weights that no file has: for several heads at a time, and
#: plainly.
ATTENTION = -1
ATTENTION_WAYS = ("attention", "plain")
ATTENTION_CELLS = 700

#: Numbers of columns that are timed; each stands for the classes of columns from it up to the next one.
TIMED = (1, 2, 4, 8, 16, 32, 128)
#: By the logarithm of the number of columns: which of the timed numbers stands for it.
CLASSES = (1, 2, 4, 8, 16, 32, 32, *(128,) * 9)

#: Shapes that every type is proved on, whatever model asks: one and several blocks, full tiles and ends that fill none.
PROOF_SHAPES = ((256, 64), (256, 33), (512, 96), (1280, 200))

#: Largest error, relative to the size of the result, that another order of sums explains: fifty times the largest seen.
TOLERANCE = 1e-4
#: Of types of floats, whose columns some ways round to the same type and others do not (F16 and BF16); of attention,
#: which rounds its sums to half precision after every cell, or not.
ROUGH = {1: 1e-3, 30: 1e-2, ATTENTION: 2e-2}

TASKS = "MULLAMA_TRIAL"

#: Seconds that one way of one type may take.
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Task:
    """Prove or time ways for weights of one type.

    ``ways``: one to prove, several to time. ``shapes``: (k, n) of matrices of the model. ``block`` and ``block_bytes``:
    values and bytes of a block of the type.
    """

    type: int
    name: str
    ways: tuple[str, ...]
    block: int
    block_bytes: int
    shapes: tuple[tuple[int, int], ...] = ()
    is_timing: bool = False

    def row_bytes(self, k: int) -> int:
        return k // self.block * self.block_bytes


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a way. ``fault`` is why it must not be used, in words; empty where it may.

    ``is_exact``: equal to the bit to the reference computations. ``is_steady``: equal to itself, whatever the number of
    columns and threads. ``times``: seconds of one product by shape ("KxN") and number of columns. ``is_lasting``: False
    where the fault may be the machine's of that moment (memory was short), so that it is tried again some time later.
    """

    type: int
    way: str
    is_there: bool = True
    fault: str = ""
    is_exact: bool = False
    is_steady: bool = False
    error: float = 0.0
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    is_lasting: bool = True

    @property
    def may_be_used(self) -> bool:
        return self.is_there and not self.fault

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Found:
        """Raises TypeError, ValueError, KeyError, AttributeError or OverflowError for what is none."""
        times = {shape: {int(m): float(s) for m, s in by.items()} for shape, by in fields["times"].items()}
        ways = ATTENTION_WAYS if fields["type"] == ATTENTION else WAYS
        if fields["way"] not in ways or not all(is_time(m, s) for by in times.values() for m, s in by.items()):
            raise ValueError("no trial finds this")
        return cls(**{**fields, "times": times})


def is_time(m: int, seconds: float) -> bool:
    """Whether a trial may say so."""
    return m in TIMED and 0 < seconds < math.inf


def run(
    tasks: Sequence[Task],
    threads: int,
    *,
    niceness: int = 0,
    patience_s: float = PATIENCE_S,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Found], set[int]]:
    """Prove every way of every task, then time those that are right on the tasks' shapes, on the first of them only.

    Returns what was found, and the types for which nothing could be timed: the machine was too busy, or had no memory.
    ``threads``: of the proofs. ``progress`` is told, in words, what is tried. Never raises for what a way does to its
    process.
    """
    trial = _Trial(threads, niceness, patience_s, progress)
    proofs = [replace(task, ways=(way,)) for task in tasks for way in task.ways]
    trial.run(proofs)
    timings = []
    for task in tasks:
        right = tuple(way for way in task.ways if trial.found[task.type, way].may_be_used)
        if task.shapes and right:
            timings.append(replace(task, ways=right, shapes=task.shapes[:1], is_timing=True))
    trial.run(timings)
    return list(trial.found.values()), trial.disturbed


class _Trial:
    """Children that work through tasks; a new one after each that died."""

    def __init__(self, threads: int, niceness: int, patience_s: float, progress: Callable[[str], None] | None) -> None:
        self.threads = threads
        self.niceness = niceness
        self.patience_s = patience_s
        self.progress = progress
        self.found: dict[tuple[int, str], Found] = {}
        self.disturbed: set[int] = set()

    def run(self, tasks: Iterable[Task]) -> None:
        left = list(tasks)
        while left:
            left = self._run_once(left)

    def _run_once(self, tasks: list[Task]) -> list[Task]:
        """One child. Returns what is left to do: nothing, or what came after a task that it died of."""
        text = json.dumps([asdict(task) for task in tasks])
        arguments = [str(self.threads), str(self.niceness)]
        process = child.start("mullama.machine.trial_child", arguments, {TASKS: text})
        assert process.stdout is not None and process.stderr is not None
        errors: list[bytes] = []
        reader = process.stderr.read
        drain = threading.Thread(target=lambda: errors.append(reader()), name="mullama-trial", daemon=True)
        drain.start()
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            process.kill()

        n_done, way = 0, ""  # the way that is under way
        timer = threading.Timer(self.patience_s, give_up)
        timer.start()
        try:
            for line in process.stdout:
                told = _parse(line)
                if n_done == len(tasks):
                    continue
                if told.get("at") == "start" and told.get("way") in tasks[n_done].ways:
                    way = told["way"]
                    timer.cancel()
                    timer = threading.Timer(self.patience_s, give_up)
                    timer.start()
                    if self.progress is not None:
                        self.progress(f"{tasks[n_done].name}: {way}")
                elif told.get("at") == "end":
                    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # not the child's words
                        self._note(tasks[n_done], told)
                        n_done, way = n_done + 1, ""
            status = process.wait()
        finally:
            timer.cancel()
            child.stop(process)
            drain.join(5)
        if n_done == len(tasks):
            return []
        if not way and n_done:  # it died between two of them: whether of the next one, a new child will tell
            return tasks[n_done:]
        task = tasks[n_done]
        if not way and task.is_timing:  # of the weights that it prepares, before any way had its turn
            self.disturbed.add(task.type)
            return tasks[1:]
        way = way or task.ways[0]
        words = " ".join(b"".join(errors).decode("utf-8", "replace").split())[-200:]
        if is_late.is_set():
            fault, is_lasting = f"hung: stopped after {self.patience_s:g} s", True
        else:
            fault, is_lasting = _died(status, words)
        self.found[task.type, way] = Found(task.type, way, True, fault, is_lasting=is_lasting)
        others = tuple(other for other in task.ways if other != way)
        again = [replace(task, ways=others)] if task.is_timing and others else []
        return [*again, *tasks[n_done + 1 :]]

    def _note(self, task: Task, told: dict[str, Any]) -> None:
        if task.is_timing:
            shape = "{}x{}".format(*task.shapes[0])
            if not told["is_quiet"]:
                self.disturbed.add(task.type)
                return
            for way, times in told["times"].items():
                of_shape = {int(m): float(seconds) for m, seconds in times.items()}
                if all(is_time(m, seconds) for m, seconds in of_shape.items()):
                    self.found[task.type, way] = replace(self.found[task.type, way], times={shape: of_shape})
            return
        (way,) = task.ways
        if not told["there"]:
            self.found[task.type, way] = Found(task.type, way, is_there=False)
            return
        error = float(told["error"])
        tolerance = ROUGH.get(task.type, TOLERANCE)
        fault = "" if error <= tolerance else f"computes wrong results (an error of {error:.2g} of their size)"
        self.found[task.type, way] = Found(
            task.type, way, True, fault, bool(told["is_exact"]), bool(told["is_steady"]), error
        )


def _parse(line: bytes) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):  # a library's own words
        return {}
    return told if isinstance(told, dict) else {}


#: What others end a process with: memory is short, somebody wants it gone.
_FROM_OUTSIDE = {-getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)}


def _died(status: int, words: str) -> tuple[str, bool]:
    """Why, and whether it would again."""
    if status == -signal.SIGILL:
        return "uses an instruction that this processor or its system does not carry (SIGILL)", True
    if status in _FROM_OUTSIDE:
        return f"was killed ({child.signal_name(-status)}); the machine may be short of memory", False
    if status < 0:
        return f"crashed ({child.signal_name(-status)})", True
    return f"ended its process with status {status}" + (f": {words}" if words else ""), False
