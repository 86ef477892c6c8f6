"""A cost measured at the points of a grid, and anything between and beyond them."""

from __future__ import annotations

import bisect
import itertools
import math

import msgspec


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``ns[i][j]`` was measured at ``x[i]``, ``y[j]``; both axes ascend.

    Interpolated linearly on both axes. Below the first point of an axis the first one counts; beyond the last, the
    last interval goes on, but never downwards.
    """

    x: list[float]
    y: list[float]
    ns: list[list[float]]

    def __post_init__(self) -> None:
        for name, axis in (("x", self.x), ("y", self.y)):
            if not axis or axis[0] < 0 or not all(math.isfinite(value) for value in axis):
                raise ValueError(f"the axis {name} needs finite numbers, none below 0")
            if any(b <= a for a, b in itertools.pairwise(axis)):
                raise ValueError(f"the axis {name} must ascend")
        if len(self.ns) != len(self.x) or any(len(row) != len(self.y) for row in self.ns):
            raise ValueError(f"ns must have {len(self.x)} rows of {len(self.y)} costs, as the axes x and y have values")
        if not all(math.isfinite(cost) and cost >= 0 for row in self.ns for cost in row):
            raise ValueError("costs must be finite and not below 0")

    def at(self, x: float, y: float) -> float:
        """The cost at a point, in ns."""
        i, t = _place(self.x, x)
        if t == 0.0:
            return self._along(i, y)
        low, high = self._along(i, y), self._along(i + 1, y)
        return _between(low, high, t)

    def _along(self, i: int, y: float) -> float:
        j, t = _place(self.y, y)
        row = self.ns[i]
        return row[j] if t == 0.0 else _between(row[j], row[j + 1], t)


def _place(axis: list[float], value: float) -> tuple[int, float]:
    """The interval a value belongs to, and how far along it is: above 1 beyond the last point."""
    if value <= axis[0] or len(axis) == 1:
        return 0, 0.0
    i = min(bisect.bisect_right(axis, value) - 1, len(axis) - 2)
    return i, (value - axis[i]) / (axis[i + 1] - axis[i])


def _between(low: float, high: float, t: float) -> float:
    if t > 1.0:
        return high + max(high - low, 0.0) * (t - 1.0)
    return low * (1.0 - t) + high * t
