"""The simulated sequences: into a slot, out of it, and what that costs. Twin of engine/requests/sequences.py."""

from __future__ import annotations

import itertools

from mullama.kv.choice import ESTIMATES
from mullama.kv.index.tree import TOKEN_BYTES
from mullama.scheduling import Plan, SeqView
from mullama.simulation.cost_model.costs import CostModel
from mullama.simulation.cost_model.timing import StepCosts
from mullama.simulation.records import Counters, SimConfig, SimSequence
from mullama.simulation.simulated_cache import Cache, Texts, own
from mullama.types import Preempt, SeqState


class Sequences:
    """By handle. Methods that take time return it in ns."""

    def __init__(self, config: SimConfig, costs: CostModel, timing: StepCosts, counters: Counters) -> None:
        self.live: dict[int, SimSequence] = {}
        self.views: dict[int, SeqView] = {}
        self.cache = Cache(config, costs, counters)
        self._texts = Texts()
        self._n_added = 0
        self._estimated = (-1, -1)  # version of the cache, and arrivals, when the queue was last looked up in it
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
        self._n_added += 1
        if seq.found is not None:
            seq.view.expect(seq.found)

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
        view, cache = seq.view, self.cache
        is_new = view.state is SeqState.WAITING
        state, served = SeqState.PREFILL, 0
        if seq.saved or (is_new and seq.found is not None):
            slot, ns = cache.allocate_empty(now)
        else:
            slot, served, ns = cache.allocate(self._known(seq), seq.n_tokens - 1, now)
        reuse = served
        if seq.saved:
            ns += round(view.cells * self._costs.restore_token_ns)
            self._counters.swapped_tokens += view.cells
            self._parked -= view.cells
            reuse = view.cells
        elif is_new:
            if seq.found is not None:
                reuse = min(seq.found, view.prompt_tokens - 1)
            view.cached_tokens = reuse
        else:
            self._counters.recomputed_tokens += max(seq.computed - reuse, 0)
        seq.saved = False
        if view.generated and reuse == seq.n_tokens - 1:
            state = SeqState.DECODE
        view.cells = reuse
        view.prefill_left = 0 if state is SeqState.DECODE else seq.n_tokens - reuse
        seq.slot = slot
        cache.occupy(slot, seq, self._known(seq), now, served=served if is_new else 0)
        self._running[handle] = seq
        seq.move(state, now + ns)
        return ns

    def waits_for_prefix(self, handle: int, plan: Plan) -> bool:
        """Whether another request is computing the prefix that this one needs: then it is computed once."""
        seq = self.live[handle]
        if seq.view.state is not SeqState.WAITING or seq.found is not None:
            return False
        return self.cache.waits_for(self._key(seq), seq.view.prompt_tokens - 1, plan.tokens)

    def estimate(self) -> None:
        """Tell the policy what the next ones in the queue will have to compute, as far as the KV cache changed."""
        known = (self.cache.version, self._n_added)
        if known == self._estimated:
            return
        self._estimated = known
        queued = (seq for seq in self.live.values() if seq.view.state is SeqState.WAITING)
        for seq in itertools.islice(queued, ESTIMATES):
            if seq.found is None:
                now, later, _ = self.cache.expected(self._key(seq), seq.view.prompt_tokens - 1)
                seq.view.expect(max(now, later))

    def _key(self, seq: SimSequence) -> bytes:
        if not seq.key:
            seq.key = self._texts.prompt(seq.index, seq.request)
        return seq.key

    def _known(self, seq: SimSequence) -> bytes:
        """Its prompt and what it generated."""
        generated = seq.view.generated
        return self._key(seq) + own(seq.index, generated) if generated else self._key(seq)

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
            self._leave(seq, 0, now)
        else:
            view.prefill_left = seq.n_tokens
            self._leave(seq, view.cells, now)
            view.cells = 0
        view.preemptions += 1
        self._counters.preemptions += 1
        seq.move(SeqState.PREEMPTED, now + ns)
        return ns

    def _should_save(self, cells: int, how: Preempt) -> bool:
        if how is Preempt.RECOMPUTE or cells == 0 or self._parked + cells > self._swap_tokens:
            return False
        return how is Preempt.SWAP or self._costs.move_ns(cells) < self._prefill_token_ns * cells

    def _leave(self, seq: SimSequence, retain: int, now: int) -> None:
        """Its slot retains so many of its tokens."""
        self.cache.leave(seq.slot, self._known(seq)[: TOKEN_BYTES * retain], now)
        del self._running[seq.view.id]
        seq.slot = -1

    def finish(self, seq: SimSequence, now: int) -> None:
        """It has all of its tokens; its slot retains their KV."""
        self._leave(seq, seq.view.cells, now)
        seq.move(SeqState.DONE, now)
        del self.live[seq.view.id], self.views[seq.view.id]

    # -- a step -----------------------------------------------------------------------------------------------------

    def close_holes(self) -> int:
        """Keep running sequences on the lowest slots without gaps, where the move costs less than the gap."""
        spent = 0
        for low, high in self.cache.holes():
            seq = self.cache.running[high]
            assert seq is not None, "holes() moves running sequences"
            if self._costs.move_ns(seq.view.cells) < self._timing.gap_ns(seq.view.tokens_left):
                spent += self._costs.move_ns(seq.view.cells + self.cache.retained_in(low))
                self.cache.exchange(low, high)
                self._counters.moves += 1
        return spent

    def shape(self, plan: Plan) -> tuple[list[SimSequence], list[tuple[SimSequence, int]]]:
        """The plan as the core takes it: who decodes, and prompt chunks."""
        decode: list[SimSequence] = []
        prefill: list[tuple[SimSequence, int]] = []
        for handle, n in plan.tokens.items():
            seq = self.live[handle]
            if seq.slot < 0:
                continue  # it waits for a prefix
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
