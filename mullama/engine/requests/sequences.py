"""The sequences of an engine and the slots they live in: admit, preempt, resume, move, follow, end.

Everything here runs on the engine thread and touches the core; what to do is decided elsewhere (scheduling, kv).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mullama import abi
from mullama.engine.requests import lifecycle
from mullama.engine.requests.reader import Reader
from mullama.errors import ComputeFailed, InvalidRequest, MullamaError
from mullama.kv.cache import KvCache
from mullama.kv.index.tree import pack
from mullama.kv.placement import holes, n_ranges, neighbours
from mullama.kv.report import Owner
from mullama.scheduling import SeqView
from mullama.types import Finish, FinishReason, Preempt, Profile, Request, SeqState

if TYPE_CHECKING:
    from mullama._core import Core, Parked, Sampling
    from mullama.engine.weights.loras import Chosen

log = logging.getLogger("mullama.engine")

SINKS = 4  # first tokens that a shifted context keeps: what attention rests on (Xiao et al., StreamingLLM, ICLR 2024)


@dataclass(slots=True)
class LiveSequence:
    """A request on its way: what the policy sees, and where it lives."""

    view: SeqView
    request: Request
    slot: int = -1
    parked: Parked | None = None  # while PREEMPTED
    spent_ns: dict[SeqState, int] = field(default_factory=dict)  # in states it has left
    first_token_ns: int = 0  # end of the step that generated it; 0: none yet
    key: bytes = b""  # the prompt as the prefix tree takes it
    namespace: bytes = b""  # prompts of another one share nothing with it
    adapters: Chosen = ()  # LoRA adapters that compute it, with their scales
    prepared: Sampling | None = None  # its sampling parameters, worked out
    borders: list[int] = field(default_factory=list)  # where a prompt chunk has to end, for a checkpoint
    peak: int = 0  # most tokens in the KV cache at the end of a step
    mixed: bool = False  # other weights than those in charge have computed of its KV

    @property
    def reuse_limit(self) -> int:
        """Most tokens of its prompt that may come from the KV cache: one is left, whose logits choose the next token.

        Log-probabilities of a prompt are made of its logits, which nobody keeps.
        """
        return 0 if self.request.sampling.prompt_logprobs is not None else len(self.request.prompt) - 1

    def move(self, state: SeqState) -> None:
        """Change the state. Raises IllegalTransition."""
        now = time.monotonic_ns()
        old = self.view.state
        self.view.state = lifecycle.check(old, state)
        self.spent_ns[old] = self.spent_ns.get(old, 0) + now - self.view.state_ns
        self.view.state_ns = now


class Sequences:
    """By handle, in order of arrival; ``on_end(seq)`` is called for each that ends."""

    def __init__(
        self,
        core: Core,
        reader: Reader,
        model: str,
        weights: str,
        max_parked_bytes: int,
        kv: KvCache,
        on_end: Callable[[LiveSequence], None],
    ) -> None:
        self.live: dict[int, LiveSequence] = {}
        self.views: dict[int, SeqView] = {}
        self.slots: list[int] = [0] * core.n_slots  # handle of the running sequence, 0: none
        self.n_queued = 0  # WAITING; read by other threads
        self.n_added = 0  # ever
        self.move_ns_per_byte = 1.0  # saving and restoring, measured as it happens
        self._core = core
        self._kv = kv
        self._reader = reader
        self.model = model  # its served name
        self.weights = weights  # name of those in charge
        self._max_parked_bytes = max_parked_bytes  # most host memory for the KV of preempted sequences
        self._on_end = on_end

    def close(self) -> None:
        """Let go of the engine and of what is parked, so that nothing waits for the garbage collector.

        The engine thread has ended, and the core was closed.
        """
        self._on_end = _nothing
        for seq in self.live.values():
            seq.parked = None  # it holds on to its adapters

    def __bool__(self) -> bool:
        return bool(self.live)

    def add(self, seq: LiveSequence) -> None:
        self.n_added += 1
        self.live[seq.view.id] = seq
        self.views[seq.view.id] = seq.view
        if seq.view.state is SeqState.WAITING:
            self.n_queued += 1

    def remove(self, handle: int) -> None:
        """Forget a sequence without a slot, which goes on elsewhere."""
        seq = self.live.pop(handle)
        self.views.pop(handle)
        if seq.view.state is SeqState.WAITING:
            self.n_queued -= 1
        self._on_end(seq)

    # -- into a slot and out of it -------------------------------------------------------------------------

    def start(self, handle: int) -> bool:
        """Give a queued sequence a slot. False: that failed, and the request has ended with an error."""
        seq = self.live[handle]
        try:
            if seq.parked is None:
                self._admit(seq)
            else:
                self._resume(seq, seq.parked)
        except Exception as error:
            # Whatever one request holds, the others go on.
            if not isinstance(error, MullamaError):
                log.exception("a request of '%s' could not be started", self.model)
                error = InvalidRequest(f"the request could not be started: {error}")
            if seq.parked is not None:
                self._core.cancel_parked(seq.parked)
            self._forget(seq)
            self._reader.end_directly(handle, Finish(FinishReason.ERROR, Profile(), error=error))
            return False
        return True

    def _admit(self, seq: LiveSequence) -> None:
        """WAITING -> PREFILL, with as much of the prompt as the KV cache saves."""
        core, kv, request = self._core, self._kv, seq.request
        n = len(request.prompt)
        sampling = request.sampling
        if sampling.max_tokens != seq.view.max_tokens:  # PERF: a replace() takes longer than all the rest of this
            sampling = replace(sampling, max_tokens=seq.view.max_tokens)
        place = kv.allocate(seq.namespace, seq.key, seq.reuse_limit, self.running(), request.id)
        slot = place.slot
        try:
            core.open(
                slot,
                seq.view.id,
                request.prompt,
                sampling,
                reuse=place.reuse,
                source=place.source.number,
                evicted=place.lost,
                arrival_ns=seq.view.arrival_ns,
                priority=request.priority,
                shift_keep=SINKS if request.context_shift else -1,
                adapters=[(one.native, scale) for one, scale in seq.adapters],
                prepared=seq.prepared,
            )
        except Exception:
            kv.closed(slot, seq.namespace, request.id)  # the slot was made ready: it retains the prefix
            raise
        reuse = core.slot_fill(slot)[0]
        kv.opened(slot, seq.namespace, seq.key, reuse, place.source)
        seq.borders = kv.borders(place.match, reuse, n)
        self._reader.note_weights(seq.view.id, self.weights, 0)
        text, is_shared = core.model.detokenize, seq.request.shares_cache
        reason = kv.history.explain(seq.namespace, seq.key, reuse, place.match, text, is_shared=is_shared)
        self._reader.explain(seq.view.id, reason)
        self._occupy(seq, slot, SeqState.PREFILL)

    def _resume(self, seq: LiveSequence, parked: Parked) -> None:
        """PREEMPTED -> where it was, from host memory or by what is left of its prefix."""
        core, kv = self._core, self._kv
        tokens = pack(parked.tokens())
        if parked.saved:
            place = kv.allocate_empty(seq.namespace, self.running(), seq.request.id)
        else:
            limit = parked.reuse_limit()
            place = kv.allocate(seq.namespace, tokens, limit, self.running(), seq.request.id)
        slot = place.slot
        core.resume(slot, parked, reuse=place.reuse, evicted=place.lost)
        seq.parked = None
        if not core.shifted(slot):
            kv.resumed(slot, seq.namespace, tokens, mixed=seq.mixed)
        state = core.states()[slot]
        self._occupy(seq, slot, SeqState.DECODE if state == abi.DECODE else SeqState.PREFILL)

    def running(self) -> list[bool]:
        """Which slots have a request."""
        return [handle != 0 for handle in self.slots]

    def owners(self) -> list[Owner | None]:
        """Whose each slot is."""
        running = (self.live.get(handle) for handle in self.slots)
        return [Owner(seq.view.id, seq.request.id, seq.request.tenant) if seq else None for seq in running]

    def _occupy(self, seq: LiveSequence, slot: int, state: SeqState) -> None:
        n_past, n_tokens = self._core.slot_fill(slot)
        if seq.view.state is SeqState.WAITING:
            self.n_queued -= 1
            seq.view.cached_tokens = n_past
        seq.slot = slot
        self.slots[slot] = seq.view.id
        seq.view.cells = n_past
        seq.view.prefill_left = 0 if state is SeqState.DECODE else n_tokens - n_past
        seq.move(state)

    def preempt(self, handle: int, how: Preempt, *, insist: bool = False) -> None:
        """PREFILL, DECODE -> PREEMPTED. The request's own wish goes before ``how``, unless the engine ``insist``s.

        AUTO takes the cheaper way.
        """
        seq = self.live[handle]
        how = seq.view.preempt if seq.view.preempt is not Preempt.AUTO and not insist else how
        parked = self._core.preempt(seq.slot, save=self._should_save(seq, how))
        self._kv.closed(seq.slot, seq.namespace, seq.request.id)  # what the slot retains, if its KV was not saved
        self.slots[seq.slot] = 0
        seq.parked, seq.slot = parked, -1
        seq.view.preemptions += 1
        seq.view.cells = seq.view.cells if parked.saved else 0
        seq.view.prefill_left = parked.left()
        seq.move(SeqState.PREEMPTED)

    def _should_save(self, seq: LiveSequence, how: Preempt) -> bool:
        if how is Preempt.RECOMPUTE:
            return False
        n_bytes = self._core.state_bytes(seq.slot)
        if self._core.parked_bytes() + n_bytes > self._max_parked_bytes:
            return False
        if how is Preempt.SWAP:
            return True
        recompute_ns = self._core.governor.cost(max(seq.view.cells, 1))
        return n_bytes * self.move_ns_per_byte < recompute_ns or recompute_ns == 0

    def evict_retained(self, n_tokens: int) -> int:
        """Free slots that retain a prefix until ``n_tokens`` cells are free. Returns those freed."""
        return self._kv.evict_retained(n_tokens, self.running())

    # -- keep the running slots together ---------------------------------------------------------------------

    def close_holes(self) -> None:
        """Keep running sequences on a gap-free range of the lowest slots, where the move costs less than the gap."""
        if self._core.unified:
            return  # there are no gaps
        for low, high in holes(self.running()):
            cost = self._core.state_bytes(high) * self.move_ns_per_byte
            if cost < self._core.gap_cost_ns(high):
                self.exchange(low, high)
        self._join_adapters()

    def _join_adapters(self) -> None:
        """Bring running sequences with the same adapters together, where the moves cost less than the passes saved.

        One decode has one set of adapters, and in it one gap-free range of slots.
        """
        running = [self.live[handle] for handle in self.slots if handle]
        if not any(seq.adapters for seq in running) or not all(self.slots[: len(running)]):
            return
        sets = [frozenset((one.id, scale) for one, scale in seq.adapters if scale) for seq in running]
        moves = neighbours(sets)
        if not moves:
            return
        n_bytes = sum(self._core.state_bytes(slot) for move in moves for slot in move)
        saved = n_ranges(sets) - len(set(sets))
        # Whoever ends first may end what the moves are for.
        if n_bytes * self.move_ns_per_byte < saved * min(map(self._core.gap_cost_ns, range(len(running)))):
            for low, high in moves:
                self.exchange(low, high)

    def exchange(self, a: int, b: int) -> None:
        """Swap two slots, KV and all. Sequences whose KV is lost on the way fail; nobody else notices."""
        start = time.monotonic_ns()
        try:
            n_bytes = self._core.exchange(a, b)
            self._kv.exchanged(a, b)
        except ComputeFailed:
            log.exception("slots %d and %d of '%s' could not change places", a, b, self.model)
            n_bytes = 0
            for slot in (a, b):
                self._kv.released(slot)
        if n_bytes:
            self.move_ns_per_byte += 0.3 * ((time.monotonic_ns() - start) / n_bytes - self.move_ns_per_byte)
        self.slots[a], self.slots[b] = self.slots[b], self.slots[a]
        for slot in (a, b):
            if self.slots[slot]:
                self.live[self.slots[slot]].slot = slot

    # -- other weights ------------------------------------------------------------------------------------------

    def set_weights(self, weights: str, *, with_kv: bool) -> None:
        """Other weights generate from now on. ``with_kv``: on KV that the old ones have computed."""
        self.weights = weights
        for handle, seq in self.live.items():
            if seq.view.state is SeqState.WAITING:
                continue
            self._reader.note_weights(handle, weights, seq.view.generated)
            seq.mixed = with_kv
            if seq.parked is not None and not with_kv:
                self._core.drop_saved(seq.parked)
                seq.view.cells = 0
                seq.view.prefill_left = seq.parked.left()

    def vacate_all(self) -> int:
        """Empty every slot; running sequences are computed again when they come back. Returns how many there were."""
        n = 0
        for handle in list(self.slots):
            if handle:
                self.preempt(handle, Preempt.RECOMPUTE, insist=True)
                n += 1
        self._kv.forget_all()
        return n

    # -- follow and end -----------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Follow what the core did: chunks, first tokens, finishes."""
        core_shifted = self._core.shifted
        for slot, (state, generated, n_past) in enumerate(self._core.progress()):
            handle = self.slots[slot]
            if not handle:
                continue
            seq = self.live[handle]
            view = seq.view
            if state == abi.PREFILL:
                view.prefill_left -= n_past - view.cells
            view.generated = generated
            view.cells = n_past
            seq.peak = max(seq.peak, n_past)
            if generated and not seq.first_token_ns:
                seq.first_token_ns = time.monotonic_ns()
            if seq.request.context_shift and core_shifted(slot):
                self._kv.released(slot)  # its KV is that of no prompt any more
            if seq.borders and n_past >= seq.borders[0] and n_past == seq.borders.pop(0):
                self._kv.checkpoint(slot, seq.request.id)
            if state == abi.DECODE and view.state is SeqState.PREFILL:
                view.prefill_left = 0
                seq.move(SeqState.DECODE)
            elif state == abi.DONE:
                self._core.close_slot(slot)
                self._kv.closed(slot, seq.namespace, seq.request.id)
                self._forget(seq)

    def cells_running(self) -> int:
        """Tokens in the KV cache that belong to running sequences."""
        return sum(self.views[handle].cells for handle in self.slots if handle)

    def cells_retained(self) -> int:
        """Tokens in the KV cache that belong to retained prefixes."""
        return sum(self._core.retained(slot)[0] for slot, handle in enumerate(self.slots) if not handle)

    def cancel(self, handle: int) -> None:
        """End a sequence in any state. Harmless when it has ended."""
        seq = self.live.get(handle)
        if seq is None:
            return
        if seq.slot >= 0:
            self._kv.stopping(seq.slot, seq.request.id)
            self._core.cancel(seq.slot)  # writes the finish record
            self._kv.released(seq.slot)
        elif seq.parked is not None:
            self._core.cancel_parked(seq.parked)
        else:
            waited = (time.monotonic_ns() - seq.view.arrival_ns) / 1e6
            profile = Profile(prompt_tokens=seq.view.prompt_tokens, queue_ms=waited, total_ms=waited)
            self._reader.end_directly(handle, Finish(FinishReason.CANCELLED, profile))
        self._forget(seq)

    def _forget(self, seq: LiveSequence) -> None:
        if seq.view.state is SeqState.WAITING:
            self.n_queued -= 1
        seq.move(SeqState.DONE)
        seq.parked = None
        if seq.slot >= 0:
            self.slots[seq.slot] = 0
        self.live.pop(seq.view.id, None)
        self.views.pop(seq.view.id, None)
        self._on_end(seq)


def _nothing(seq: LiveSequence) -> None:
    """What is to be done for sequences that end when nobody is there any more."""
