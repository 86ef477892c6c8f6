"""From the engine to what its policy is asked with, and from its plan to what the core takes. Engine thread."""

from __future__ import annotations

import itertools
import time

from mullama.engine.parts import EngineParts
from mullama.kv.choice import ESTIMATES
from mullama.scheduling import Costs, EngineState, Plan
from mullama.scheduling.kv_budget import Fitted, fit_or_go_on
from mullama.types import SeqState

BESIDE_S = 0.2  # another engine that computed so lately wants the cores as well
SHARED_PREFILL = 128  # tokens: about 0.2 s of a small model on two cores


class Steps:
    """Between the policy, the sequences and the core."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._estimated = (-1, -1)  # version of the KV cache, and arrivals, when the queue was last looked up in it
        core = parts.core
        self.is_limited = parts.kv_tokens < core.n_slots * core.n_ctx  # not every slot can be filled at once

    def state(self) -> EngineState:
        """What the policy is asked with."""
        self._estimate()
        parts, core, seqs = self._parts, self._parts.core, self._parts.seqs
        governor = core.governor
        n_decoding = sum(view.state is SeqState.DECODE for view in seqs.views.values())
        costs = Costs(
            prefill_token_ns=governor.cost(core.n_batch) / core.n_batch,
            decode_step_ns=governor.cost(max(n_decoding, 1)),
            swap_token_ns=seqs.move_ns_per_byte * parts.token_bytes,
        )
        return EngineState(
            now_ns=time.monotonic_ns(),
            step=core.steps_done(),
            free_slots=seqs.slots.count(0),
            max_prefill=self._max_prefill(),
            n_slots=core.n_slots,
            free_cells=parts.kv_tokens - seqs.cells_running(),
            costs=costs,
        )

    def _max_prefill(self) -> int:
        """Prompt tokens of one step: fewer while somebody waits for its end, another engine or a change of weights."""
        core = self._parts.core
        if self._parts.weights.change is not None or core.turns.busy_beside(core.seat, BESIDE_S):
            return min(core.n_batch, SHARED_PREFILL)
        return core.n_batch

    def _estimate(self) -> None:
        """Tell the policy what the next ones in the queue will have to compute, as far as the KV cache changed."""
        kv, seqs = self._parts.kv, self._parts.seqs
        known = (kv.version, seqs.n_added)
        if not seqs.n_queued or known == self._estimated:
            return
        self._estimated = known
        queued = (seq for seq in seqs.live.values() if seq.view.state is SeqState.WAITING)
        for seq in itertools.islice(queued, ESTIMATES):
            foreseen = kv.finder.expected(seq.namespace, seq.key, seq.reuse_limit)
            seq.view.expect(max(foreseen.now, foreseen.later))

    def fit(self, plan: Plan) -> Fitted:
        """The plan, cut to the KV budget."""
        return fit_or_go_on(plan, self._parts.seqs.views, self._parts.kv_tokens, self._parts.core.n_batch)

    def make_room(self, fitted: Fitted) -> int:
        """Give up retained prefixes, also those of whom the plan preempted. Returns the steps it may be repeated."""
        seqs = self._parts.seqs
        free = self._parts.kv_tokens - seqs.cells_running() - seqs.cells_retained()
        if free < fitted.wanted:
            free += seqs.evict_retained(fitted.wanted - free)
        return fitted.steps(free)

    def waits_for_prefix(self, handle: int, plan: Plan) -> bool:
        """Whether another request is computing the prefix that this one needs: then it is computed once."""
        parts, seq = self._parts, self._parts.seqs.live[handle]
        if seq.parked is not None:
            return False
        foreseen = parts.kv.finder.expected(seq.namespace, seq.key, seq.reuse_limit)
        # Only while it gets on: a policy that leaves it out must not leave two requests waiting.
        return foreseen.later > 0 and parts.seqs.slots[foreseen.slot] in plan.tokens

    def shape(self, plan: Plan) -> tuple[list[int], list[tuple[int, int]]]:
        """The plan as the core takes it: slots that decode, and prompt chunks (slot, tokens)."""
        decode: list[int] = []
        prefill: list[tuple[int, int]] = []
        for handle, n in plan.tokens.items():
            seq = self._parts.seqs.live.get(handle)
            if seq is None or seq.slot < 0:
                continue  # it could not be started
            if seq.view.state is SeqState.DECODE:
                decode.append(seq.slot)
            else:
                n = min(n, seq.view.prefill_left)
                if seq.borders:
                    n = min(n, max(seq.borders[0] - seq.view.cells, 1))
                prefill.append((seq.slot, n))
        return decode, prefill
