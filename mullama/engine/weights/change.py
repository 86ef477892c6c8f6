"""Other weights for a running engine: how they come, and what becomes of the sequences. Nothing is dropped.

``Weights`` is the engine's side. A thread of its own loads the model and makes a context, with the priority of work
that can wait; then the engine thread runs its first decodes between the sequences' steps (``Swap.advance``) and changes
over at a step boundary (_core/weights/carrier.pyx). With ``carry`` the new context takes the KV over where it lies;
with ``recompute`` every sequence is computed again by the new weights.

Carrying is sound between two quantisations (or fine-tunes) of one model: what the tokens mean, how positions are
turned and the shape of KV must be equal, and ``why_unsound`` says what is not. Whatever fails before the commit leaves
the old weights in charge.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mullama import abi, faults
from mullama._core import Carrier, Context, Core, Model
from mullama.engine.background import in_background
from mullama.engine.memory import fits
from mullama.engine.weights import load as loading
from mullama.engine.weights.change_with_gap import Gap, decide, needs_of, same_shape, stand_in
from mullama.engine.weights.comparing import Compared, in_report, not_comparable, texts_of, try_to_compare
from mullama.engine.weights.loras import Twins, close_twins
from mullama.errors import InvalidRequest, ModelBusy, ModelLoadError, MullamaError, NeedsAnotherEngine, StoreError
from mullama.observe.process_memory import give_back_heap
from mullama.types import GapMode, KvMode, Room

if TYPE_CHECKING:
    from mullama.config import ServeConfig
    from mullama.engine.requests.sequences import Sequences
    from mullama.engine.weights.loras import Adapters
    from mullama.kv.cache import KvCache
    from mullama.kv.tiers.disk_tier import DiskTier

log = logging.getLogger("mullama.engine")

T = TypeVar("T")

SHARE = 0.6  # of the engine's time, for the first decodes of the new weights
LEAST_SLICE_NS = 2_000_000
MOST_SLICE_NS = 90_000_000
MOST_POSTPONED_S = 0.1


class Call(Protocol):
    """Engine.call: run a function on the engine thread."""

    def __call__(self, function: Callable[[], T], /) -> Future[T]: ...


@dataclass(slots=True, frozen=True)
class Host:
    """What a change of weights needs of the engine, for as long as it takes: kept, it would be a cycle."""

    call: Call
    on_commit: Callable[[Model, str, bool], None]  # (model, label, with its KV): in charge now; on the engine thread
    on_model: Callable[[Model], None]  # tokenises and renders chats from now on
    is_stopping: Callable[[], bool]
    progress: Callable[[float], bool | None] | None = None  # of loading; False cancels it
    on_phase: Callable[[str], None] = lambda phase: None


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


def why_unsound(old: Model, new: Model) -> str | None:
    """Why KV computed by ``old`` means something else to ``new``; None: it does not."""
    before, after = old.metadata(), new.metadata()
    arch = before.get("general.architecture", "")
    if after.get("general.architecture", "") != arch:
        return f"its architecture is {after.get('general.architecture')}, not {arch}"
    # Shape, heads, windows, RoPE: all that llama.cpp computes KV by lies under the architecture's name.
    ignored = {f"{arch}.context_length", f"{arch}.vocab_size"}
    for key in sorted((before.keys() | after.keys()) - ignored):
        if key.startswith(f"{arch}.") and before.get(key) != after.get(key):
            return f"{key} is {after.get(key, 'missing')}, not {before.get(key, 'there')}"
    if old.vocab_digest() != new.vocab_digest():
        return "its vocabulary is another one"
    return None


class Swap:
    """One change of weights on the engine thread. ``done`` gets (sequences moved, recomputed, bytes, old context)."""

    def __init__(
        self, weights: Weights, carrier: Carrier, kv: KvMode, on_commit: Callable[[bool], None],
        done: Future[tuple[int, int, int, Context]],
    ) -> None:  # fmt: skip
        self.done = done
        self._weights = weights
        self._carrier = carrier
        self._kv = kv
        self._on_commit = on_commit
        self._last_ns = time.monotonic_ns() - MOST_SLICE_NS  # the first slice may be a whole one
        self._is_warm = self._is_ready = False
        self._ready_since = 0.0

    def advance(self, *, busy: bool) -> None:
        """A slice of the work. ``busy``: sequences are running, so that it must be short."""
        now = time.monotonic_ns()
        budget = min(max(int(SHARE * (now - self._last_ns)), LEAST_SLICE_NS), MOST_SLICE_NS) if busy else 1_000_000_000
        try:
            if not self._is_warm:
                while not self._is_warm and time.monotonic_ns() < now + budget:
                    self._is_warm = not self._carrier.warm()
                # Not at this boundary: the decodes just done would be part of the pause.
                self._is_ready = not busy and self._is_warm
            else:
                self._is_ready = True
            if self._is_ready and self._kv is not KvMode.CARRY:
                self._recompute()
        except BaseException as error:
            self._fail(error)
        if not busy:
            self.commit(quiet=True)
        self._last_ns = time.monotonic_ns()

    def commit(self, *, quiet: bool) -> None:
        """Let the new weights take the next step, when they are ready. Right before that step, on its own sequences.

        ``quiet``: nothing was admitted or preempted since the last step. That takes time of its own, which the pause
        does not need to have; so the commit waits for a step boundary without, though not for long.
        """
        if not self._is_ready or self._weights.active is not self or self._kv is not KvMode.CARRY:
            return
        self._ready_since = self._ready_since or time.monotonic()
        if not quiet and time.monotonic() - self._ready_since < MOST_POSTPONED_S:
            return
        try:
            faults.crash_point("swap:before-commit")
            n_running, n_bytes = self._carrier.commit()
            self._committed(with_kv=True)
            self._finish(n_running, 0, n_bytes)
        except BaseException as error:
            self._fail(error)

    def _recompute(self) -> None:
        faults.crash_point("swap:before-commit")
        n_recomputed = self._weights.seqs.vacate_all()
        self._carrier.commit(with_kv=False)
        self._committed(with_kv=False)
        self._finish(0, n_recomputed, 0)

    def _committed(self, *, with_kv: bool) -> None:
        self._weights.took_over(with_kv, self._on_commit)
        faults.crash_point("swap:after-commit")

    def _finish(self, n_moved: int, n_recomputed: int, n_bytes: int) -> None:
        self._weights.active = None
        self.done.set_result((n_moved, n_recomputed, n_bytes, self._carrier.finish()))

    def abort(self, error: BaseException) -> None:
        """The engine has ended, before the commit. Engine thread: afterwards only who made the new context frees it."""
        self._weights.active = None
        self._carrier.abandon()
        if not self.done.done():
            self.done.set_exception(error)

    def _fail(self, error: BaseException) -> None:
        """Before the commit the old weights simply stay; after it the new ones do."""
        self._weights.active = None
        if self._weights.in_charge(self._carrier):
            log.error("a change of weights broke off after they had taken over", exc_info=error)
            self._carrier.finish()
        else:
            log.warning("the weights were not changed: %s", error)
            self._carrier.abandon()
        self.done.set_exception(error)


class Weights:
    """The weights of an engine. ``active`` belongs to the engine thread."""

    def __init__(
        self, core: Core, kv: KvCache, seqs: Sequences, config: ServeConfig,
        post: Callable[[Callable[[], None]], None],
    ) -> None:  # fmt: skip
        self.active: Swap | None = None
        self.left_disk: DiskTier | None = None  # of the weights before
        self.in_gap = False  # there are none: the old ones were freed before the new ones are loaded
        self.broken: MullamaError | None = None  # why there are none for good
        self._post = post
        self.kv = kv
        self.seqs = seqs
        self.core = core
        self.config = config
        self._one = threading.Lock()  # a swap at a time
        self.comparing = threading.Lock()  # held while the model is read beside the engine
        self.adapters: Adapters | None = None  # that lie on the weights; set once, before there are any

    def close(self) -> None:
        """Let go of the engine, so that nothing waits for the garbage collector."""
        self._post, self.adapters = _ignore, None
        with self.comparing:
            pass  # whoever compares has seen that the engine stops

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See that the weights stay those that they are. Raises ModelBusy while they are being changed."""
        if not self._one.acquire(blocking=False):
            raise ModelBusy("the weights of this model are being changed now", retry_after=1)
        try:
            yield
        finally:
            self._one.release()

    @property
    def is_changing(self) -> bool:
        """Whether a change goes on, during which the disk tier leaves for a moment. Any thread."""
        return self._one.locked()

    def in_charge(self, carrier: Carrier) -> bool:
        """Whether a change has got so far that its weights take the steps."""
        return self.core.context is carrier.target

    def took_over(self, with_kv: bool, on_commit: Callable[[bool], None]) -> None:
        """Other weights take the steps from now on, on KV of those before or on none. Engine thread."""
        if with_kv:
            self.kv.note_mixed()
        self.left_disk = self.kv.detach_disk() or self.left_disk
        on_commit(with_kv)

    def swap(
        self,
        path: str | Path,
        label: str,
        kv: KvMode,
        host: Host,
        *,
        gap: GapMode = GapMode.AUTO,
        room: Room | None = None,
        kl: bool = False,
    ) -> SwapReport:
        """Change the weights to those of a file. Blocks; not on the engine thread.

        Where memory, or the budget's ``room``, does not hold both weights, ``gap`` says what may be done. ``kl``: say
        how far the new ones are from the old (comparing.py), which keeps the old ones for some seconds more.

        Raises ModelBusy (another swap is going on, an adapter does not fit the new weights), InvalidRequest (``carry``
        is not sound, or the two cannot be compared), NeedsAnotherEngine, ModelLoadError (MemoryTooSmall): then the old
        weights stay. EngineDead: they went for a gap and did not come back.
        """
        with self.held():
            began = time.monotonic_ns()
            self._check_shape(path, kv, kl)
            way = self._needs_gap(path, kv, host.call, gap, room)
            if way is not None:
                if kl:
                    raise InvalidRequest(
                        "kl: memory does not hold both weights, so they cannot be compared", param="kl"
                    )
                return self._swap_with_gap(path, label, way, host, began)
            try:
                return in_background(lambda: self._swap(path, label, kv, host, kl))
            finally:
                give_back_heap()  # of the weights that went: a vocabulary alone is tens of megabytes of small blocks

    def _swap(self, path: str | Path, label: str, kv: KvMode, host: Host, kl: bool) -> SwapReport:
        began = time.monotonic_ns()
        old, before = self.core.model, self.seqs.weights
        adapters = self.adapters
        if adapters is not None:
            adapters.check_on(path)
        host.on_phase("loading")
        model = loading.load_model(path, self.config, host.progress)
        twins: Twins = []
        try:
            if adapters is not None:
                twins = adapters.twins(model)
            faults.crash_point("swap:after-load")
            mode = self._mode(old, model, kv, kl)
            texts = host.call(lambda: texts_of(self.core)).result() if kl else []
            context = self.core.context.like(model)
        except BaseException:
            close_twins(twins)
            model.close()
            raise
        load_ms = (time.monotonic_ns() - began) / 1e6
        done: Future[tuple[int, int, int, Context]] = Future()

        def on_commit(with_kv: bool) -> None:
            if adapters is not None:
                adapters.take_over(twins)
            host.on_commit(model, label, with_kv)

        def begin() -> None:
            self.active = Swap(self, Carrier(self.core, context), mode, on_commit, done)

        host.on_phase("switching")
        try:
            host.call(begin).result()
            moved, recomputed, n_bytes, left = done.result()
        except BaseException as error:
            if self.core.context is not context:  # else it is in charge, and goes with the core
                context.close()
                close_twins(twins)
                model.close()
            if isinstance(error, InvalidRequest):
                raise NeedsAnotherEngine(error.message, param="to") from None
            raise
        total_ms = (time.monotonic_ns() - began) / 1e6
        pause_ns, first_ns = self._first_step(moved + recomputed, began)
        left.close()
        close_twins(twins)
        compared = None
        try:
            if kl:
                host.on_phase("comparing")
                compared = try_to_compare(
                    old,
                    model,
                    texts,
                    self.config,
                    carry=mode is KvMode.CARRY,
                    goes_on=lambda: not host.is_stopping(),
                    locks=[self.comparing],
                )
        finally:
            old.close()
            self._reopen_disk(host.call)
        return SwapReport(
            kv=str(mode),
            weights_from=before,
            weights_to=label,
            load_ms=load_ms,
            pause_ms=None if pause_ns is None else pause_ns / 1e6,
            first_token_ms=None if first_ns is None else (first_ns - began) / 1e6,
            total_ms=total_ms,
            sequences_moved=moved,
            sequences_recomputed=recomputed,
            bytes_moved=n_bytes,
            compared=compared,
        )

    def _check_shape(self, path: str | Path, kv: KvMode, kl: bool) -> None:
        """Raise NeedsAnotherEngine for a model of another shape. The header tells, so it is loaded once only, there."""
        if not Path(path).is_file():
            raise ModelLoadError(f"{path}: no such file")
        if same_shape(self.core.model.path, path):
            return
        if kv is KvMode.CARRY or kl:
            newcomer = Model(path, vocab_only=True)
            try:
                self._mode(self.core.model, newcomer, kv, kl)  # says what is in the way
            finally:
                newcomer.close()
        raise NeedsAnotherEngine(f"{path} has another shape", param="to")

    def _needs_gap(self, path: str | Path, kv: KvMode, call: Call, gap: GapMode, room: Room | None) -> KvMode | None:
        """What becomes of the KV where the change needs a gap; None: there is room for both."""
        core = self.core
        new = fits.expected(path, self.config, n_ctx=core.n_ctx, n_parallel=core.n_slots)
        free = fits.free_memory(self.config)
        way = decide(path, new, call(lambda: needs_of(core)).result(), free, room, gap, kv)
        if way is None:
            return None
        adapters = self.adapters
        if adapters is not None:
            adapters.check_on(path)
        newcomer = Model(path, vocab_only=True)
        try:
            mode = self._mode(core.model, newcomer, kv, False)
        finally:
            newcomer.close()
        return KvMode.RECOMPUTE if way is KvMode.RECOMPUTE else mode

    def _swap_with_gap(self, path: str | Path, label: str, kv: KvMode, host: Host, began: int) -> SwapReport:
        before = self.seqs.weights
        substitute = stand_in(self.core.model, self.config)
        try:
            gap = Gap(self, path, label, kv, substitute, host)
            host.on_phase("gap")
            found = host.call(gap.run).result()
        finally:
            substitute.close()
            give_back_heap()
        total_ms = (time.monotonic_ns() - began) / 1e6
        pause_ns, first_ns = self._first_step(found.moved + found.recomputed, began)
        self._reopen_disk(host.call)
        return SwapReport(
            kv=str(kv),
            weights_from=before,
            weights_to=label,
            load_ms=found.load_ms,
            pause_ms=None if pause_ns is None else pause_ns / 1e6,
            first_token_ms=None if first_ns is None else (first_ns - began) / 1e6,
            total_ms=total_ms,
            sequences_moved=found.moved,
            sequences_recomputed=found.recomputed,
            bytes_moved=found.n_bytes,
            mode="gap",
            gap_ms=found.gap_ms,
        )

    def _mode(self, old: Model, new: Model, kv: KvMode, kl: bool) -> KvMode:
        reason = why_unsound(old, new)
        if reason is None:
            return KvMode.CARRY if kv is KvMode.AUTO else kv
        if kv is KvMode.CARRY:
            raise InvalidRequest(f"the KV cache cannot be carried over to {new.path}: {reason}", param="kv")
        if old.n_vocab != new.n_vocab or old.vocab_digest() != new.vocab_digest():
            if kl:
                raise not_comparable(new.path)
            raise NeedsAnotherEngine(f"{new.path} is another model: {reason}", param="to")
        return KvMode.RECOMPUTE

    def _first_step(self, n: int, began: int) -> tuple[int, int] | tuple[None, None]:
        """The pause, and the time at which the first step of the new weights ended; None when nothing ran.

        Read from the page, as anybody would: only the engine thread may write it.
        """
        page, deadline = abi.Reader(self.core.page.buffer()), time.monotonic() + 5
        while n and time.monotonic() < deadline:
            seen = page.counters()
            if seen.weight_first_ns > began:
                return int(seen.weight_pause_ns), int(seen.weight_first_ns)
            time.sleep(0.001)
        return None, None

    def _reopen_disk(self, call: Call) -> None:
        """The disk tier goes on with what it has of the new weights."""
        old, self.left_disk = self.left_disk, None
        if old is None:
            return
        old.close()
        try:
            store = loading.open_disk_store(self.core.model, self.core, self.kv, self.config)
        except (ModelLoadError, StoreError) as error:
            log.warning("KV is not kept on disk any more: %s", error.message)
            store = None

        def join() -> None:
            self.kv.attach_disk(None if store is None else loading.join_disk_store(store, self.kv, self._post))

        call(join).result()


def _ignore(command: Callable[[], None]) -> None:
    """What becomes of a command when the engine has ended."""
