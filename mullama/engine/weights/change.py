"""A change of weights under a running engine, as a machine with states. Nothing is dropped.

    LOADING -> WARMING -> READY -> IN_CHARGE            the new weights come beside the old ones (change_beside.py)
    LOADING -> READY -> UNLOADED -> IN_CHARGE           memory does not hold both (change_with_gap.py)
    and before IN_CHARGE -> KEPT, from UNLOADED also -> LOST

``run`` blocks in a thread of its own; what the engine thread does of it is one hook, ``at_boundary``, right before each
step. With ``carry`` the running sequences go on, on their KV, in the state they were in; with ``recompute`` they are
preempted and computed again by the new weights. Whatever fails before IN_CHARGE leaves the old weights in charge.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from mullama import faults
from mullama._core import Model
from mullama.engine.parts import EngineParts
from mullama.engine.weights import load
from mullama.engine.weights.comparing import Compared, in_report
from mullama.errors import ModelLoadError, StoreError
from mullama.kv.tiers.disk_tier import DiskTier
from mullama.machine.ways import words_of
from mullama.observe.process_memory import give_back_heap
from mullama.types import KvMode

log = logging.getLogger("mullama.engine")

SHARE = 0.6  # of the engine's time, for the first decodes of the new weights
MIN_SLICE_NS = 2_000_000
MAX_SLICE_NS = 90_000_000
IDLE_SLICE_NS = 1_000_000_000
MAX_POSTPONED_S = 0.1


class ChangeState(enum.StrEnum):
    """Where a change of weights is."""

    LOADING = "loading"  # steps go on as ever
    WARMING = "warming"  # the first decodes of the new weights, between steps
    READY = "ready"  # the next quiet step boundary is the one
    UNLOADED = "unloaded"  # a gap: the old ones are gone, the new ones are being loaded, and nothing runs
    IN_CHARGE = "in_charge"  # the new weights take the steps
    KEPT = "kept"  # the old ones do, still or again
    LOST = "lost"  # neither could be loaded: the engine ends


S = ChangeState

TRANSITIONS: dict[ChangeState, frozenset[ChangeState]] = {
    S.LOADING: frozenset({S.WARMING, S.READY, S.KEPT}),
    S.WARMING: frozenset({S.READY, S.KEPT}),
    S.READY: frozenset({S.UNLOADED, S.IN_CHARGE, S.KEPT}),
    S.UNLOADED: frozenset({S.IN_CHARGE, S.KEPT, S.LOST}),
    S.IN_CHARGE: frozenset(),
    S.KEPT: frozenset(),
    S.LOST: frozenset(),
}


class IllegalChange(RuntimeError):
    """A bug in the engine: a change of weights went along an edge that does not exist."""


@dataclass(slots=True, frozen=True)
class SwapReport:
    """One change of weights. Times in ms; ``pause_ms`` is from the end of the last old step to the start of the first
    new one, ``first_token_ms`` from the request to the end of that one; None when nothing ran."""

    kv: str
    weights_from: str
    weights_to: str
    load_ms: float
    pause_ms: float | None
    first_token_ms: float | None
    total_ms: float
    sequences_moved: int  # that went on on their KV
    sequences_recomputed: int
    bytes_moved: int
    mode: str = "beside"  # the old ones, until the new ones were in charge; or "gap": they were freed first
    gap_ms: float | None = None  # without any weights
    compared: Compared | None = None  # with the old ones, where that was asked for

    def to_dict(self) -> dict[str, Any]:
        found = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items() if k != "compared"}
        return found | in_report(self.compared)


@dataclass(slots=True, frozen=True)
class Moved:
    """Sequences that go on: ``moved`` ones on their KV, which is ``n_bytes``, ``recomputed`` ones from their tokens."""

    moved: int
    recomputed: int
    n_bytes: int


class WeightChange(ABC):
    """One change; ``parts.weights.held`` is the caller's."""

    mode: ClassVar[str]

    def __init__(
        self,
        parts: EngineParts,
        path: str | Path,
        label: str,
        kv: KvMode,
        progress: Callable[[float], bool | None] | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """``label`` names the new weights. ``progress`` is of loading; False cancels it."""
        self.state = ChangeState.LOADING
        self.kv = kv
        self.load_ms = 0.0
        self.gap_ms: float | None = None
        self._parts = parts
        self._path = path
        self._label = label
        self._progress = progress
        self._on_phase = on_phase
        self._left_disk: DiskTier | None = None  # of the weights before
        self._moved: Future[Moved] = Future()
        self._last_ns = 0
        self._ready_since = 0.0

    def move(self, state: ChangeState) -> None:
        """Change the state. Raises IllegalChange."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalChange(f"{self.state} -> {state}")
        self.state = state

    # -- the thread that asked ------------------------------------------------------------------------------------

    def run(self) -> SwapReport:
        """Blocks until the old weights are freed. Raises what a part of it raises: then the old ones are in charge,
        or, with EngineDead, none."""
        began, parts, before = time.monotonic_ns(), self._parts, self._parts.seqs.weights
        compared = None
        try:
            self._prepare()
            parts.commands.call(self._begin).result()
            found = self._moved.result()
            total_ms = (time.monotonic_ns() - began) / 1e6
            pause_ns, first_ns = self._first_step(found.moved + found.recomputed, began)
            compared = self._compare()
        finally:
            self._clean_up()
            give_back_heap()  # of the weights that went: a vocabulary alone is tens of megabytes of small blocks
            self._reopen_disk()
        return SwapReport(
            kv=str(self.kv),
            weights_from=before,
            weights_to=self._label,
            load_ms=self.load_ms,
            pause_ms=None if pause_ns is None else pause_ns / 1e6,
            first_token_ms=None if first_ns is None else (first_ns - began) / 1e6,
            total_ms=total_ms,
            sequences_moved=found.moved,
            sequences_recomputed=found.recomputed,
            bytes_moved=found.n_bytes,
            mode=self.mode,
            gap_ms=self.gap_ms,
            compared=compared,
        )

    def _begin(self) -> None:
        """From the next step boundary on it is the engine thread's. Engine thread."""
        self._enter()
        self._last_ns = time.monotonic_ns() - MAX_SLICE_NS  # the first slice may be a whole one
        self._parts.weights.change = self

    def _first_step(self, n: int, began: int) -> tuple[int, int] | tuple[None, None]:
        """The pause, and the time at which the first step of the new weights ended; None when nothing ran.

        Read from the page, as anybody would: only the engine thread may write it.
        """
        deadline = time.monotonic() + 5
        while n and time.monotonic() < deadline:
            seen = self._parts.page.counters()
            if seen.weight_first_ns > began:
                return int(seen.weight_pause_ns), int(seen.weight_first_ns)
            time.sleep(0.001)
        return None, None

    def _reopen_disk(self) -> None:
        """The disk tier goes on with what it has of the new weights."""
        parts, old = self._parts, self._left_disk
        if old is None:
            return
        old.close()
        try:
            store = load.open_disk_store(parts.core.model, parts.core, parts.kv, parts.config)
        except (ModelLoadError, StoreError) as error:
            log.warning("KV is not kept on disk any more: %s", error.message)
            store = None

        def join() -> None:
            post = parts.commands.post_quietly
            parts.kv.attach_disk(None if store is None else load.join_disk_store(store, parts.kv, post))

        parts.commands.call(join).result()

    # -- the engine thread ----------------------------------------------------------------------------------------

    def at_boundary(self, *, busy: bool, quiet: bool) -> bool:
        """What is to be done right before a step. Returns whether the plan for it still holds.

        ``busy``: sequences are running, so that it must be short. ``quiet``: nothing was admitted or preempted since
        the last step. That takes time of its own, which the pause does not need to have; so the change waits for a
        boundary without, though not for long. Raises EngineDead or ShuttingDown when there are no weights for good.
        """
        holds = True
        try:
            if self.state is ChangeState.WARMING:
                now = time.monotonic_ns()
                share = min(max(int(SHARE * (now - self._last_ns)), MIN_SLICE_NS), MAX_SLICE_NS)
                if self._warm(now + (share if busy else IDLE_SLICE_NS)):
                    self.move(ChangeState.READY)
                self._last_ns = time.monotonic_ns()
                if busy:
                    return True  # not at this boundary: the decodes just done would be part of the pause
            if self.state is ChangeState.READY and self._is_now(quiet):
                faults.crash_point("swap:before-commit")
                holds = self.kv is KvMode.CARRY
                recomputed = 0 if holds else self._parts.seqs.vacate_all()
                moved, n_bytes = self._exchange(recomputed)
                faults.crash_point("swap:after-commit")
                self._parts.weights.change = None
                self._moved.set_result(Moved(moved, recomputed, n_bytes))
        except BaseException as error:
            self._fail(error)
            if self.state is ChangeState.LOST:
                raise
        return holds

    def _is_now(self, quiet: bool) -> bool:
        self._ready_since = self._ready_since or time.monotonic()
        return quiet or time.monotonic() - self._ready_since >= MAX_POSTPONED_S

    def _adopt(self, model: Model) -> None:
        """The new weights take the steps from now on."""
        parts, with_kv = self._parts, self.kv is KvMode.CARRY
        if with_kv:
            parts.kv.note_mixed()
        self._left_disk = parts.kv.detach_disk()
        parts.model = model
        parts.seqs.set_weights(self._label, with_kv=with_kv)
        new, old = load.info_of(model, parts.core, parts.info.name, self._label), parts.info
        parts.info = dataclasses.replace(new, n_ctx=old.n_ctx, n_parallel=old.n_parallel, can_shift=old.can_shift)
        parts.reader.kernels = words_of(new.kernels)

    def _fail(self, error: BaseException) -> None:
        if self.state is ChangeState.IN_CHARGE:
            log.error("a change of weights broke off after they had taken over", exc_info=error)
        else:
            log.warning("the weights were not changed: %s", error)
        self.abort(error)

    def abort(self, error: BaseException) -> None:
        """It goes no further: the engine has ended, or something failed."""
        self._parts.weights.change = None
        if self.state not in (ChangeState.IN_CHARGE, ChangeState.KEPT, ChangeState.LOST):
            self._abandon()
            self.move(ChangeState.KEPT)
        if not self._moved.done():
            self._moved.set_exception(error)

    # -- what the two ways do differently ---------------------------------------------------------------------------

    @abstractmethod
    def _prepare(self) -> None:
        """What can be done while steps go on. The thread that asked."""

    @abstractmethod
    def _enter(self) -> None:
        """Come to the engine thread: WARMING or READY."""

    def _warm(self, until_ns: int) -> bool:
        """First decodes of the new weights, as many as time allows. Returns whether all are done. Engine thread."""
        return True

    @abstractmethod
    def _exchange(self, recomputed: int) -> tuple[int, int]:
        """Put the new weights in the place of the old ones (IN_CHARGE), and ``_adopt`` them. Engine thread.

        Returns the sequences that go on on their KV, and the bytes of it. Raises where the old ones stay.
        """

    def _abandon(self) -> None:  # noqa: B027
        """The old weights stay, and nothing was taken from them. Engine thread."""

    def _compare(self) -> Compared | None:
        """How far the new weights are from the old ones, where that was asked for. The thread that asked."""
        return None

    @abstractmethod
    def _clean_up(self) -> None:
        """Free what is not in charge, also where ``_prepare`` got half way. The thread that asked."""
