"""The policy in charge: asked for plans, watched, changed live, replaced by fcfs when it is broken.

A built-in policy runs on the engine thread. A user's runs on a planner thread: the engine waits for it only while it
has nothing else to do, and never longer than the time limit; meanwhile it repeats the last valid plan.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mullama.engine.planning.planner import Planner
from mullama.errors import PluginError
from mullama.logs import said
from mullama.plugins.fallback import replaced
from mullama.plugins.groups import Published, publish
from mullama.scheduling import EngineState, Fcfs, Plan, Scheduler, SeqView, check_plan
from mullama.scheduling.base import Progress
from mullama.types import SeqState

if TYPE_CHECKING:
    from mullama.engine.planning.shadow import Shadow
    from mullama.engine.requests.sequences import LiveSequence

log = logging.getLogger("mullama.engine")

GRACE_S = 0.002  # how long the engine waits for a user's plan while it could repeat the last one
WINDOW = 1024  # plans that the statistics look back on


@dataclass(slots=True)
class PlanStats:
    """What planning cost; times in ns."""

    plans: int = 0
    total_ns: int = 0
    repeated: int = 0  # steps that repeated a plan because the policy was still thinking
    changes: int = 0  # of the policy in charge


class PolicyHost:
    """Engine thread only, except ``snapshot``."""

    def __init__(
        self, policy: Scheduler, spec: str, *, own_thread: bool, timeout_ms: float, facts: Published | None = None
    ) -> None:
        """Raises PluginError for a policy that cannot be shown."""
        self.views: Mapping[int, SeqView] = {}  # the engine's sequences; it sets them once
        self.shadow: Shadow | None = None  # a policy that is asked as well and decides nothing
        self.stats = PlanStats()
        self.fallback: dict[str, Any] | None = None
        self.last_plan = Plan()
        self._timeout_ns = int(timeout_ms * 1e6)
        self._recent: deque[tuple[int, int]] = deque(maxlen=WINDOW)  # (when, ns)
        self._planner: Planner | None = None
        self._install(policy, spec, own_thread, facts or publish(policy, "scheduler", spec))

    def _install(self, policy: Scheduler, spec: str, own_thread: bool, facts: Published) -> None:
        self.policy = policy
        self._facts = facts
        self.spec = spec
        self._asked: tuple[EngineState, int] | None = None
        self._version = 0  # of what the policy was told
        self._progress = Progress()
        self._planner = Planner(policy, spec) if own_thread else None

    @property
    def name(self) -> str:
        """What the policy called itself when it was installed. Any thread."""
        return self._facts.name

    def close(self) -> None:
        """End the threads of the policy and of the shadow."""
        self._leave()
        if self.shadow is not None:
            self.shadow.close()
            self.shadow = None

    def _leave(self) -> None:
        if self._planner is not None:
            self._planner.close()
            self._planner = None

    def set_shadow(self, shadow: Shadow | None) -> Shadow | None:
        """Run another shadow, or none. Returns the one before, for the caller to close."""
        if shadow is not None:
            for view in self.views.values():
                shadow.add(view)
        old, self.shadow = self.shadow, shadow
        return old

    def change(self, policy: Scheduler, spec: str, *, own_thread: bool, facts: Published | None = None) -> int:
        """Put another policy in charge from the next plan on. Returns the number of sequences handed over.

        ``facts`` is what it says of itself: a user's is asked elsewhere. Raises PluginError; then the one before stays.
        """
        facts = facts or publish(policy, "scheduler", spec)
        self._leave()
        self._install(policy, spec, own_thread, facts)
        self.fallback = None
        self.stats.changes += 1
        return self._hand_over()

    def _hand_over(self) -> int:
        for view in sorted(self.views.values(), key=lambda view: (view.arrival_ns, view.id)):
            self._tell("add", view)
        return len(self.views)

    def arrived(self, view: SeqView) -> None:
        """A new sequence, which is in ``views`` already."""
        self._tell("add", view)
        if self.shadow is not None:
            self.shadow.add(view)

    def ended(self, seq: LiveSequence) -> None:
        """A sequence ended, and is in ``views`` no longer."""
        self._tell("remove", seq.view.id)
        if self.shadow is not None:
            self.shadow.remove(seq)

    def _tell(self, what: str, value: Any) -> None:
        self._version += 1
        try:
            getattr(self._planner or self.policy, what)(value)
        except BaseException as error:
            self._fall_back(f"{what}() raised {said(error)}", error)

    # -- plans --------------------------------------------------------------------------------------------

    def plan(self, state: EngineState) -> Plan:
        """A plan that the engine can carry out, whatever the policy does. Counted."""
        start = time.monotonic_ns()
        plan = self._checked(state)
        spent = time.monotonic_ns() - start
        self.stats.plans += 1
        self.stats.total_ns += spent
        self._recent.append((start, spent))
        self.last_plan = plan
        if self.shadow is not None:
            self.shadow.observe(state, plan, self.views, self.spec, self.params())
        return plan

    def _checked(self, state: EngineState) -> Plan:
        while True:
            try:
                plan = self._ask_planner(state) if self._planner is not None else self.policy.plan(state)
                if not isinstance(plan, Plan):
                    raise PluginError(f"plan() returned {type(plan).__name__}, not a Plan")
                check_plan(plan, self.views, state)
                self._progress.check(plan, state.now_ns, len(self.views))
                return plan
            except BaseException as error:
                if type(self.policy) is Fcfs and self._planner is None:
                    raise  # the last resort itself: a bug of the engine
                if isinstance(error, PluginError):
                    self._fall_back(error.message, error.__cause__)
                else:
                    self._fall_back(f"plan() raised {said(error)}", error)

    def _fall_back(self, reason: str, error: BaseException | None = None) -> None:
        fallback = replaced(log, "scheduler", self.spec, Fcfs.name, reason, error)
        self._leave()
        self._install(Fcfs(), Fcfs.name, False, Published(Fcfs.name, {}))
        self.fallback = fallback
        self._hand_over()

    # -- a policy that thinks elsewhere ------------------------------------------------------------------------

    def _ask_planner(self, state: EngineState) -> Plan:
        """Its answer, or the last plan once more while it thinks. Raises PluginError when it takes too long."""
        planner = self._planner
        assert planner is not None
        while True:
            if not planner.asked_ns:
                planner.ask(state, self.views.values())
                self._asked = state, self._version
            again = Plan(_left_of(self.last_plan.tokens, self.views, queued=False), repeat=1)
            now = time.monotonic_ns()
            left_s = max(planner.asked_ns + self._timeout_ns - now, 0) / 1e9
            answer = planner.answer(min(left_s, GRACE_S) if again.tokens else left_s)
            if answer is None:
                if time.monotonic_ns() >= planner.asked_ns + self._timeout_ns:
                    raise PluginError(f"plan() gave no answer within {self._timeout_ns / 1e6:g} ms")
                if again.tokens:
                    self.stats.repeated += 1
                    return again
                continue
            if isinstance(answer, str):
                raise PluginError(answer)
            assert self._asked is not None
            asked, version = self._asked
            if asked is state and version == self._version:
                return answer
            # It was asked some steps ago. What was valid then and has been overtaken is no fault of the policy's.
            late = dataclasses.replace(_still_valid(answer, self.views), repeat=1)
            try:
                check_plan(late, self.views, state)
            except PluginError:
                continue
            if late.tokens:
                return late

    # -- seen from outside -----------------------------------------------------------------------------------

    def params(self) -> dict[str, Any]:
        """The policy's parameters as it published them. Any thread; runs none of its code."""
        planner = self._planner
        newer = planner.published if planner is not None else None
        return dict((newer or self._facts).params)

    def republish(self) -> None:
        """A built-in policy's parameters have changed."""
        self._facts = publish(self.policy, "scheduler", self.spec)

    def plan_times(self) -> dict[str, float | None]:
        """Percentiles of the last plans in ms, and plans a second over them."""
        recent = list(self._recent)
        if not recent:
            return {"p50_ms": None, "p99_ms": None, "max_ms": None, "per_second": 0.0}
        times = sorted(ns for _, ns in recent)
        span_s = (time.monotonic_ns() - recent[0][0]) / 1e9
        return {
            "p50_ms": round(times[len(times) // 2] / 1e6, 4),
            "p99_ms": round(times[min(int(len(times) * 0.99), len(times) - 1)] / 1e6, 4),
            "max_ms": round(times[-1] / 1e6, 4),
            "per_second": round(len(recent) / span_s, 3) if span_s > 0 else 0.0,
        }


def _left_of(tokens: Mapping[int, int], views: Mapping[int, SeqView], *, queued: bool) -> dict[int, int]:
    """What sequences can still take of a plan made some steps ago; ``queued``: also those without a slot."""
    found = {}
    for seq_id, n in tokens.items():
        view = views.get(seq_id)
        if view is not None and (view.is_running or queued):
            found[seq_id] = 1 if view.state is SeqState.DECODE or view.prefill_left == 0 else min(n, view.prefill_left)
    return found


def _still_valid(plan: Plan, views: Mapping[int, SeqView]) -> Plan:
    """A plan made some steps ago, without what has ended or moved on since."""
    tokens = _left_of(plan.tokens, views, queued=True)
    preempt = {i: how for i, how in plan.preempt.items() if i in views and views[i].is_running and i not in tokens}
    return Plan(tokens, preempt=preempt, until_ns=plan.until_ns)
