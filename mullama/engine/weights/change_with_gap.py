"""A change of weights where memory does not hold both: the old ones are freed before the new ones are loaded.

The sequences are held at a step boundary, their KV waits in host memory, and everything goes on when the new weights
are there, or, when they cannot be loaded, when the old ones are there again. The time between is the gap: streams
pause, requests that come wait, nothing is dropped. The engine thread does it all and takes no command meanwhile.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mullama import faults
from mullama._core import Core, Model, Vacancy
from mullama.engine.memory import fits
from mullama.engine.weights import load as loading
from mullama.engine.weights import vacant
from mullama.errors import EngineDead, LoadCancelled, MemoryTooSmall, ModelLoadError, MullamaError, ShuttingDown
from mullama.models.files.estimate import Estimate
from mullama.models.files.shape import shape_of
from mullama.types import GapMode, KvMode, Room

if TYPE_CHECKING:
    from mullama.config import ServeConfig
    from mullama.engine.weights.change import Host, Weights

log = logging.getLogger("mullama.engine")

MOST_GAP_S = 300.0  # of loading the new weights; then the old ones come back


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
    path: str | Path, new: Estimate | None, needs: Needs, free: int | None, room: Room | None, gap: GapMode, kv: KvMode
) -> KvMode | None:
    """None: the new weights are loaded beside the old ones. Else the change needs a gap, and what becomes of the KV.

    ``free`` and ``room``: bytes of memory, and of the budget; None: no limit. Raises MemoryTooSmall where it does not
    fit in either way.
    """
    if new is None:
        return None
    beside = [left for left in (free, None if room is None else room.beside) if left is not None]
    wanted = beside_bytes(new)
    if all(wanted <= left for left in beside):
        return None
    told = f"{path} would take {_mib(wanted)}, and {_mib(min(beside))} are free beside what is loaded"
    if gap is GapMode.NEVER:
        raise MemoryTooSmall(f"{told}; with a gap the old weights would be freed first", param="gap")
    most = min(
        left
        for left in (None if free is None else free + needs.own, None if room is None else room.alone)
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


def same_shape(old: str | Path, new: str | Path) -> bool:
    """Whether a context of one file has the sizes of one of the other."""
    a, b = (shape_of(fits.header_of(path), str(path)) for path in (old, new))
    return (a.layers, a.n_vocab) == (b.layers, b.n_vocab)


def stand_in(model: Model, config: ServeConfig) -> Model:
    """What tokenises and renders chats while there are no weights. Raises ModelLoadError."""
    return Model(model.path, vocab_only=True, chat_template=loading.chat_template(config.chat_template))


@dataclass(slots=True, frozen=True)
class GapResult:
    """``moved`` sequences went on on their KV, ``recomputed`` ones are computed again."""

    model: Model
    moved: int
    recomputed: int
    n_bytes: int
    load_ms: float
    gap_ms: float


class Gap:
    """One such change, for the engine thread: ``run``."""

    def __init__(
        self,
        weights: Weights,
        path: str | Path,
        label: str,
        kv: KvMode,
        substitute: Model,
        host: Host,
    ) -> None:
        """``substitute`` speaks for the engine while there are no weights."""
        self._weights = weights
        self._path = path
        self._label = label
        self._kv = kv
        self._substitute = substitute
        self._host = host

    def run(self) -> GapResult:
        """Raises ModelLoadError and the like when the old weights are in charge again, EngineDead when none are."""
        weights, config = self._weights, self._weights.config
        core, old_path = weights.core, weights.core.model.path
        with_kv = self._kv is KvMode.CARRY
        began = time.monotonic_ns()
        recomputed = 0 if with_kv else weights.seqs.vacate_all()
        is_busy = recomputed > 0 or any(weights.seqs.slots)
        old = core.model
        self._host.on_model(self._substitute)
        weights.in_gap = True
        try:
            try:
                vacancy = vacant.leave(core, weights.adapters)
            except BaseException:
                self._host.on_model(old)  # it is still in charge
                raise
            since = vacancy.held_ns if is_busy else 0
            faults.crash_point("swap:in-gap")
            loading_since = time.monotonic_ns()
            try:
                model, moved = vacant.enter(
                    vacancy,
                    self._path,
                    config,
                    self._limited(loading_since),
                    weights.adapters,
                    since_ns=since,
                    is_swap=True,
                )
            except BaseException as error:
                self._go_back(vacancy, old_path, error, began, since)
        finally:
            weights.in_gap = False
        now = time.monotonic_ns()
        self._host.on_model(model)
        weights.took_over(with_kv, lambda with_kv: self._host.on_commit(model, self._label, with_kv))
        return GapResult(
            model, moved, recomputed, vacancy.n_bytes, (now - loading_since) / 1e6, (now - began) / 1e6
        )  # fmt: skip

    def _limited(self, since_ns: int) -> Callable[[float], bool]:
        def on_progress(fraction: float) -> bool:
            if self._host.is_stopping() or time.monotonic_ns() - since_ns > MOST_GAP_S * 1e9:
                return False
            return self._host.progress is None or self._host.progress(fraction) is not False

        return on_progress

    def _go_back(self, vacancy: Vacancy, path: str, error: BaseException, began: int, since: int) -> NoReturn:
        """The new weights do not come: load the old ones again, and raise why."""
        reason = error.message if isinstance(error, MullamaError) else f"{type(error).__name__}: {error}"
        weights = self._weights
        if self._host.is_stopping():
            weights.broken = ShuttingDown("the engine was closed during a change of weights")
            raise weights.broken from error
        log.warning("the new weights could not be loaded (%s): the old ones are loaded again", reason)
        try:
            model, _ = vacant.enter(
                vacancy,
                path,
                weights.config,
                lambda fraction: not self._host.is_stopping(),
                weights.adapters,
                since_ns=since,
            )
        except BaseException as worse:
            weights.broken = EngineDead(
                f"the new weights could not be loaded ({reason}), and the old ones not again ({worse})"
            )
            raise weights.broken from worse
        self._host.on_model(model)
        gap_ms = (time.monotonic_ns() - began) / 1e6
        kind = LoadCancelled if isinstance(error, LoadCancelled) else ModelLoadError
        raise kind(f"{reason}; the old weights are in charge again, after a gap of {gap_ms:.0f} ms") from error
