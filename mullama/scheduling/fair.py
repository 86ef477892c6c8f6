"""Fair shares between tenants, counted in tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, ClassVar

from mullama.scheduling.base import EngineState, Plan, SeqView
from mullama.scheduling.batching import COMMON, DECODE, METHOD, PREEMPTED, WAITING, Batching
from mullama.scheduling.params import Param

#: Tenants remembered; beyond that the idle ones with the least service are forgotten. They come back as new ones.
TENANTS_KEPT = 4096


class Fair(Batching):
    """The tenant (``user``) that has been served least comes first: a virtual token counter for each.

    Prompt and generated tokens are charged, weighted, as they are computed. A tenant that had nothing queued is lifted
    to the least counter of those who queue, so that nobody saves up service by being away. One that holds no slot may
    take one from the tenant served most, if that one holds several, so that a flood of long answers does not keep it
    waiting. Requests without ``user`` are one tenant.
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
        METHOD,
    )  # fmt: skip

    weight_input: float
    weight_output: float
    preempt_after_tokens: int

    def __init__(self, **params: Any) -> None:
        self._served: dict[str | None, float] = {}  # the counters
        self._accounts: dict[int, list[int]] = {}  # id: tokens charged, its state_ns, tokens when it came into it
        self._holds: dict[str | None, int] = {}  # slots, while a plan is made
        self._last_user: str | None = None  # whose request left the queue last
        super().__init__(**params)

    def _configured(self) -> None:
        super()._configured()
        self.preempts = self.preempt_after_tokens > 0

    def add(self, seq: SeqView) -> None:
        queued = {one.user for one in self._seqs.values() if one.state is WAITING or one.state is PREEMPTED}
        super().add(seq)
        own = self._served.get(seq.user, 0.0)
        if seq.user not in queued:
            floor = [self._served[user] for user in queued] or [self._served.get(self._last_user, 0.0)]
            own = max(own, min(floor))
        self._served[seq.user] = own
        if seq.state is not WAITING:  # handed over: what it had before is not counted
            self._accounts[seq.id] = [seq.generated, seq.state_ns, seq.generated]
        if len(self._served) > TENANTS_KEPT:
            self._forget_tenants()

    def remove(self, seq_id: int) -> None:
        seq = self._seqs.get(seq_id)
        super().remove(seq_id)
        account = self._accounts.pop(seq_id, None)
        if seq is not None and account is not None:
            self._served[seq.user] += self.weight_output * (seq.generated - account[0])

    def plan(self, state: EngineState) -> Plan:
        self._charge()
        return super().plan(state)

    def _charge(self) -> None:
        """Bring the counters up to date with what the sequences have computed."""
        accounts, served = self._accounts, self._served
        for seq in self._seqs.values():
            now = seq.state
            if now is WAITING:
                continue
            account = accounts.get(seq.id)
            if account is None:
                accounts[seq.id] = account = [0, seq.state_ns, seq.generated]
                served[seq.user] += self.weight_input * seq.prompt_tokens
                self._last_user = seq.user
            elif account[1] != seq.state_ns:
                account[1], account[2] = seq.state_ns, seq.generated
            if account[0] != seq.generated:
                served[seq.user] += self.weight_output * (seq.generated - account[0])
                account[0] = seq.generated

    def _order(self, todo: list[SeqView], running: list[SeqView], state: EngineState) -> Iterator[SeqView]:
        """Tenant by tenant: the least counter, then the fewest slots, then the oldest request."""
        holds = self._holds = {}
        for seq in running:
            holds[seq.user] = holds.get(seq.user, 0) + 1
        lines: dict[str | None, list[SeqView]] = {}
        for seq in reversed(todo):
            lines.setdefault(seq.user, []).append(seq)  # the oldest last
        heap = []
        for user, line in lines.items():
            seq = line[-1]
            heap.append((self._served[user], holds.get(user, 0), seq.arrival_ns, seq.id, user))
        heapq.heapify(heap)
        while heap:
            counter, _, _, _, user = heap[0]
            line = lines[user]
            seq = line.pop()
            yield seq
            if not line:
                heapq.heappop(heap)
                continue
            if seq.state is WAITING:
                counter += self.weight_input * seq.prompt_tokens  # what it will be charged
            seq = line[-1]
            heapq.heapreplace(heap, (counter, holds.get(user, 0), seq.arrival_ns, seq.id, user))

    def _admitted(self, seq: SeqView, victims: list[SeqView]) -> None:
        self._holds[seq.user] = self._holds.get(seq.user, 0) + 1
        for victim in victims:
            self._holds[victim.user] -= 1

    def _victims(self, running: list[SeqView], state: EngineState) -> list[SeqView]:
        """The tenant served most loses first, its newest first."""
        after, served = self.preempt_after_tokens, self._served
        able = [(served[s.user], s.arrival_ns, s.id, s) for s in running if s.state is DECODE and self._ran(s) >= after]
        return [seq for *_, seq in sorted(able)]

    def _yields(self, victim: SeqView, seq: SeqView) -> bool:
        holds = self._holds
        return (
            not holds.get(seq.user)
            and holds.get(victim.user, 0) > 1
            and self._served[seq.user] <= self._served[victim.user]
        )

    def _ran(self, seq: SeqView) -> int:
        """Tokens since it came into its state."""
        return seq.generated - self._accounts[seq.id][2]

    def _blocked(self, plan: Plan, seq: SeqView, running: list[SeqView], state: EngineState) -> None:
        """Come back when the first sequence has run for long enough to lose its slot."""
        ran = max((self._ran(one) for one in running if one.state is DECODE and self._yields(one, seq)), default=0)
        if ran:
            plan.repeat = max(1, self.preempt_after_tokens - ran)

    def _forget_tenants(self) -> None:
        busy = {seq.user for seq in self._seqs.values()}
        idle = sorted((counter, n) for n, (user, counter) in enumerate(self._served.items()) if user not in busy)
        names = list(self._served)
        for _, n in idle[: TENANTS_KEPT // 2]:
            del self._served[names[n]]
