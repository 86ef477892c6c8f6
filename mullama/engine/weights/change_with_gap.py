"""A change of weights where memory does not hold both: the old ones are freed before the new ones are loaded.

The sequences are held at a step boundary, their KV waits in host memory, and everything goes on when the new weights
are there, or, when they cannot be loaded, when the old ones are there again. The time between is the gap: streams
pause, requests that come wait, nothing is dropped. The engine thread does it all and takes no command meanwhile.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mullama import faults
from mullama._core import Core, Model
from mullama.engine.memory import fits
from mullama.engine.parts import EngineParts
from mullama.engine.weights.change import ChangeState, WeightChange
from mullama.engine.weights.soundness import mode_of_file
from mullama.engine.weights.unload import load_again, stand_in, unload
from mullama.errors import EngineDead, LoadCancelled, MemoryTooSmall, ModelLoadError, MullamaError, ShuttingDown
from mullama.models.files.estimate import Estimate
from mullama.types import GapMode, KvMode, MemoryLeft

log = logging.getLogger("mullama.engine")

MAX_GAP_S = 300.0  # of loading the new weights; then the old ones come back


@dataclass(slots=True, frozen=True)
class Needs:
    """What is in memory before the change, in bytes: the engine's own (a mapped file is the page cache's), and the
    KV that carrying would save."""

    own: int
    kv: int


def needs_of(core: Core) -> Needs:
    """Engine thread."""
    found = core.memory()
    copied = sum(size for kind, size in found["weights"].items() if not kind.endswith("_Mapped"))
    own = copied + sum(found["kv"].values()) + sum(found["compute"].values()) + found["output"]
    kv = sum(core.state_bytes(slot) for slot in range(core.n_slots) if core.slot_fill(slot)[0])
    return Needs(own, kv)


def decide(
    path: str | Path,
    new: Estimate | None,
    needs: Needs,
    free: int | None,
    memory_left: MemoryLeft | None,
    gap: GapMode,
    kv: KvMode,
) -> KvMode | None:
    """None: the new weights are loaded beside the old ones. Else the change needs a gap, and what becomes of the KV.

    ``free`` and ``memory_left``: bytes of memory, and of the budget; None: no limit. Raises MemoryTooSmall where it
    does not fit in either way.
    """
    if new is None:
        return None
    beside = [left for left in (free, None if memory_left is None else memory_left.beside) if left is not None]
    wanted = beside_bytes(new)
    if all(wanted <= left for left in beside):
        return None
    told = f"{path} would take {_mib(wanted)}, and {_mib(min(beside))} are free beside what is loaded"
    if gap is GapMode.NEVER:
        raise MemoryTooSmall(f"{told}; with a gap the old weights would be freed first", param="gap")
    most = min(
        left
        for left in (None if free is None else free + needs.own, None if memory_left is None else memory_left.alone)
        if left is not None
    )
    if new.total > most:
        raise MemoryTooSmall(
            f"{told}; without the old weights {_mib(most)} are free for {_mib(new.total)}, KV included", param="to"
        )
    # While it is saved it is there twice.
    if kv is KvMode.RECOMPUTE or (new.total + needs.kv <= most and (free is None or needs.kv <= free)):
        return kv
    if kv is KvMode.CARRY:
        raise MemoryTooSmall(f"{told}; there is no room to save {_mib(needs.kv)} of KV meanwhile", param="kv")
    return KvMode.RECOMPUTE


def beside_bytes(new: Estimate) -> int:
    """What a file takes beside the old weights. It goes on with their KV, and its own cells are never touched: on
    Linux they take no memory (vendor/patches/0004-cells-untouched.patch)."""
    untouched = new.kv.get("full", 0) + new.kv.get("window", 0) if sys.platform == "linux" else 0
    return new.total - untouched


def _mib(n_bytes: int) -> str:
    return f"{max(n_bytes, 0) >> 20} MiB"


def gap_for(
    parts: EngineParts, path: str | Path, kv: KvMode, gap: GapMode, memory_left: MemoryLeft | None
) -> KvMode | None:
    """``decide`` for an engine as it is now; CARRY or RECOMPUTE where a gap is needed. Blocks.

    Raises also what ``mode_of`` and ``Loras.check_on`` raise.
    """
    core = parts.core
    new = fits.expected(path, parts.config, n_ctx=core.n_ctx, n_parallel=core.n_slots)
    free = fits.free_memory(parts.config)
    needs = parts.commands.call(lambda: needs_of(core)).result()
    found = decide(path, new, needs, free, memory_left, gap, kv)
    if found is None:
        return None
    parts.loras.check_on(path)
    mode = mode_of_file(core.model, path, kv, False)
    return KvMode.RECOMPUTE if found is KvMode.RECOMPUTE else mode


class ChangeWithGap(WeightChange):
    """READY at once: all there is to do is done at one step boundary."""

    mode = "gap"
    _substitute: Model | None = None  # tokenises while there are no weights

    def _prepare(self) -> None:
        self._substitute = stand_in(self._parts.core.model, self._parts.config)
        self._on_phase("gap")

    def _enter(self) -> None:
        self.move(ChangeState.READY)

    def _exchange(self, recomputed: int) -> tuple[int, int]:
        parts, began = self._parts, time.monotonic_ns()
        assert self._substitute is not None
        is_busy = recomputed > 0 or any(parts.seqs.slots)
        old_path = parts.core.model.path
        vacancy = unload(parts, self._substitute)
        self.move(ChangeState.UNLOADED)
        since = vacancy.held_ns if is_busy else 0
        faults.crash_point("swap:in-gap")
        loading_since = time.monotonic_ns()

        def on_progress(fraction: float) -> bool:
            if parts.commands.stopping or time.monotonic_ns() - loading_since > MAX_GAP_S * 1e9:
                return False
            return self._progress is None or self._progress(fraction) is not False

        try:
            moved = load_again(parts, self._path, on_progress, since_ns=since, is_swap=True)
        except BaseException as error:
            self._go_back(old_path, error, began, since)
        self.move(ChangeState.IN_CHARGE)
        now = time.monotonic_ns()
        self.load_ms, self.gap_ms = (now - loading_since) / 1e6, (now - began) / 1e6
        self._adopt(parts.core.model)
        return moved, vacancy.n_bytes

    def _go_back(self, path: str, error: BaseException, began: int, since: int) -> NoReturn:
        """The new weights do not come: load the old ones again, and raise why."""
        reason = error.message if isinstance(error, MullamaError) else f"{type(error).__name__}: {error}"
        commands = self._parts.commands
        if commands.stopping:
            self.move(ChangeState.LOST)
            raise ShuttingDown("the engine was closed during a change of weights") from error
        log.warning("the new weights could not be loaded (%s): the old ones are loaded again", reason)
        try:
            load_again(self._parts, path, lambda fraction: not commands.stopping, since_ns=since)
        except BaseException as worse:
            self.move(ChangeState.LOST)
            raise EngineDead(
                f"the new weights could not be loaded ({reason}), and the old ones not again ({worse})"
            ) from worse
        self.move(ChangeState.KEPT)
        gap_ms = (time.monotonic_ns() - began) / 1e6
        kind = LoadCancelled if isinstance(error, LoadCancelled) else ModelLoadError
        raise kind(f"{reason}; the old weights are in charge again, after a gap of {gap_ms:.0f} ms") from error

    def _clean_up(self) -> None:
        if self._substitute is not None:
            self._substitute.close()
