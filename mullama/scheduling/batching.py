"""What all built-in policies share: continuous batching, decode first, prompts in chunks under a budget.

A policy adds its ordering rule and, if it takes slots away, its preemption rule. Every step decodes all running
sequences; the prompt budget is spent, and the free slots are given, in the policy's order (chunked prefill with
decodes kept running is the rule of Sarathi-Serve, Agrawal et al., OSDI 2024). A queued sequence that finds no slot,
no budget or no KV cells closes the door for those behind it: nobody overtakes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from mullama.plugins.parameters import Param, Policy
from mullama.scheduling.base import EngineState, Plan, SeqView
from mullama.scheduling.kv_budget import HEADROOM
from mullama.types import Preempt, SeqState

# PERF: a global name costs a third of an enum's attribute.
WAITING, PREFILL, DECODE, PREEMPTED = SeqState.WAITING, SeqState.PREFILL, SeqState.DECODE, SeqState.PREEMPTED
AUTO = Preempt.AUTO

#: Steps that all running sequences must have cells for before another is admitted, this one and those that the KV
#: budget asks for: without them a sequence that lost its cells would come back at once and push out the next one.
MAX_GROWTH = HEADROOM + 1

PREFILL_BUDGET = Param("prefill_budget", 512, "most prompt tokens a step", minimum=1)
MAX_RUNNING = Param("max_running", 0, "most sequences that run at once; 0: as many as there are slots", minimum=0)
CHUNK = Param("chunk", 0, "most prompt tokens of one sequence a step; 0: no limit but the budget", minimum=0)
METHOD = Param(
    "method",
    "auto",
    "what becomes of a preempted sequence's KV, unless its request says",
    choices=tuple(str(how) for how in Preempt),
)
COMMON = (PREFILL_BUDGET, MAX_RUNNING, CHUNK)


class Batching(Policy):
    """Decode all, then spend the prompt budget and give the slots in order of ``rank``."""

    PARAMS: ClassVar[tuple[Param, ...]] = COMMON
    preempts: bool = False  # whether victims and yields are asked

    prefill_budget: int
    max_running: int
    chunk: int
    method: str = "auto"

    def __init__(self, **params: Any) -> None:
        self._seqs: dict[int, SeqView] = {}  # in order of rank, unless _unsorted
        self._last: tuple[float, ...] = ()  # the highest rank so far
        super().__init__(**params)

    def _configured(self) -> None:
        self._unsorted = True  # ranks may depend on parameters
        self._how = Preempt(self.method)

    # -- the rules ------------------------------------------------------------------------------------------------

    def rank(self, seq: SeqView) -> tuple[float, ...]:
        """Place in the order, lowest first; must not change while the sequence lives. Default: arrival."""
        return seq.arrival_ns, seq.id

    def order(self, todo: list[SeqView], running: list[SeqView], state: EngineState) -> Iterable[SeqView]:
        """Prompts and queued sequences in the order in which they are served; ``todo`` is in order of rank."""
        return todo

    def admitted(self, seq: SeqView, victims: list[SeqView]) -> None:
        """``seq`` leaves the queue in this plan, the victims lose their slots."""

    def victims(self, running: list[SeqView], state: EngineState) -> list[SeqView]:
        """The running sequences that may lose their slot; the first to lose it comes last."""
        return []

    def yields(self, victim: SeqView, seq: SeqView) -> bool:
        """Whether ``victim`` loses its slot to the queued ``seq``, whose turn it is."""
        return False

    def blocked(self, plan: Plan, seq: SeqView, running: list[SeqView], state: EngineState) -> None:
        """``seq`` is the first that stays in the queue: limit how long the plan holds, if time changes that."""

    # -- the mechanics --------------------------------------------------------------------------------------------

    def add(self, seq: SeqView) -> None:
        rank = self.rank(seq)
        if rank < self._last:
            self._unsorted = True
        else:
            self._last = rank
        self._seqs[seq.id] = seq

    def remove(self, seq_id: int) -> None:
        self._seqs.pop(seq_id, None)

    def plan(self, state: EngineState) -> Plan:
        if self._unsorted:
            self._sort()
        tokens: dict[int, int] = {}
        running: list[SeqView] = []
        todo: list[SeqView] = []
        n_prompts = 0
        for seq in self._seqs.values():
            now = seq.state
            if now is DECODE:
                tokens[seq.id] = 1
                running.append(seq)
            elif now is WAITING or now is PREEMPTED:
                todo.append(seq)
            elif now is PREFILL:
                todo.append(seq)
                running.append(seq)
                n_prompts += 1
        plan = Plan(tokens)
        if todo:
            self._fill(plan, todo, running, n_prompts, state)
        return plan

    def _sort(self) -> None:
        ranked = sorted((self.rank(seq), seq.id) for seq in self._seqs.values())
        self._seqs = {seq_id: self._seqs[seq_id] for _, seq_id in ranked}
        self._last = ranked[-1][0] if ranked else ()
        self._unsorted = False

    def _fill(
        self, plan: Plan, todo: list[SeqView], running: list[SeqView], n_prompts: int, state: EngineState
    ) -> None:
        """Give chunks and slots in order, until both are used up."""
        tokens = plan.tokens
        budget = min(self.prefill_budget, state.max_prefill)
        chunk = self.chunk or budget
        slots = state.free_slots
        if self.max_running:
            slots = min(slots, self.max_running - len(running))
        is_open = len(todo) > n_prompts and (slots > 0 or self.preempts)
        if not is_open:
            if n_prompts == 0:
                return
            todo = [seq for seq in todo if seq.state is PREFILL]  # PERF: the queue need not be ordered
        door: _Door | None = None
        for seq in self.order(todo, running, state):
            left = seq.prefill_left
            n = min(left, budget, chunk)
            if seq.state is PREFILL:
                n_prompts -= 1
                if n and seq.id not in plan.preempt:
                    tokens[seq.id] = n
                    budget -= n
            elif is_open:
                if door is None:
                    door = _Door(self, plan, running, slots, state)
                if (n or left == 0) and door.admit(seq):
                    tokens[seq.id] = n or 1
                    budget -= n
                else:
                    is_open = False
                    if self.preempts:
                        self.blocked(plan, seq, running, state)
            if n_prompts == 0 and not is_open:
                break


class _Door:
    """Slots and KV cells of one step, and who may be made to give up theirs."""

    __slots__ = ("free_cells", "is_empty", "plan", "policy", "running", "slots", "state", "victims")

    def __init__(self, policy: Batching, plan: Plan, running: list[SeqView], slots: int, state: EngineState) -> None:
        self.policy = policy
        self.plan = plan
        self.running = running
        self.slots = slots
        self.state = state
        self.is_empty = not running
        self.free_cells = state.free_cells
        for seq in running:
            self.free_cells -= _growth(seq)
        self.victims: list[SeqView] | None = None

    def admit(self, seq: SeqView) -> bool:
        """Take a slot and cells for a queued sequence, from victims if need be."""
        need = seq.cells + _growth(seq)
        taken: list[SeqView] = []
        # Whoever has the machine alone is let in: if it does not fit then, it never will.
        if self.slots < 1 or (need > self.free_cells and not self.is_empty):
            taken = self._preempt_for(seq, need)
            if not taken:
                return False
        self.slots -= 1
        self.free_cells -= need
        self.is_empty = False
        self.policy.admitted(seq, taken)
        return True

    def _preempt_for(self, seq: SeqView, need: int) -> list[SeqView]:
        """Take as many victims as it needs, or none."""
        policy = self.policy
        if not policy.preempts:
            return []
        if self.victims is None:
            self.victims = policy.victims(self.running, self.state)
        slots, free, victims = self.slots, self.free_cells, self.victims
        places: list[int] = []
        for place in range(len(victims) - 1, -1, -1):
            if slots > 0 and need <= free:
                break
            victim = victims[place]
            if policy.yields(victim, seq):
                places.append(place)
                slots += 1
                free += victim.cells + _growth(victim)
        if slots < 1 or need > free:
            return []
        taken = [victims.pop(place) for place in places]
        tokens = self.plan.tokens
        for victim in taken:
            tokens.pop(victim.id, None)
            self.plan.preempt[victim.id] = policy._how if victim.preempt is AUTO else victim.preempt
        self.slots, self.free_cells = slots, free
        return taken


def _growth(seq: SeqView) -> int:
    """Cells that a sequence needs within the next steps."""
    left = seq.max_tokens - seq.generated
    return seq.prefill_left + (left if left < MAX_GROWTH else MAX_GROWTH)
