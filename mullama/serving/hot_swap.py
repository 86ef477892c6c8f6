"""Hot-swap: other weights, or another model, under a name that is being served. No request is dropped.

Two ways, and the model decides which:

- *in place*: the engine stays and changes its weights (engine/weights/change.py); KV is carried over or computed again;
- *side by side*: a model of another shape or vocabulary gets an engine of its own. New requests go to it at once, and
  what runs either ends where it is (``drain``) or goes on there from its text (``recompute``).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from mullama.engine.client import EngineClient, WeightsClient
from mullama.errors import (
    BadModelFile,
    EngineDead,
    InvalidRequest,
    ModelLoadError,
    ModelNotLoaded,
    MullamaError,
    NeedsAnotherEngine,
    adapters_loaded,
)
from mullama.models.quantizing import MAKING
from mullama.serving.manager import ModelManager
from mullama.serving.states import Lease, Resident, Served
from mullama.serving.targets import Target
from mullama.types import GapMode, KvMode, MemoryLeft

log = logging.getLogger(__name__)

HISTORY = 200  # swaps that are remembered

#: (to, reference, progress, may read files) -> target; blocks
FindTarget = Callable[[str, str, Callable[[str, int, int | None], None], bool], Target]


class SwappableWeights(WeightsClient, Protocol):
    """What a swap asks of an engine's weights."""

    def swap(
        self, path: Any, *, label: str = "", kv: Any = "auto", gap: Any = "auto",
        memory_left: MemoryLeft | None = None, kl: bool = False, on_phase: Callable[[str], None] = ...,
    ) -> Any: ...  # fmt: skip

    def texts_for(self, other: Any) -> Any: ...

    def compare(self, other: Any, texts: Any) -> dict[str, Any]: ...


class SwappableEngine(EngineClient, Protocol):
    """What a swap asks of an engine."""

    @property
    def weights(self) -> SwappableWeights: ...

    def hand_over(self, other: Any) -> int: ...


@dataclass(slots=True)
class SwapRecord:
    """One swap, as GET /internal/swaps shows it."""

    id: str
    model: str
    to: str
    kv: str
    started: float  # Unix time
    gap: str = "auto"
    kl: bool = False  # whether the report is to say how far the new weights are from the old ones
    phase: str = "resolving"
    state: str = "running"  # done, failed
    done: int = 0  # of the phase, in its own unit
    total: int | None = None
    note: str = ""  # what was made for it, and what that loses
    report: dict[str, Any] | None = None
    error: MullamaError | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": self.id,
            "model": self.model,
            "to": self.to,
            "kv": self.kv,
            "gap": self.gap,
            "started": round(self.started, 3),
            "state": self.state,
            "phase": self.phase,
        }
        if self.state == "running":
            found |= {"done": self.done, "total": self.total}
        if self.note:
            found["note"] = self.note
        if self.report is not None:
            found |= self.report
        if self.error is not None:
            found["error"] = self.error.to_openai()["error"]
        return found


class Swaps:
    """The swaps of a server. Event loop only.

    ``find`` says what a ``to`` means, ``load(name, path, label)`` makes an engine for a side-by-side swap; both block.
    """

    def __init__(
        self,
        models: ModelManager,
        find: FindTarget,
        load: Callable[[str, Target], EngineClient],
        *,
        drain_s: float = 600.0,
    ) -> None:
        self.history: deque[SwapRecord] = deque(maxlen=HISTORY)
        self._models = models
        self._find = find
        self._load = load
        self._drain_s = drain_s
        self._ids = itertools.count(1)
        self._busy: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def find_record(self, swap_id: str) -> SwapRecord | None:
        return next((one for one in self.history if one.id == swap_id), None)

    def begin(
        self,
        name: str,
        to: str,
        kv: str = "auto",
        *,
        gap: str = "auto",
        kl: bool = False,
        may_read_files: bool = False,
    ) -> SwapRecord:
        """Start a swap; it goes on whoever waits for it. ``kv`` and ``gap`` are names of KvMode and GapMode; ``kl``
        measures how far the new weights are from the old ones.

        Raises InvalidRequest, ModelNotFound, ModelNotLoaded.
        """
        served = self._models.get(name)
        if kv not in set(KvMode):
            raise InvalidRequest(f"kv: it must be one of {', '.join(KvMode)}", param="kv")
        if gap not in set(GapMode):
            raise InvalidRequest(f"gap: it must be one of {', '.join(GapMode)}", param="gap")
        if not to:
            raise InvalidRequest("to: a reference, a path or a quantisation is missing", param="to")
        if served.resident is None:
            raise ModelNotLoaded(f"'{served.name}' is not loaded: there is nothing to swap", param="model")
        if served.name in self._busy:
            raise InvalidRequest(f"the weights of '{served.name}' are being changed already", param="to")
        record = SwapRecord(f"swap-{next(self._ids)}", served.name, to, kv, time.time(), gap, kl)
        self.history.append(record)
        self._busy.add(served.name)
        task = asyncio.get_running_loop().create_task(self._run(served, record, may_read_files))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return record

    async def _run(self, served: Served, record: SwapRecord, may_read_files: bool) -> None:
        loop = asyncio.get_running_loop()

        def note(phase: str, done: int = 0, total: int | None = None) -> None:
            record.phase, record.done, record.total = phase, done, total
            if phase.startswith(MAKING):
                record.note = phase
            record.changed.set()

        def progress(phase: str, done: int = 0, total: int | None = None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(note, phase, done, total)

        began = time.monotonic()
        lease = self._models.hold(served.name)  # the engine is not unloaded meanwhile
        try:
            if lease is None:
                raise ModelNotLoaded(f"'{served.name}' is not loaded any more", param="model")
            target = await asyncio.to_thread(self._find_target, record.to, served.reference, progress, may_read_files)
            resolve_ms = (time.monotonic() - began) * 1e3
            engine = cast(SwappableEngine, lease.engine)
            record.report = await self._swap(served, engine, target, record, progress)
            record.report |= {
                "resolve_ms": round(resolve_ms, 3),
                "total_ms": round((time.monotonic() - began) * 1e3, 3),
            }
            record.state, record.phase = "done", "done"
            log.info("%s: %s", served.name, record.report)
        except Exception as error:
            if isinstance(error, EngineDead):
                self._models.served.give_up(served, error)
            told = error if isinstance(error, MullamaError) else MullamaError(f"{type(error).__name__}: {error}")
            record.error = told.with_traceback(None)  # the record stays, and what its frames hold shall not
            record.state = "failed"
            log.warning("%s goes on with its weights: %s", served.name, error)
        finally:
            if lease is not None:
                lease.release()
            self._busy.discard(served.name)
            record.ended.set()
            record.changed.set()

    def _find_target(self, to: str, reference: str, progress: Any, may_read_files: bool) -> Target:
        """Raises BadModelFile for a file that cannot be loaded: the client's fault, not the server's."""
        try:
            return self._find(to, reference, progress, may_read_files)
        except ModelLoadError as error:
            raise (BadModelFile(error.message, param="to") if type(error) is ModelLoadError else error) from None

    async def _swap(
        self, served: Served, engine: SwappableEngine, target: Target, record: SwapRecord,
        progress: Callable[[str], None],
    ) -> dict[str, Any]:  # fmt: skip
        began = time.monotonic()
        size_before = engine.info.size_bytes
        if record.kv != "drain":
            try:
                report = await asyncio.to_thread(
                    engine.weights.swap,
                    target.path,
                    label=target.label,
                    kv=record.kv,
                    gap=record.gap,
                    memory_left=self._models.memory_left(served.name),
                    kl=record.kl,
                    on_phase=progress,
                )
            except NeedsAnotherEngine as error:
                log.info("%s: an engine of its own is made: %s", served.name, error.message)
            else:
                beside = max(served.n_bytes - size_before, 0)  # KV and compute buffers, which stay
                served.reference, served.n_bytes = target.reference, beside + engine.info.size_bytes
                found: dict[str, Any] = report.to_dict()
                return {**found, "way": "in_place"}
        if names := [one["id"] for one in engine.weights.loras()]:
            raise adapters_loaded(names, param="to")
        return await self._side_by_side(served, engine, target, record, progress, began)

    async def _side_by_side(
        self, served: Served, old: SwappableEngine, target: Target, record: SwapRecord,
        progress: Callable[[str], None], began: float,
    ) -> dict[str, Any]:  # fmt: skip
        weights_before = old.info.weights
        progress("loading")
        loading = time.monotonic()
        new = await asyncio.to_thread(self._load, served.name, target)
        load_ms = (time.monotonic() - loading) * 1e3
        try:
            if new.info.kind is not old.info.kind:
                raise InvalidRequest(
                    f"to: '{served.name}' is for {old.info.kind} requests and the other model for {new.info.kind}: "
                    "serve it by a name of its own",
                    param="to",
                )
            texts = await asyncio.to_thread(old.weights.texts_for, new.weights) if record.kl else None
            resident = self._models.served.replace(served, new, target.reference)
        except BaseException:
            await asyncio.to_thread(new.close)
            raise
        moved, first_ms = 0, None
        if record.kv != "drain":
            progress("handing over")
            try:
                moved = await asyncio.to_thread(old.hand_over, new)
                first_ms = await self._first_token(new, began) if moved else None
            except MullamaError:
                log.exception("%s: what runs ends with the old weights", served.name)
        # Leases on the old engine also stand for requests that go on in the new one.
        guard = self._models.hold(served.name)
        compared = {"kl": None, "kl_detail": None}
        try:
            if record.kl:
                progress("comparing")
                compared = await asyncio.to_thread(old.weights.compare, new.weights, texts)
        finally:
            retiring = asyncio.get_running_loop().create_task(self._retire(resident, guard))
            self._tasks.add(retiring)
            retiring.add_done_callback(self._tasks.discard)
        return {
            "kv": "drain" if record.kv == "drain" else "recompute",
            "weights_from": weights_before,
            "weights_to": new.info.weights,
            "load_ms": round(load_ms, 3),
            "pause_ms": None,
            "first_token_ms": None if first_ms is None else round(first_ms, 3),
            "sequences_moved": 0,
            "sequences_recomputed": moved,
            "bytes_moved": 0,
            "way": "side_by_side",
            "mode": "beside",
            "gap_ms": None,
            **compared,
        }

    async def _first_token(self, engine: EngineClient, began: float) -> float | None:
        """Ms from ``began`` until the engine has generated a token; None when that takes too long."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if engine.counters().get("sampled_tokens", 1):
                return (time.monotonic() - began) * 1e3
            await asyncio.sleep(0.002)
        return None

    async def _retire(self, resident: Resident, guard: Lease | None) -> None:
        """The old engine ends when nobody uses it, or after a long while."""
        try:
            await asyncio.wait_for(resident.idle(), self._drain_s)
        except TimeoutError:
            log.warning("an engine that was replaced is still used after %g s: it is cut", self._drain_s)
            await resident.engine.drain(0)
        await self._models.served.retire(resident)
        if guard is not None:
            guard.release()
