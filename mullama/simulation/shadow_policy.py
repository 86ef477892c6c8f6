"""A second policy on the engine's states: where would it have decided differently, and what would have come of it?

Sans-I/O. It works on views of its own, so the engine may send copies (``copy_view``) as messages to whatever thread
runs it, in the order in which things happen. Whatever the shadow does, the engine is not disturbed: one that raises or
returns nonsense is switched off, and the reason kept.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mullama.errors import MullamaError, PluginError
from mullama.logs import said
from mullama.plugins.groups import is_fault, publish
from mullama.scheduling import Costs, EngineState, Plan, Scheduler, SeqView, check_plan, own_plan
from mullama.simulation.cost_model.costs import CostModel
from mullama.simulation.differences import differences
from mullama.simulation.feed import SECOND
from mullama.simulation.records import Override, SimConfig
from mullama.simulation.simulated_engine import simulate
from mullama.workload.base import TraceRequest, Workload
from mullama.workload.metrics import percentile, ttft_s

KEPT = 50  # differences that a snapshot shows

Make = Callable[[], Scheduler]  # a new policy, for a simulation


@dataclass(slots=True, frozen=True)
class Finished:
    """A request that the engine has answered, as the window of ``predict`` holds it."""

    arrival_ns: int
    prompt_tokens: int
    generated: int
    cached_tokens: int = 0
    max_tokens: int = 0  # what it allowed; 0: what it generated
    priority: int = 0
    user: str | None = None
    slo_ms: float | None = None
    ttft_ms: float | None = None  # as it was measured


def copy_view(view: SeqView) -> SeqView:
    """A copy that may leave the engine thread."""
    return copy.copy(view)


class ShadowPolicy:
    """``policy`` is the shadow's own; nobody else may call it."""

    def __init__(self, policy: Scheduler, name: str) -> None:
        self.name = name
        self.off: str | None = None  # why it was switched off
        self._policy = policy
        self._params = publish(policy, "scheduler", name).params
        self._views: dict[int, SeqView] = {}
        self._observed = 0
        self._differed = 0
        self._kinds: Counter[str] = Counter()
        self._recent: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._predicted: dict[str, Any] | None = None

    # -- what happens in the engine, in order -------------------------------------------------------------------

    def add(self, view: SeqView) -> None:
        """A request arrived, or was there when the shadow came."""
        own = self._views[view.id] = copy_view(view)
        if self.off is None:
            self._try("add", lambda: self._policy.add(own))

    def remove(self, seq_id: int) -> None:
        """It ended. Harmless for one that is not known."""
        if self._views.pop(seq_id, None) is not None and self.off is None:
            self._try("remove", lambda: self._policy.remove(seq_id))

    def update(self, views: Iterable[SeqView]) -> None:
        """Bring its own views up to date with these; unknown ones are left out."""
        for view in views:
            own = self._views.get(view.id)
            if own is not None:
                for name in _FIELDS:
                    setattr(own, name, getattr(view, name))

    def observe(self, state: EngineState, acted: Plan, views: Iterable[SeqView] = ()) -> None:
        """The engine acted on ``acted`` in ``state``, when its sequences were as in ``views``.

        Give the views, or call ``update`` before; those that did not change may be left out.
        """
        self.update(views)
        if self.off is not None:
            return
        plan = self._try("plan", lambda: own_plan(self._policy.plan(state)))
        if self.off is not None:
            return
        try:
            check_plan(plan, self._views, state)
        except PluginError as error:
            self.off = error.message
            return
        self._observed += 1
        found = differences(acted, plan, self._views)
        if found:
            self._differed += 1
            self._kinds.update(kind for kind, _ in found)
            self._recent.append({"step": state.step, "now_ns": state.now_ns, "what": [text for _, text in found]})

    def _try(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except PluginError as error:
            self.off = error.message
        except BaseException as error:
            if not is_fault(error):
                raise
            self.off = f"{what}() raised {said(error)}"
        return None

    # -- what would have come of it -------------------------------------------------------------------------------

    def predict(
        self,
        window: Sequence[Finished],
        active: Make,
        shadow: Make,
        costs: CostModel | Costs,
        config: SimConfig,
    ) -> dict[str, Any]:
        """Simulate the requests of ``window`` under a new active policy and a new shadow; also kept for ``snapshot``.

        TTFT percentiles in ms, ``measured``, ``active`` and ``shadow`` side by side: what the simulator gets wrong in
        the active one it gets wrong in the shadow as well. A policy that cannot be simulated has an ``error`` instead.
        ``costs``: of this machine, or the engine's running averages. Takes some 0.2 ms a request and policy.
        """
        measured = [one.ttft_ms for one in window if one.ttft_ms is not None]
        found: dict[str, Any] = {"requests": len(window), "measured": _ttft(measured)}
        workload, overrides = replayed(window)
        model = costs if isinstance(costs, CostModel) else _flat(costs)
        for name, make in (("active", active), ("shadow", shadow)):
            if not window or model is None:
                found[name] = _ttft([])
                continue
            try:
                outcomes = simulate(workload, make(), model, config, overrides).outcomes
                found[name] = _ttft([ttft * 1e3 for one in outcomes if (ttft := ttft_s(one)) is not None])
            except BaseException as error:
                if not is_fault(error):
                    raise
                found[name] = {"error": error.message if isinstance(error, MullamaError) else said(error)}
        self._predicted = found
        return found

    def snapshot(self) -> dict[str, Any]:
        """For ``GET /internal/scheduler``: counts, the last differences, the last prediction. Calls no policy."""
        return {
            "policy": self.name,
            "params": dict(self._params),
            "off": self.off,
            "observed": self._observed,
            "differed": self._differed,
            "kinds": dict(self._kinds),
            "recent": list(self._recent),
            "ttft_ms": self._predicted,
        }


_FIELDS = tuple(field.name for field in fields(SeqView))


def replayed(window: Sequence[Finished]) -> tuple[Workload, dict[int, Override]]:
    """The window as a workload that begins with its first arrival."""
    order = sorted(window, key=lambda one: one.arrival_ns)
    start = order[0].arrival_ns if order else 0
    requests = []
    overrides = {}
    for index, one in enumerate(order):
        tokens = max(one.generated, 1)
        requests.append(
            TraceRequest(
                (one.arrival_ns - start) / SECOND,
                max(one.prompt_tokens, 1),
                tokens,
                priority=one.priority,
                user=one.user,
                slo_ms=one.slo_ms,
            )
        )
        overrides[index] = Override(one.cached_tokens, max(one.max_tokens, tokens))
    return Workload(requests=tuple(requests)), overrides


def _flat(costs: Costs) -> CostModel | None:
    """None: the engine has not measured anything yet."""
    if not (costs.prefill_token_ns or costs.decode_step_ns):
        return None
    return CostModel.flat(
        prefill_token_ns=costs.prefill_token_ns or costs.decode_step_ns,
        decode_step_ns=costs.decode_step_ns,
        swap_token_ns=costs.swap_token_ns,
    )


def _ttft(values: Sequence[float]) -> dict[str, float | None]:
    shown = {f"p{q}": percentile(values, q) for q in (50, 90, 99)}
    return {name: None if value is None else round(value, 3) for name, value in shown.items()}
