"""What trials of ways of computing found on this processor with this build, kept in a file of the store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import filelock

from mullama import faults
from mullama.home import default_root
from mullama.machine import trials
from mullama.machine.processor import processor
from mullama.machine.trials import ATTENTION, ATTENTION_CELLS, ATTENTION_WAYS, WAYS, Found, Task

log = logging.getLogger("mullama.machine")

#: Changed when trials find out something else than before: what is remembered of older ones is not believed.
VERSION = 1

#: Weights of one type below this many bytes are not worth timing: what they cost is lost in the noise of a step.
WORTH_TIMING = 4 << 20
#: Values of a matrix that is timed, at most; larger ones are cut to so many rows.
MAX_VALUES = 4 << 20
#: Shapes of a type that are proved, at most: those that hold most of the weights.
MAX_SHAPES = 6
#: Seconds after which a machine that was too busy for timing is asked again.
BUSY_S = 600.0
#: Seconds that one process waits for another that tries the same.
LOCK_S = 120.0


#: By file, what this process found out and could not write.
_unkept: dict[Path, dict[int, OfType]] = {}


@dataclass(frozen=True, slots=True)
class Weights:
    """Matrices of one shape in a model: ``count`` of ``n`` rows of ``k`` values."""

    type: int
    name: str
    block: int
    block_bytes: int
    k: int
    n: int
    count: int = 1

    @property
    def bytes(self) -> int:
        return self.k // self.block * self.block_bytes * self.n * self.count

    @property
    def cut(self) -> tuple[int, int]:
        """The shape that stands for it in a trial."""
        return self.k, min(self.n, max(64, MAX_VALUES // self.k // 64 * 64))


@dataclass(frozen=True, slots=True)
class OfType:
    """What is known of one type of weights. ``busy_at``: when the machine was too busy, or too short of memory, to find
    out more, in s since the epoch.
    """

    name: str
    ways: dict[str, Found] = field(default_factory=dict)
    busy_at: float = 0.0

    @property
    def found(self) -> list[Found]:
        return [self.ways[way] for way in ("attention", *WAYS) if way in self.ways]

    def covers(self, shape: str) -> bool:
        """Whether there is nothing left to try for weights of this shape ("": nothing to time)."""
        if set(self.ways) not in (set(WAYS), set(ATTENTION_WAYS)):
            return False
        if 0 <= time.time() - self.busy_at < BUSY_S:
            return True
        usable = [each for each in self.ways.values() if each.may_be_used]
        is_timed = not shape or not usable or any(shape in each.times for each in usable)
        return is_timed and all(each.is_lasting for each in self.ways.values())


#: What stands for attention among the matrices of a model.
ATTENTION_WEIGHTS = Weights(ATTENTION, "attention", 1, 1, 64, ATTENTION_CELLS, WORTH_TIMING)


def timed_shape(weights: Sequence[Weights]) -> str:
    """The name of the shape whose times decide for a type: that of most weights. "": too few to matter."""
    if sum(each.bytes for each in weights) < WORTH_TIMING:
        return ""
    return "{}x{}".format(*_largest(weights)[0].cut)


def _largest(weights: Sequence[Weights]) -> list[Weights]:
    return sorted(weights, key=lambda each: each.bytes, reverse=True)[:MAX_SHAPES]


def _task(weights: Sequence[Weights]) -> Task:
    first = weights[0]
    if first.type == ATTENTION:
        return Task(ATTENTION, first.name, ATTENTION_WAYS, 1, 1, (first.cut,))
    shapes = tuple(dict.fromkeys(each.cut for each in _largest(weights))) if timed_shape(weights) else ()
    return Task(first.type, first.name, tuple(reversed(WAYS)), first.block, first.block_bytes, shapes)


class Remembered:
    """The file, and the trials that fill it. ``root`` is the store's folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.folder = (root if root is not None else default_root()) / "kernels"
        self.path = self.folder / f"{_key()}.json"

    def find(
        self,
        by_type: dict[int, list[Weights]],
        threads: int,
        *,
        niceness: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> dict[int, OfType]:
        """What is known of all these types; what is not in the file is tried and written to it."""
        known = self.read()
        if self._missing(by_type, known):
            with self._locked():
                known = self.read()  # another process may have found out meanwhile
                if missing := self._missing(by_type, known):
                    self._try(missing, known, threads, niceness, progress)
                    self._write(known)
        return {kind: known[kind] for kind in by_type}

    @staticmethod
    def _missing(by_type: dict[int, list[Weights]], known: dict[int, OfType]) -> dict[int, list[Weights]]:
        return {k: w for k, w in by_type.items() if k not in known or not known[k].covers(timed_shape(w))}

    @staticmethod
    def _try(
        missing: dict[int, list[Weights]],
        known: dict[int, OfType],
        threads: int,
        niceness: int,
        progress: Callable[[str], None] | None,
    ) -> None:
        names = {kind: weights[0].name for kind, weights in missing.items()}
        log.info("trying the ways of computing %s on this machine, once for this build", ", ".join(names.values()))
        tasks = [_task(weights) for weights in missing.values()]
        found, busy = trials.run(tasks, threads, niceness=niceness, progress=progress)
        for kind, name in names.items():
            if kind in busy:
                log.info("the machine is too busy to time the ways of computing %s: ggml's own order for now", name)
            before = known[kind].ways if kind in known else {}
            ways = {each.way: _merged(before.get(each.way), each) for each in found if each.type == kind}
            is_unsure = kind in busy or not all(each.is_lasting for each in ways.values())
            known[kind] = OfType(name, ways, time.time() if is_unsure else 0.0)
        for each in found:
            if each.fault:
                log.warning("%s is not used for %s here: in a trial it %s", each.way, names[each.type], each.fault)

    def read(self) -> dict[int, OfType]:
        """By type, what the file holds; nothing where there is none, or none that can be read."""
        if self.path in _unkept:
            return dict(_unkept[self.path])
        try:
            types = json.loads(self.path.read_text())["types"]
            return {
                int(kind): OfType(
                    str(fields["name"]),
                    {each["way"]: Found.from_json({**each, "type": int(kind)}) for each in fields["ways"].values()},
                    float(fields["busy_at"]),
                )
                for kind, fields in types.items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            return {}

    def _write(self, known: dict[int, OfType]) -> None:
        """Where it cannot be written, this process remembers it alone, and the next one finds it out again."""
        content = {
            "version": VERSION,
            "processor": processor().name,
            "types": {
                kind: {
                    "name": of.name,
                    "ways": {way: each.to_json() for way, each in of.ways.items()},
                    "busy_at": of.busy_at,
                }
                for kind, of in known.items()
            },
        }
        scratch = self.path.with_suffix(f".{os.getpid()}")
        try:
            scratch.write_text(json.dumps(content))
            scratch.replace(self.path)
            _unkept.pop(self.path, None)
        except OSError as error:
            if self.path not in _unkept:
                log.warning("what was found out about ways of computing is not kept: %s", error)
            _unkept[self.path] = dict(known)
            with contextlib.suppress(OSError):
                scratch.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one process tries at a time, or their times say nothing. Without a writable folder there is no lock."""
        lock = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path.with_suffix(".lock"))
            lock.acquire(timeout=LOCK_S)
        except (OSError, NotImplementedError, filelock.Timeout):
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()


def _merged(before: Found | None, found: Found) -> Found:
    """What a new trial found, with the times of other shapes that an earlier one took."""
    if before is None or found.fault or before.fault:
        return found
    return replace(
        found,
        is_exact=before.is_exact and found.is_exact,
        is_steady=before.is_steady and found.is_steady,
        error=max(before.error, found.error),
        times={**before.times, **found.times},
    )


def _key() -> str:
    """What an entry holds for: the processor with what its system gives, the build, faults put in by tests."""
    cpu = processor()
    parts = [
        *(str(VERSION), cpu.architecture, str(cpu.name), str(cpu.family), str(cpu.model), str(cpu.stepping)),
        *(" ".join(sorted(cpu.flags)), _build(), os.environ.get(faults.TRIAL_VARIABLE, "")),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@functools.cache
def _build() -> str:
    """What tells this build's computing from another's: the digest of the libraries that compute."""
    spec = find_spec("mullama._core")
    roots = [Path(place).parent / "lib" for place in (spec.submodule_search_locations or [])] if spec else []
    digest = hashlib.sha256()
    for folder in roots:
        for library in sorted(folder.glob("*ggml-cpu*")):
            with library.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
