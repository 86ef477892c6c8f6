"""A tiny engine that carries plans out, and checks on the way what every policy must keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mullama.scheduling import Batching, Costs, EngineState, Plan, Scheduler, SeqView, check_plan, create
from mullama.scheduling.kv_budget import fit
from mullama.types import Preempt, SeqState

MS = 1_000_000
EVER = 1 << 62


@dataclass(frozen=True)
class Job:
    """One request: when it comes, what it asks, and how much it turns out to say."""

    at: int  # step
    prompt: int
    output: int
    priority: int = 0
    user: str | None = None
    slo_ms: float | None = None
    limit: int = 0  # its max_tokens beyond what it says
    cancel_after: int | None = None  # steps


@dataclass
class Served:
    """What became of a job; times in steps."""

    arrival: int
    first_token: int | None = None
    end: int | None = None
    admissions: int = 0
    cancelled: bool = False
    tokens: int = 0


@dataclass
class TinyEngine:
    """Slots, steps and KV cells; ``log`` holds every plan that was asked for."""

    policy: Scheduler
    n_slots: int = 4
    max_prefill: int = 512
    kv_tokens: int = EVER
    step_ns: int = 10 * MS
    costs: Costs = field(default_factory=Costs)
    now_ns: int = 1_000_000_000
    step: int = 0
    views: dict[int, SeqView] = field(default_factory=dict)
    jobs: dict[int, Job] = field(default_factory=dict)
    served: dict[int, Served] = field(default_factory=dict)
    arrivals: dict[int, int] = field(default_factory=dict)  # when each came, ns
    log: list[tuple[int, Plan]] = field(default_factory=list)
    _plan: Plan | None = None  # goes on until something changes
    _left: int = 0  # repeats of it, 0: no limit

    # -- what happens from outside ------------------------------------------------------------------------------

    def arrive(self, job: Job) -> int:
        seq_id = len(self.served) + 1
        view = SeqView(
            seq_id, SeqState.WAITING, job.prompt, job.prompt, job.output + job.limit, self.now_ns,
            priority=job.priority, user=job.user, slo_ms=job.slo_ms, state_ns=self.now_ns,
        )  # fmt: skip
        self.views[seq_id] = view
        self.jobs[seq_id] = job
        self.served[seq_id] = Served(self.step)
        self.arrivals[seq_id] = self.now_ns
        self.policy.add(view)
        self._plan = None
        return seq_id

    def cancel(self, seq_id: int) -> None:
        if seq_id in self.views:
            self.served[seq_id].cancelled = True
            self._end(seq_id)

    def swap(self, policy: Scheduler) -> None:
        """Hand everything over to another policy."""
        self.policy = policy
        for view in self.views.values():
            policy.add(view)
        self._plan = None

    def run(self, steps: int, jobs: Iterable[Job] = (), each: Callable[[int], None] = lambda step: None) -> None:
        """Go on for as many steps, or until nothing is left to do; jobs come when it is their time."""
        todo = sorted(jobs, key=lambda job: job.at)
        for _ in range(steps):
            while todo and todo[0].at <= self.step:
                self.arrive(todo.pop(0))
            for seq_id, job in self.jobs.items():
                if job.cancel_after is not None and self.step - self.served[seq_id].arrival >= job.cancel_after:
                    self.cancel(seq_id)
            each(self.step)
            if not self.views and not todo:
                return
            self.one_step()

    # -- a step --------------------------------------------------------------------------------------------------

    def one_step(self) -> None:
        plan = self._plan if self._plan is not None and self._holds(self._plan) else self._ask()
        if self.kv_tokens < EVER:
            fitted = fit(plan, self.views, self.kv_tokens)
            plan = fitted.plan
            plan.preempt.update(dict.fromkeys(fitted.preempt, Preempt.AUTO))
        for seq_id, how in plan.preempt.items():
            self._preempt(seq_id, how)
        self.step += 1
        self.now_ns += self.step_ns
        changed = bool(plan.preempt)
        for seq_id, n in plan.tokens.items():
            changed |= self._compute(self.views[seq_id], n)
        self._plan = None if changed else plan

    def _holds(self, plan: Plan) -> bool:
        if plan.until_ns and self.now_ns >= plan.until_ns:
            return False
        if self._left:
            self._left -= 1
            return self._left > 0
        return True

    def state(self) -> EngineState:
        running = [view for view in self.views.values() if view.is_running]
        free = min(self.kv_tokens - sum(view.cells for view in running), EVER)
        return EngineState(
            self.now_ns, self.step, self.n_slots - len(running), self.max_prefill, self.n_slots, free, self.costs
        )

    def _ask(self) -> Plan:
        state = self.state()
        plan = self.policy.plan(state)
        check_plan(plan, self.views, state)
        if isinstance(self.policy, Batching):
            check_batching(plan, self.views, state, self.policy, self.kv_tokens < EVER)
        self.log.append((self.step, plan))
        self._left = plan.repeat
        return plan

    def _preempt(self, seq_id: int, how: Preempt) -> None:
        view = self.views[seq_id]
        if how is Preempt.RECOMPUTE or (how is Preempt.AUTO and seq_id % 2):
            view.cells = 0
            view.prefill_left = view.prompt_tokens + view.generated
        self._move(view, SeqState.PREEMPTED)
        view.preemptions += 1

    def _compute(self, view: SeqView, n: int) -> bool:
        """One sequence's part of a step; True when somebody has to be told."""
        before = view.state
        if view.is_queued:
            self.served[view.id].admissions += 1
            self._move(view, SeqState.PREFILL if view.prefill_left else SeqState.DECODE)
        view.cells += n
        if view.state is SeqState.PREFILL:
            view.prefill_left -= n
            if view.prefill_left:
                return True
            self._move(view, SeqState.DECODE)
        view.generated += 1
        served = self.served[view.id]
        served.tokens = view.generated
        if served.first_token is None:
            served.first_token = self.step
        if view.generated >= self.jobs[view.id].output:
            self._end(view.id)
        return view.state is not before

    def _move(self, view: SeqView, state: SeqState) -> None:
        view.state = state
        view.state_ns = self.now_ns

    def _end(self, seq_id: int) -> None:
        self.served[seq_id].end = self.step
        self._move(self.views.pop(seq_id), SeqState.DONE)
        self.policy.remove(seq_id)
        self._plan = None


def may_pause(paused: set[int], chunks: dict[int, int], views: dict[int, SeqView], policy: Batching) -> bool:
    """fair alone, and only crowded tenants, while the prompt of one that is not is computed."""
    slots: dict[str | None, int] = {}
    for view in views.values():
        if view.is_running:
            slots[view.user] = slots.get(view.user, 0) + 1
    crowded = {user for user, n in slots.items() if n > 1}
    return (
        getattr(policy, "pause", False)
        and all(views[i].user in crowded for i in paused)
        and any(views[i].user not in crowded for i in chunks)
    )


def check_batching(
    plan: Plan, views: dict[int, SeqView], state: EngineState, policy: Batching, cells_are_short: bool
) -> None:
    """What every built-in promises of each plan."""
    chunks = {i: n for i, n in plan.tokens.items() if views[i].prefill_left}
    assert sum(chunks.values()) <= policy.prefill_budget
    assert not policy.chunk or all(n <= policy.chunk for n in chunks.values())
    decoding = {i for i, view in views.items() if view.state is SeqState.DECODE}
    paused = decoding - plan.tokens.keys() - plan.preempt.keys()
    assert not paused or may_pause(paused, chunks, views, policy), "all running sequences decode"
    running = {i for i, view in views.items() if view.is_running}
    queued = {i for i, view in views.items() if view.is_queued}
    admitted = queued & plan.tokens.keys()
    after = len(running) - len(plan.preempt) + len(admitted)
    if admitted and policy.max_running:
        assert after <= policy.max_running
    if plan.preempt and not cells_are_short:
        above = max(len(running) - policy.max_running, 0) if policy.max_running else 0  # after the limit was lowered
        assert len(plan.preempt) <= len(admitted) + above, "a slot is taken for somebody"
        assert admitted
    # Work conserving: nothing stays behind without a reason.
    budget = min(policy.prefill_budget, state.max_prefill) - sum(chunks.values())
    if budget:
        idle = running - decoding - plan.preempt.keys() - plan.tokens.keys()
        assert not idle, "a prompt under way goes on while there is budget"
    slots = state.free_slots + len(plan.preempt) - len(admitted)
    if policy.max_running:
        slots = min(slots, policy.max_running - after)
    behind = [views[i] for i in queued - admitted]
    if behind and slots > 0 and budget and not cells_are_short:
        raise AssertionError("somebody waits, with a free slot and budget left")
    if running | queued and (running or state.free_slots > 0):
        assert plan.tokens, "with work to do there is a plan that does some"
    if not behind:
        assert plan.repeat == 0 and plan.until_ns == 0, "nothing will happen by itself"
    assert plan.until_ns == 0 or plan.until_ns > state.now_ns


def seq(seq_id: int, state: SeqState = SeqState.WAITING, left: int | None = None, **more: Any) -> SeqView:
    """A view for one question; prompts of 10 tokens, arrivals in order of the ids."""
    left = left if left is not None else 0 if state is SeqState.DECODE else 10
    values = {"prompt_tokens": 10, "max_tokens": 50, "arrival_ns": seq_id * MS, **more}
    return SeqView(seq_id, state, prefill_left=left, **values)


def moment(free_slots: int = 4, now_ns: int = 1000 * MS, **more: Any) -> EngineState:
    return EngineState(**{"now_ns": now_ns, "step": 0, "free_slots": free_slots, "max_prefill": 512, **more})


def planned(policy: Batching, state: EngineState, *seqs: SeqView) -> Plan:
    """The plan of a policy that is given these sequences, where it does not have them."""
    for one in seqs:
        if one.id not in policy._seqs:
            policy.add(one)
    return replanned(policy, state, *seqs)


def replanned(policy: Batching, state: EngineState, *seqs: SeqView) -> Plan:
    plan = policy.plan(state)
    views = {one.id: one for one in seqs}
    check_plan(plan, views, state)
    check_batching(plan, views, state, policy, state.free_cells < EVER)
    return plan


def made(name: str, **params: Any) -> Batching:
    """A built-in policy."""
    policy = create(name, params)
    assert isinstance(policy, Batching)
    return policy
