"""The KV budget: what a plan may add, and who gives way."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.scheduling import Plan, SeqView, kv_budget
from mullama.types import Preempt, SeqState


def view(i: int, state: SeqState, cells: int = 0, *, left: int = 0, priority: int = 0) -> SeqView:
    return SeqView(i, state, prompt_tokens=left or 10, prefill_left=left, max_tokens=50, arrival_ns=i, cells=cells,
                   priority=priority)  # fmt: skip


def fit(plan: Plan, views: list[SeqView], tokens: int) -> kv_budget.Fitted:
    return kv_budget.fit(plan, {v.id: v for v in views}, tokens)


def test_what_fits_is_left_alone() -> None:
    views = [view(1, SeqState.DECODE, 20), view(2, SeqState.WAITING, left=10)]
    plan = Plan({1: 1, 2: 10}, repeat=3, until_ns=7)
    fitted = fit(plan, views, 100)
    assert fitted.plan == plan
    assert (fitted.preempt, fitted.cells) == ([], 11)


def test_admissions_wait_before_anybody_is_preempted() -> None:
    views = [view(1, SeqState.DECODE, 60), view(2, SeqState.DECODE, 20), view(3, SeqState.WAITING, left=10)]
    fitted = fit(Plan({1: 1, 2: 1, 3: 10}), views, 85)
    assert (fitted.plan.tokens, fitted.preempt) == ({1: 1, 2: 1}, [])


def test_the_newest_of_the_least_urgent_gives_way() -> None:
    views = [
        view(1, SeqState.DECODE, 30, priority=5),
        view(2, SeqState.DECODE, 30, priority=5),
        view(3, SeqState.DECODE, 30),
    ]
    fitted = fit(Plan({1: 1, 2: 1, 3: 1}), views, 92)
    assert fitted.preempt == [2]
    assert fitted.plan.tokens == {1: 1, 3: 1}


def test_the_last_one_is_never_preempted() -> None:
    fitted = fit(Plan({1: 1}), [view(1, SeqState.DECODE, 100)], 100)
    assert fitted.preempt == []
    assert fitted.plan.tokens == {1: 1}


def test_a_request_alone_is_let_in_without_headroom() -> None:
    fitted = fit(Plan({1: 100}), [view(1, SeqState.WAITING, left=100)], 100)
    assert fitted.plan.tokens == {1: 100}


def test_what_the_plan_preempts_makes_room() -> None:
    views = [view(1, SeqState.DECODE, 60), view(2, SeqState.WAITING, left=50)]
    fitted = fit(Plan({2: 50}, preempt={1: Preempt.SWAP}), views, 70)
    assert fitted.plan.tokens == {2: 50}
    assert fitted.plan.preempt == {1: Preempt.SWAP}


def test_a_preempted_sequence_needs_its_cells_back() -> None:
    views = [view(1, SeqState.DECODE, 60), view(2, SeqState.PREEMPTED, 30)]
    assert fit(Plan({1: 1, 2: 1}), views, 100).plan.tokens == {1: 1}
    assert fit(Plan({1: 1, 2: 1}), views, 130).plan.tokens == {1: 1, 2: 1}


states = st.sampled_from([SeqState.WAITING, SeqState.PREFILL, SeqState.DECODE, SeqState.PREEMPTED])


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[SeqView], Plan]:
    views, tokens = [], {}
    for i in range(draw(st.integers(1, 12))):
        state = draw(states)
        running = state in (SeqState.PREFILL, SeqState.DECODE)
        left = 0 if state is SeqState.DECODE else draw(st.integers(1, 40))
        if state is SeqState.PREEMPTED and draw(st.booleans()):
            left = 0
        cells = draw(st.integers(0, 60)) if running or left == 0 else 0
        views.append(view(i, state, cells, left=left, priority=draw(st.integers(0, 3))))
        if draw(st.booleans()):
            tokens[i] = max(1, min(left, draw(st.integers(1, 40)))) if left else 1
    return views, Plan(tokens)


@settings(max_examples=300, deadline=None)
@given(situations(), st.integers(60, 300))
def test_the_budget_holds_and_somebody_always_goes_on(situation: tuple[list[SeqView], Plan], tokens: int) -> None:
    views, plan = situation
    known = {v.id: v for v in views}
    fitted = fit(plan, views, tokens)
    running = [v for v in views if v.is_running]
    left = [v for v in running if v.id not in fitted.preempt]
    used = sum(v.cells for v in left) + fitted.cells
    assert used <= tokens or len(left) + sum(known[i].is_queued for i in fitted.plan.tokens) <= 1
    assert len(left) >= min(len(running), 1)
    assert set(fitted.plan.tokens) <= set(plan.tokens) - set(fitted.preempt)
    assert all(fitted.plan.tokens[i] == plan.tokens[i] for i in fitted.plan.tokens)
    if fitted.preempt:
        assert all(known[i].is_running for i in fitted.plan.tokens), "nobody is let in while others are put out"
    if plan.tokens and not running:
        assert fitted.plan.tokens, "an empty engine takes in what fits alone"
