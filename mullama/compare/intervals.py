"""What several seeds say together: means with their intervals, and how far policies are apart on the same workloads.

A seed is one sample: requests of one workload wait for each other, so that their number says nothing. The intervals are
Student's t over the seeds; ratios are paired by seed, of logarithms, since times are apart by factors.
``report.py`` names the method in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

#: 0.975 quantiles of Student's t with 1, 2, … degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_quantile(freedom: int) -> float:
    """For a two-sided interval of 95 %, to three digits; beyond 30 degrees by the expansion of Cornish and Fisher."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval. ValueError for fewer than two values."""
    if len(values) < 2:
        raise ValueError("an interval takes two values at least")
    mean = fmean(values)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def intervals_of(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of ``Metrics.to_dict()`` of several seeds, each number's ``mean``, ``low``, ``high``, ``min`` and ``max``.

    None where fewer than two seeds have it. No number of these is below 0, so neither is ``low``.
    """
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in seeds for key in one):
        values = [one[key] for one in seeds if one.get(key) is not None]
        if values and isinstance(values[0], Mapping):
            merged[key] = intervals_of(values)
        elif len(values) < 2:
            merged[key] = None
        else:
            mean, low, high = interval(values)
            merged[key] = {"mean": mean, "low": max(low, 0.0), "high": high, "min": min(values), "max": max(values)}
    return merged


def ratio(values: Sequence[float | None], others: Sequence[float | None]) -> dict[str, float] | None:
    """How many times ``others`` ``values`` are, pair by pair: geometric mean and its interval; None where that is not
    defined: fewer than two pairs, or a number that is not above 0."""
    logs = []
    for value, other in zip(values, others, strict=True):
        if value is None or other is None or value <= 0 or other <= 0:
            return None
        logs.append(math.log(value / other))
    if len(logs) < 2:
        return None
    found = [math.exp(log) for log in interval(logs)]
    return dict(zip(("ratio", "low", "high"), found, strict=True))
