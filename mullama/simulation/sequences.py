"""The simulated sequences: into a slot, out of it, and what that costs. The twin of mullama/engine/sequences.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mullama.scheduling import Plan, SeqView
from mullama.simulation.costs import CostModel
from mullama.simulation.slots import Content, Slots
from mullama.types import Preempt, SeqState
from mullama.workload.base import TraceRequest

if TYPE_CHECKING:
    from mullama.simulation.records import Counters, SimConfig
    from mullama.simulation.timing import StepCosts


@dataclass(slots=True)
class SimSequence:
    """A request on its way: what the policy sees, and where it lives."""

    view: SeqView
    index: int
    request: TraceRequest
    content: Content
    found: int | None  # prompt tokens it is known to find in the cache; None: what matches
    slot: int = -1
    saved: bool = False  # while PREEMPTED: its KV is in host memory
    computed: int = 0  # tokens it had in the KV cache when it was preempted
    cached: int = 0
    token_ns: list[int] = field(default_factory=list)

    @classmethod
    def new(cls, view: SeqView, index: int, request: TraceRequest, found: int | None) -> SimSequence:
        content = Content(index, request.prompt_tokens, request.blocks, request.block_tokens)
        return cls(view, index, request, content, found)

    @property
    def left(self) -> int:
        """Tokens it will still generate."""
        return self.request.output_tokens - self.view.generated

    @property
    def done(self) -> bool:
        return self.view.generated >= self.request.output_tokens

    @property
    def n_tokens(self) -> int:
        """Tokens known of it: its prompt and what it generated."""
        return self.view.prompt_tokens + self.view.generated

    def move(self, state: SeqState, now: int) -> None:
        self.view.state = state
        self.view.state_ns = now


class Sequences:
    """By handle. Methods that take time return it in ns."""

    def __init__(self, config: SimConfig, costs: CostModel, timing: StepCosts, counters: Counters) -> None:
        self.live: dict[int, SimSequence] = {}
        self.views: dict[int, SeqView] = {}
        self.slots = Slots(config.n_slots)
        self._running: dict[int, SimSequence] = {}
        self._swap_tokens = config.swap_tokens
        self._parked = 0  # tokens in host memory
        self._costs = costs
        self._timing = timing
        self._counters = counters
        self._prefill_token_ns = costs.prefill_ns(config.n_batch, 0) / config.n_batch

    def add(self, seq: SimSequence) -> None:
        self.live[seq.view.id] = seq
        self.views[seq.view.id] = seq.view

    def load(self) -> tuple[int, int]:
        """Sequences that decode, and their cells."""
        cells = [seq.view.cells for seq in self._running.values() if seq.view.state is SeqState.DECODE]
        return len(cells), sum(cells)

    def cells_running(self) -> int:
        return sum(seq.view.cells for seq in self._running.values())

    # -- into a slot and out of it ----------------------------------------------------------------------------------

    def start(self, handle: int, now: int) -> int:
        """Give a queued sequence a slot."""
        seq = self.live[handle]
        view = seq.view
        is_new = view.state is SeqState.WAITING
        matters = not seq.saved and seq.found is None and (not is_new or bool(seq.content.blocks))
        slot, reuse, evicted, moved = self.slots.place(seq.content if matters else None, seq.n_tokens)
        ns = self._costs.move_ns(moved)
        state = SeqState.PREFILL
        if seq.saved:
            # What it restores takes the place of what the slot retains.
            evicted += self.slots.evict(slot)
            ns += round(view.cells * self._costs.restore_token_ns)
            self._counters.swapped_tokens += view.cells
            self._parked -= view.cells
            reuse = view.cells
        elif is_new:
            if seq.found is not None:
                reuse = min(seq.found, view.prompt_tokens - 1)
            seq.cached = reuse
        else:
            self._counters.recomputed_tokens += max(seq.computed - reuse, 0)
        seq.saved = False
        if view.generated and reuse == seq.n_tokens - 1:
            state = SeqState.DECODE
        self._counters.evicted_tokens += evicted
        view.cells = reuse
        view.prefill_left = 0 if state is SeqState.DECODE else seq.n_tokens - reuse
        seq.slot = slot
        self.slots.occupy(slot, handle, seq.content)
        self._running[handle] = seq
        seq.move(state, now + ns)
        return ns

    def preempt(self, handle: int, how: Preempt, now: int) -> int:
        """The request's own wish goes before ``how``; AUTO takes the cheaper way."""
        seq = self.live[handle]
        view = seq.view
        how = view.preempt if view.preempt is not Preempt.AUTO else how
        ns = 0
        seq.computed = view.cells
        if self._should_save(view.cells, how):
            seq.saved = True
            ns = round(view.cells * self._costs.save_token_ns)
            self._counters.swapped_tokens += view.cells
            self._parked += view.cells
            view.prefill_left = 0 if view.state is SeqState.DECODE else seq.n_tokens - view.cells
            self._leave(seq, 0)
        else:
            view.prefill_left = seq.n_tokens
            self._leave(seq, view.cells)
            view.cells = 0
        view.preemptions += 1
        self._counters.preemptions += 1
        seq.move(SeqState.PREEMPTED, now + ns)
        return ns

    def _should_save(self, cells: int, how: Preempt) -> bool:
        if how is Preempt.RECOMPUTE or cells == 0 or self._parked + cells > self._swap_tokens:
            return False
        return how is Preempt.SWAP or self._costs.move_ns(cells) < self._prefill_token_ns * cells

    def _leave(self, seq: SimSequence, retain: int) -> None:
        self.slots.release(seq.slot, retain, self._counters.steps)
        del self._running[seq.view.id]
        seq.slot = -1

    def finish(self, seq: SimSequence, now: int) -> None:
        """It has all of its tokens; its slot retains their KV."""
        self._leave(seq, seq.view.cells)
        seq.move(SeqState.DONE, now)
        del self.live[seq.view.id], self.views[seq.view.id]

    # -- a step -----------------------------------------------------------------------------------------------------

    def close_holes(self) -> int:
        """Keep running sequences on the lowest slots without gaps, where the move costs less than the gap."""
        spent = 0
        for low, high in self.slots.holes():
            seq = self.live[self.slots.slots[high].handle]
            if self._costs.move_ns(seq.view.cells) < self._timing.gap_ns(seq.view.tokens_left):
                spent += self._costs.move_ns(seq.view.cells + self.slots.slots[low].cells)
                self.slots.exchange(low, high)
                seq.slot = low
                self._counters.moves += 1
        return spent

    def shape(self, plan: Plan) -> tuple[list[SimSequence], list[tuple[SimSequence, int]]]:
        """The plan as the core takes it: who decodes, and prompt chunks."""
        decode: list[SimSequence] = []
        prefill: list[tuple[SimSequence, int]] = []
        for handle, n in plan.tokens.items():
            seq = self.live[handle]
            if seq.view.state is SeqState.DECODE:
                decode.append(seq)
            else:
                prefill.append((seq, min(n, seq.view.prefill_left)))
        return decode, prefill

    def computed(self, seq: SimSequence, n: int, now: int) -> bool:
        """``n`` more of its prompt are done. True: all of it, and with them came a token."""
        view = seq.view
        view.cells += n
        view.prefill_left -= n
        if view.prefill_left:
            return False
        view.generated += 1
        seq.token_ns.append(now)
        seq.move(SeqState.DECODE, now)
        return True
