"""The scans of a row of logits, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama._core.testing.gate import scan

INF, NAN = math.inf, math.nan

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)
few = st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.0, -INF])  # ties and -inf
rows = st.integers(1, 300).flatmap(lambda n: st.lists(st.one_of(floats, few), min_size=n, max_size=n))


@settings(max_examples=150, deadline=None)
@given(rows)
def test_argmax_is_numpys(row: list[float]) -> None:
    values = np.array(row, np.float32)
    expected = None if np.isneginf(values).all() else int(np.argmax(values))
    assert scan(row) == expected


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(1, 320))
def test_top_k_is_numpys(row: list[float], k: int) -> None:
    values = np.array(row, np.float32)
    found = scan(row, k)
    if np.isneginf(values).all():
        assert found is None
        return
    assert found is not None
    assert len(set(found)) == len(found) == min(k, len(row))
    # Ids among equals may come in any order, so values are compared.
    assert values[found].tolist() == sorted(values.tolist(), reverse=True)[:k]


@settings(max_examples=100, deadline=None)
@given(rows, st.sampled_from([NAN, INF, -NAN]), st.integers(0, 10_000), st.integers(0, 40))
def test_one_bad_value_anywhere_is_found(row: list[float], bad: float, at: int, k: int) -> None:
    row[at % len(row)] = bad
    assert scan(row, k) is None


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 290, 1000])
@pytest.mark.parametrize("at", [0, 0.5, 1.0])
def test_around_the_block_size(n: int, at: float) -> None:
    row = np.linspace(-5, -1, n, dtype=np.float32)
    best = int(at * (n - 1))
    row[best] = 7.0
    assert scan(row.tolist()) == best
    assert scan(row.tolist(), 3)[0] == best
    row[best] = NAN
    assert scan(row.tolist()) is None and scan(row.tolist(), 3) is None


def test_minus_infinity_means_banned() -> None:
    row = [-INF] * 100
    assert scan(row) is None and scan(row, 5) is None
    row[70] = -1e30
    assert scan(row) == 70 and scan(row, 5)[0] == 70


def test_the_first_of_equals() -> None:
    assert scan([1.0] * 200) == 0
    assert scan([0.0] * 100 + [1.0] * 100) == 100


def test_nothing() -> None:
    assert scan([]) is None and scan([], 5) is None
