"""Numbers from outcomes: latency percentiles, throughput, goodput under an SLO, fairness, preemptions.

The same functions serve the real engine and the simulator. docs/compare.md says what each number means.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from mullama.workload.base import Outcome
from mullama.workload.fairness import fairness


@dataclass(slots=True, frozen=True)
class Slo:
    """Limits that a good request keeps, in milliseconds; None: no limit.

    A request's own ``slo_ms`` takes the place of ``ttft_ms``. ``itl_ms`` limits the mean gap between its tokens, the
    TPOT of DistServe (Zhong et al., OSDI 2024).
    """

    ttft_ms: float | None = None
    itl_ms: float | None = None
    e2e_ms: float | None = None

    def is_met(self, outcome: Outcome) -> bool:
        """Whether the request was answered within every limit."""
        ttft, gaps = ttft_s(outcome), itl_s(outcome)
        limit = self.ttft_ms if outcome.request.slo_ms is None else outcome.request.slo_ms
        if outcome.error is not None or ttft is None:
            return False
        return (
            _within(ttft, limit)
            and (not gaps or _within(fmean(gaps), self.itl_ms))
            and _within(outcome.finished_s - outcome.request.at_s, self.e2e_ms)
        )

    def limits_anything(self, outcomes: Iterable[Outcome]) -> bool:
        general = (self.ttft_ms, self.itl_ms, self.e2e_ms)
        return general != (None, None, None) or any(outcome.request.slo_ms is not None for outcome in outcomes)


@dataclass(slots=True, frozen=True)
class Percentiles:
    """Of a latency, in milliseconds; all None without any sample."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


@dataclass(slots=True, frozen=True)
class Metrics:
    """What a set of outcomes comes to. Rates are over ``makespan_s``, which is the whole run's for a part of it too."""

    requests: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    makespan_s: float
    tokens_per_s: float  # output tokens
    requests_per_s: float
    ttft_ms: Percentiles
    itl_ms: Percentiles
    e2e_ms: Percentiles
    goodput_per_s: float | None = None  # requests that kept the SLO; None without an SLO
    goodput_share: float | None = None  # of all requests
    fairness: float | None = None  # Jain's index over users; None with fewer than two that compete
    groups: dict[str, Metrics] = field(default_factory=dict)  # empty when there is only one
    users: dict[str, Metrics] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ttft_s(outcome: Outcome) -> float | None:
    """Seconds from arrival to the first token; None when it has none or failed."""
    return outcome.token_s[0] - outcome.request.at_s if outcome.token_s and outcome.error is None else None


def itl_s(outcome: Outcome) -> list[float]:
    """Gaps between successive tokens, in seconds; 0 for tokens that came together."""
    return [later - earlier for earlier, later in itertools.pairwise(outcome.token_s)]


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0 to 100), interpolated linearly between ranks; None when empty."""
    if not values:
        return None
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def measure(outcomes: Sequence[Outcome], slo: Slo | None = None, *, stop_s: float | None = None) -> Metrics:
    """The metrics of one run, with its groups and users.

    The makespan lasts from 0 to the end of the last request. With ``stop_s`` (see Workload) it ends there, and tokens
    and finishes after it are not counted in rates.
    """
    span = stop_s if stop_s is not None else max((outcome.finished_s for outcome in outcomes), default=0.0)
    slo = slo or Slo()
    whole = _measure(outcomes, slo, span)
    groups, users = defaultdict(list), defaultdict(list)
    for outcome in outcomes:
        groups[outcome.request.group].append(outcome)
        users[outcome.request.user or ""].append(outcome)
    return Metrics(
        **{name: getattr(whole, name) for name in Metrics.__slots__ if name not in ("groups", "users", "fairness")},
        fairness=fairness(outcomes),
        groups=_split(groups, slo, span),
        users=_split(users, slo, span),
    )


def _split(parts: Mapping[str, list[Outcome]], slo: Slo, span: float) -> dict[str, Metrics]:
    return {name: _measure(parts[name], slo, span) for name in sorted(parts)} if len(parts) > 1 else {}


def _measure(outcomes: Sequence[Outcome], slo: Slo, span: float) -> Metrics:
    answered = [outcome for outcome in outcomes if outcome.error is None]
    output = sum(1 for outcome in outcomes for at_s in outcome.token_s if at_s <= span)
    done = sum(1 for outcome in answered if outcome.finished_s <= span)
    good = good_share = None
    if slo.limits_anything(outcomes):
        kept = [outcome for outcome in answered if slo.is_met(outcome)]
        good = _rate(sum(1 for outcome in kept if outcome.finished_s <= span), span)
        good_share = len(kept) / len(outcomes)
    ttfts = [ttft for outcome in answered if (ttft := ttft_s(outcome)) is not None]
    return Metrics(
        requests=len(outcomes),
        failed=len(outcomes) - len(answered),
        prompt_tokens=sum(outcome.request.prompt_tokens for outcome in outcomes),
        cached_tokens=sum(outcome.cached_tokens for outcome in outcomes),
        output_tokens=output,
        preemptions=sum(outcome.preemptions for outcome in outcomes),
        makespan_s=span,
        tokens_per_s=_rate(output, span),
        requests_per_s=_rate(done, span),
        ttft_ms=_percentiles(ttfts),
        itl_ms=_percentiles([gap for outcome in answered for gap in itl_s(outcome)]),
        e2e_ms=_percentiles([outcome.finished_s - outcome.request.at_s for outcome in answered]),
        goodput_per_s=good,
        goodput_share=good_share,
    )


def _percentiles(seconds: list[float]) -> Percentiles:
    if not seconds:
        return Percentiles()
    p50, p90, p99 = (percentile(seconds, q) or 0.0 for q in (50, 90, 99))
    return Percentiles(fmean(seconds) * 1e3, p50 * 1e3, p90 * 1e3, p99 * 1e3)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _within(seconds: float, limit_ms: float | None) -> bool:
    return limit_ms is None or seconds * 1e3 <= limit_ms


def median_of(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of ``Metrics.to_dict()`` of several rounds, each number's median; None where no round has it."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in rounds for key in one):
        values = [one[key] for one in rounds if one.get(key) is not None]
        if values and isinstance(values[0], Mapping):
            merged[key] = median_of(values)
        else:
            merged[key] = median(values) if values else None
    return merged
