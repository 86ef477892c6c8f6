"""Metrics against examples computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.workload.base import Outcome, TraceRequest
from mullama.workload.fairness import fairness, jain
from mullama.workload.metrics import Slo, measure, median_of, percentile


def outcome(index: int, at_s: float, tokens: tuple[float, ...], **fields: Any) -> Outcome:
    request_fields = {k: fields.pop(k) for k in ("user", "group", "slo_ms", "priority") if k in fields}
    request = TraceRequest(at_s, fields.pop("prompt", 10), len(tokens) or 1, **request_fields)
    return Outcome(index, request, tokens, fields.pop("finished_s", tokens[-1] if tokens else at_s), **fields)


RUN = [
    outcome(0, 0.0, (0.5, 0.75, 1.0), group="batch", user="a", cached_tokens=4),
    outcome(1, 1.0, (1.25, 2.0), group="urgent", user="b", preemptions=2, finished_s=2.5),
    outcome(2, 1.5, (), group="batch", user="a", error="queue full", finished_s=1.5),
]


def test_a_run_by_hand() -> None:
    metrics = measure(RUN)
    assert (metrics.requests, metrics.failed, metrics.preemptions, metrics.cached_tokens) == (3, 1, 2, 4)
    assert (metrics.prompt_tokens, metrics.output_tokens, metrics.makespan_s) == (30, 5, 2.5)
    assert metrics.tokens_per_s == pytest.approx(2.0)
    assert metrics.requests_per_s == pytest.approx(0.8)
    ttft = metrics.ttft_ms  # 500 and 250
    assert (ttft.mean, ttft.p50, ttft.p90, ttft.p99) == pytest.approx((375, 375, 475, 497.5))
    itl = metrics.itl_ms  # 250, 250, 750
    assert (itl.mean, itl.p50, itl.p90, itl.p99) == pytest.approx((1250 / 3, 250, 650, 740))
    e2e = metrics.e2e_ms  # 1000, 1500
    assert (e2e.p50, e2e.p90) == pytest.approx((1250, 1450))
    assert metrics.goodput_per_s is None
    assert metrics.goodput_share is None


def test_parts_have_the_time_of_the_whole() -> None:
    metrics = measure(RUN)
    assert list(metrics.groups) == ["batch", "urgent"]
    assert list(metrics.users) == ["a", "b"]
    assert metrics.groups["batch"].tokens_per_s == pytest.approx(3 / 2.5)
    assert metrics.groups["batch"].failed == 1
    assert metrics.groups["urgent"].ttft_ms.p50 == pytest.approx(250)
    assert metrics.groups["urgent"].groups == {}
    assert measure(RUN[:1]).groups == {}


def test_what_comes_after_the_stop_does_not_count_in_rates() -> None:
    metrics = measure(RUN, Slo(ttft_ms=600), stop_s=1.25)
    assert metrics.output_tokens == 4
    assert metrics.tokens_per_s == pytest.approx(3.2)
    assert metrics.requests_per_s == pytest.approx(0.8)  # one of the two
    assert metrics.goodput_per_s == pytest.approx(0.8)
    assert metrics.goodput_share == pytest.approx(2 / 3)
    assert metrics.e2e_ms.p50 == pytest.approx(1250)  # latencies are whole


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_ms=500), 2),
        (Slo(ttft_ms=499), 1),
        (Slo(itl_ms=250), 1),
        (Slo(itl_ms=750), 2),
        (Slo(e2e_ms=1000), 1),
        (Slo(ttft_ms=499, e2e_ms=1000), 0),
    ],
)
def test_goodput(slo: Slo, good: int) -> None:
    metrics = measure(RUN, slo)
    assert metrics.goodput_share == pytest.approx(good / 3)
    assert metrics.goodput_per_s == pytest.approx(good / 2.5)


def test_a_requests_own_slo_comes_first() -> None:
    run = [outcome(0, 0.0, (0.5,), slo_ms=400.0), outcome(1, 0.0, (0.5,))]
    assert measure(run).goodput_share == pytest.approx(0.5)
    assert measure(run, Slo(ttft_ms=100)).goodput_share == 0.0
    assert measure(run, Slo(ttft_ms=600)).goodput_share == pytest.approx(0.5)


def test_nothing_at_all() -> None:
    metrics = measure([])
    assert (metrics.requests, metrics.tokens_per_s, metrics.ttft_ms.p50, metrics.fairness) == (0, 0.0, None, None)


# -- percentiles ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    numpy = pytest.importorskip("numpy")
    assert percentile(values, q) == pytest.approx(float(numpy.percentile(values, q)), rel=1e-9, abs=1e-6)


# -- fairness ------------------------------------------------------------------------------------------------


def test_jain() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([1, 3]) == pytest.approx(16 / 20)
    assert jain([5]) is None
    assert jain([0, 0]) is None


def test_fairness_by_hand() -> None:
    # Both compete from 1 to 3. There a has 2 tokens, of which none is its first: 4. b has its prompt of 4 and 2
    # tokens: 8. Rates 2 and 4 a second: 36 / (2 * 20).
    run = [
        outcome(0, 0.0, (0.5, 2.0, 2.5), user="a", finished_s=4.0, prompt=100),
        outcome(1, 1.0, (1.5, 3.0), user="b", prompt=4),
    ]
    assert fairness(run) == pytest.approx(0.9)


def test_fairness_needs_competition() -> None:
    assert fairness([outcome(0, 0.0, (1.0,), user="a"), outcome(1, 2.0, (3.0,), user="b")]) is None
    assert fairness([outcome(0, 0.0, (1.0,), user="a"), outcome(1, 0.0, (3.0,), user="a")]) is None
    assert fairness([outcome(0, 0.0, (1.0,)), outcome(1, 0.0, (3.0,))]) is None


def test_a_starved_user_is_unfair() -> None:
    flood = [outcome(i, 0.0, (i + 1.0, i + 1.5), user="flood", finished_s=i + 1.5) for i in range(10)]
    waits = outcome(10, 0.0, (10.9, 11.0), user="quiet")
    served = outcome(10, 0.0, (0.9, 1.0), user="quiet")
    starved, fair = fairness([*flood, waits]), fairness([*flood, served])
    assert starved is not None
    assert fair is not None
    assert starved < 0.65 < 0.75 < fair


# -- rounds --------------------------------------------------------------------------------------------------


def test_medians_over_rounds() -> None:
    rounds = [
        {"a": 1.0, "b": {"c": 3.0, "d": None}, "e": None},
        {"a": 5.0, "b": {"c": 1.0, "d": 2.0}, "e": None},
        {"a": 2.0, "b": {"c": 2.0, "d": 4.0}, "e": None},
    ]
    assert median_of(rounds) == {"a": 2.0, "b": {"c": 2.0, "d": 3.0}, "e": None}
    assert median_of([{"g": {}}, {"g": {}}]) == {"g": {}}
    one = measure(RUN, Slo(ttft_ms=1)).to_dict()
    assert median_of([one]) == one
