"""Keeping a step within the KV budget: who is left out, who is preempted. Sans-I/O.

A request that fits alone never fails. When all cells are used, retained prefixes go first (the caller evicts them),
then admissions wait, then the newest of the least urgent running sequences loses its slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mullama.scheduling.base import Plan, SeqView
from mullama.types import SeqState

HEADROOM = 32  # tokens that each running sequence can go on for when another one is let in
PRESSURE_STEPS = 64  # steps that eviction under KV pressure makes room for


@dataclass(slots=True)
class Fitted:
    """``plan`` cut to the budget; ``preempt`` in the order of eviction; ``cells`` it needs on top of the used ones."""

    plan: Plan
    preempt: list[int] = field(default_factory=list)
    cells: int = 0

    @property
    def wanted(self) -> int:
        """Free cells that it should find, so that it need not be cut again soon."""
        return self.cells + max(len(self.plan.tokens), 1) * PRESSURE_STEPS

    def steps(self, free: int) -> int:
        """How often it may be repeated with so many free cells."""
        steps = max(1, free // max(len(self.plan.tokens), 1))
        return min(self.plan.repeat, steps) if self.plan.repeat else steps


def fit(plan: Plan, views: Mapping[int, SeqView], budget: int) -> Fitted:
    """Cut ``plan`` so that running sequences and what it adds need at most ``budget`` tokens of KV.

    Sequences that ``plan`` preempts hold nothing any more.
    """
    running = {i: view for i, view in views.items() if view.is_running and i not in plan.preempt}
    used = sum(view.cells for view in running.values())
    tokens = dict(plan.tokens)
    victims: list[int] = []
    growth = sum(n for i, n in tokens.items() if i in running)
    # The newest of the least urgent goes first; the last one always fits.
    order = sorted(running.values(), key=lambda view: (-view.priority, -view.arrival_ns, -view.id))
    for view in order[:-1]:
        if used + growth <= budget:
            break
        victims.append(view.id)
        used -= view.cells
        growth -= tokens.pop(view.id, 0)
        del running[view.id]
    admitted = 0
    for seq_id in [i for i in tokens if i not in running]:
        view = views[seq_id]
        needs = view.prompt_tokens if view.state is SeqState.WAITING else view.cells + view.prefill_left + 1
        reserve = HEADROOM * (len(running) + admitted)
        fits = used + growth + needs + reserve <= budget
        if victims or not (fits or (not running and not admitted)):
            del tokens[seq_id]
            continue
        admitted += 1
        growth += needs
    return Fitted(Plan(tokens, plan.repeat, dict(plan.preempt), plan.until_ns), victims, growth)


def fit_or_go_on(plan: Plan, views: Mapping[int, SeqView], budget: int, n_batch: int) -> Fitted:
    """``fit``, and its plan preempts in the ways that the requests wish.

    Where all is paused for somebody who does not fit beside them, they go on, or nobody ever would.
    """
    fitted = fit(plan, views, budget)
    if plan.tokens and not fitted.plan.tokens and not fitted.preempt:
        going = {
            view.id: max(min(view.prefill_left, n_batch), 1)
            for view in views.values()
            if view.is_running and view.id not in plan.preempt
        }
        fitted = fit(replace(plan, tokens=going), views, budget)
    for handle in fitted.preempt:
        fitted.plan.preempt[handle] = views[handle].preempt
    return fitted
