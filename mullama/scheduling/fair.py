"""Fair shares between tenants, counted in tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, ClassVar

from mullama.plugins.parameters import Param
from mullama.scheduling.base import EngineState, Plan, SeqView
from mullama.scheduling.batching import COMMON, DECODE, METHOD, PREEMPTED, PREFILL, WAITING, Batching

#: Tenants remembered; beyond that the idle ones with the least service are forgotten. They come back as new ones.
TENANTS_KEPT = 4096


class Fair(Batching):
    """The tenant (``user``) that has been served least comes first: a virtual token counter for each.

    Prompt and generated tokens are charged, weighted, as they are computed. A tenant that had nothing queued is lifted
    to the least counter of those who queue, so that nobody saves up service by being away. Whoever holds no slot, or
    the one that its prompt is computed in, goes before those that hold several: it may take a slot from the tenant
    served most, and that tenant's answers pause while its prompt is computed, so that a flood of long answers does not
    keep it waiting. Requests without ``user`` are one tenant.
    """

    name: ClassVar[str] = "fair"
    SOURCE: ClassVar[str] = "virtual token counter: Sheng et al., Fairness in serving large language models, OSDI 2024"
    PARAMS: ClassVar[tuple[Param, ...]] = (
        *COMMON,
        Param("weight_input", 1.0, "what a prompt token counts", minimum=0, maximum=1e6),
        Param("weight_output", 2.0, "what a generated token counts", minimum=0, maximum=1e6),
        Param(
            "preempt_after_tokens", 16, "tokens a sequence generates before a tenant without a slot may take its slot; "
            "0: never", minimum=0, maximum=1_000_000,
        ),
        Param("pause", True, "whether tenants that hold several slots pause while the prompt of one that does not is "
              "computed"),
        METHOD,
    )  # fmt: skip

    weight_input: float
    weight_output: float
    preempt_after_tokens: int
    pause: bool

    def __init__(self, **params: Any) -> None:
        self._served: dict[str | None, float] = {}  # the counters
        self._accounts: dict[int, list[int]] = {}  # id: tokens charged, its state_ns, tokens when it came into it
        self._holds: dict[str | None, int] = {}  # slots, while a plan is made
        self._crowded: set[str | None] = set()  # tenants that hold several slots
        self._last_user: str | None = None  # whose request left the queue last
        super().__init__(**params)

    def _configured(self) -> None:
        super()._configured()
        self.preempts = self.preempt_after_tokens > 0

    def add(self, seq: SeqView) -> None:
        queued = {one.user for one in self._seqs.values() if one.state is WAITING or one.state is PREEMPTED}
        super().add(seq)
        # The lift: to the least counter in the queue, or that of whoever left it last. One's own is no lift.
        floor = [self._served[user] for user in queued] or [self._served.get(self._last_user, 0.0)]
        self._served[seq.user] = max(self._served.get(seq.user, 0.0), min(floor))
        if seq.state is not WAITING:  # handed over: what it had before is not counted
            self._accounts[seq.id] = [seq.generated, seq.state_ns, seq.generated]
        if len(self._served) > TENANTS_KEPT:
            self._forget_tenants()

    def remove(self, seq_id: int) -> None:
        seq = self._seqs.get(seq_id)
        super().remove(seq_id)
        account = self._accounts.pop(seq_id, None)
        if seq is None or (account is None and seq.generated == 0):
            return  # it was never served
        if account is None:  # it came and went between two plans
            account = self._open_account(seq)
        self._served[seq.user] += self.weight_output * (seq.generated - account[0])

    def plan(self, state: EngineState) -> Plan:
        self._charge()
        self._crowded = set()
        plan = super().plan(state)
        if self.pause and self._crowded:
            self._pause(plan)
        return plan

    def _pause(self, plan: Plan) -> None:
        """Take decodes out of a plan that computes the prompt of a tenant without another slot.

        Those of crowded tenants that have been served as much as that one: a stream of small tenants, whose counters
        go up, stops nobody for ever.
        """
        tokens, seqs, served = plan.tokens, self._seqs, self._served
        floor = float("inf")
        for i in tokens:
            seq = seqs[i]
            if seq.state is not DECODE and seq.prefill_left and self._holds[seq.user] == 1:
                charged = self.weight_input * seq.prompt_tokens if seq.state is PREFILL else 0.0
                floor = min(floor, served[seq.user] - charged)
        for seq_id in list(tokens):
            seq = seqs[seq_id]
            if seq.state is DECODE and seq.user in self._crowded and served[seq.user] >= floor:
                del tokens[seq_id]

    def _charge(self) -> None:
        """Bring the counters up to date with what the sequences have computed."""
        accounts, served = self._accounts, self._served
        for seq in self._seqs.values():
            now = seq.state
            if now is WAITING:
                continue
            account = accounts.get(seq.id)
            if account is None:
                accounts[seq.id] = account = self._open_account(seq)
            elif account[1] != seq.state_ns:
                account[1], account[2] = seq.state_ns, seq.generated
            if account[0] != seq.generated:
                served[seq.user] += self.weight_output * (seq.generated - account[0])
                account[0] = seq.generated

    def _open_account(self, seq: SeqView) -> list[int]:
        """It has left the queue: charge its prompt."""
        self._served[seq.user] += self.weight_input * seq.prompt_tokens
        self._last_user = seq.user
        return [0, seq.state_ns, seq.generated]

    def order(self, todo: list[SeqView], running: list[SeqView], state: EngineState) -> Iterator[SeqView]:
        """Tenant by tenant: those without another slot, the least counter, the fewest slots, the oldest request."""
        holds = self._holds = {}
        for seq in running:
            holds[seq.user] = holds.get(seq.user, 0) + 1
        self._crowded = {user for user, n in holds.items() if n > 1}
        lines: dict[str | None, list[SeqView]] = {}
        for seq in reversed(todo):
            lines.setdefault(seq.user, []).append(seq)  # the oldest last
        heap = [self._place(user, line[-1], 0.0) for user, line in lines.items()]
        heapq.heapify(heap)
        while heap:
            user, charged = heap[0][-2:]
            line = lines[user]
            seq = line.pop()
            yield seq
            if not line:
                heapq.heappop(heap)
                continue
            if seq.state is WAITING:
                charged += self.weight_input * seq.prompt_tokens  # what it will be charged
            heapq.heapreplace(heap, self._place(user, line[-1], charged))

    def _place(self, user: str | None, seq: SeqView, charged: float) -> tuple[Any, ...]:
        """Where a tenant stands with its next request; ``charged``: for what this plan has given it already."""
        others = self._holds.get(user, 0)
        counter = self._served[user] + charged
        if seq.state is not WAITING and seq.state is not PREEMPTED:  # it holds a slot, and its prompt was charged whole
            others -= 1
            counter -= self.weight_input * seq.prompt_tokens
        # Ids are unique, so the tenants' names, which may be None, are never compared.
        return others > 0, counter, others, seq.arrival_ns, seq.id, user, charged

    def admitted(self, seq: SeqView, victims: list[SeqView]) -> None:
        self._holds[seq.user] = self._holds.get(seq.user, 0) + 1
        for victim in victims:
            self._holds[victim.user] -= 1

    def victims(self, running: list[SeqView], state: EngineState) -> list[SeqView]:
        """The tenant served most loses first, its newest first."""
        after, served = self.preempt_after_tokens, self._served
        able = [(served[s.user], s.arrival_ns, s.id, s) for s in running if s.state is DECODE and self._ran(s) >= after]
        return [entry[-1] for entry in sorted(able)]

    def yields(self, victim: SeqView, seq: SeqView) -> bool:
        holds = self._holds
        return (
            not holds.get(seq.user)
            and holds.get(victim.user, 0) > 1
            and self._served[seq.user] <= self._served[victim.user]
        )

    def _ran(self, seq: SeqView) -> int:
        """Tokens since it came into its state."""
        return seq.generated - self._accounts[seq.id][2]

    def blocked(self, plan: Plan, seq: SeqView, running: list[SeqView], state: EngineState) -> None:
        """Come back when the first sequence has run for long enough to lose its slot."""
        ran = max((self._ran(one) for one in running if one.state is DECODE and self.yields(one, seq)), default=-1)
        if ran >= 0:
            plan.repeat = max(1, self.preempt_after_tokens - ran)

    def _forget_tenants(self) -> None:
        busy = {seq.user for seq in self._seqs.values()}
        idle = sorted((counter, n) for n, (user, counter) in enumerate(self._served.items()) if user not in busy)
        names = list(self._served)
        for _, n in idle[: TENANTS_KEPT // 2]:
            del self._served[names[n]]
