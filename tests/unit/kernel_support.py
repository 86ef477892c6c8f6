"""What trials of ways of computing may have found, without trying anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mullama.machine import remembered, trials
from mullama.machine.remembered import Weights
from mullama.machine.trials import ATTENTION, TIMED, WAYS, Found, Task

Q4_0, Q8_0, Q4_K = 2, 8, 12
SHAPE = "2048x2048"


def weights(kind: int = Q8_0, k: int = 2048, n: int = 2048, count: int = 2) -> Weights:
    """Matrices of a model, so large that they are worth timing."""
    name, block, block_bytes = {Q4_0: ("Q4_0", 32, 18), Q8_0: ("Q8_0", 32, 34), Q4_K: ("Q4_K", 256, 144)}[kind]
    return Weights(kind, name, block, block_bytes, k, n, count)


def right(way: str, seconds: float | dict[int, float] | None = None, *, kind: int = Q8_0, **fields: Any) -> Found:
    """A way that is right; ``seconds``: with every number of columns, or by it."""
    by = seconds if isinstance(seconds, dict) else dict.fromkeys(TIMED, seconds) if seconds else {}
    given = {"is_exact": True, "is_steady": True, "times": {SHAPE: by} if by else {}, **fields}
    return Found(kind, way, **given)


def wrong(way: str, fault: str = "crashed (SIGSEGV)", *, kind: int = Q8_0, **fields: Any) -> Found:
    return Found(kind, way, True, fault, **fields)


class Trials:
    """Stands for ``trials.run``: says ``found`` of every way, or that it is plain and right, and counts what is tried.

    Of attention nothing is noted. ``found(task, way)`` gives what is not so; ``busy``: types that nothing is timed of.
    """

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.niceness: list[int] = []
        self.busy: set[int] = set()
        self.found: Callable[[Task, str], Found | None] = lambda task, way: None

    def run(
        self, tasks: Sequence[Task], threads: int, *, niceness: int = 0, progress: Any = None
    ) -> tuple[list[Found], set[int]]:
        self.tasks += [task for task in tasks if task.type != ATTENTION]
        self.niceness.append(niceness)
        return [self._of(task, way) for task in tasks for way in task.ways], self.busy

    def _of(self, task: Task, way: str) -> Found:
        if task.type == ATTENTION:
            return Found(ATTENTION, way, is_exact=True, times={"64x700": {1: 1e-3 if way == "attention" else 2e-3}})
        if (said := self.found(task, way)) is not None:
            return said
        if way not in ("plain", "tiles"):
            return Found(task.type, way, is_there=False)
        speed = 2e-3 if way == "plain" else 1e-3
        is_timed = bool(task.shapes) and task.type not in self.busy
        times = {"{}x{}".format(*task.shapes[0]): dict.fromkeys(TIMED, speed)} if is_timed else {}
        return Found(task.type, way, is_exact=True, is_steady=True, times=times)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Trials:
    fake = Trials()
    monkeypatch.setattr(trials, "run", fake.run)
    monkeypatch.setattr(remembered, "_build", lambda: "a build")
    return fake


assert set(WAYS) >= {"plain", "tiles"}
