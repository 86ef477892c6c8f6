"""Rates and recovery times from arrival times."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import disturbance, servers

S = 1_000_000_000


def ticks(begin_s: float, end_s: float, rate: float) -> list[int]:
    n = round((end_s - begin_s) * rate)
    return [round((begin_s + i / rate) * S) for i in range(n)]


def test_rate_counts_arrivals_of_the_half_open_interval() -> None:
    arrivals = ticks(0, 10, 100)
    assert disturbance.rate_between(arrivals, 2 * S, 4 * S) == 100
    assert disturbance.rate_between(arrivals, 10 * S, 12 * S) == 0


def test_recovery_is_the_begin_of_the_first_lasting_full_window() -> None:
    arrivals = [*ticks(0, 5, 100), *ticks(5, 6.5, 40), *ticks(6.5, 12, 100)]
    recovered = disturbance.recovery_s(arrivals, 5 * S, 100, 12 * S)
    assert recovered is not None
    assert 1.3 <= recovered <= 1.6


def test_no_recovery_is_none_and_full_speed_is_zero() -> None:
    assert disturbance.recovery_s(ticks(0, 12, 40), 5 * S, 100, 12 * S) is None
    assert disturbance.recovery_s(ticks(0, 12, 100), 5 * S, 100, 12 * S) == 0


def test_one_lucky_window_is_not_recovery() -> None:
    arrivals = [*ticks(0, 5, 100), *ticks(5, 5.5, 100), *ticks(5.5, 12, 20)]
    assert disturbance.recovery_s(arrivals, 5 * S, 100, 12 * S) is None


def test_gaps_belong_to_the_interval_of_their_later_token() -> None:
    streams = [[0, 10_000_000, 40_000_000], [5_000_000, 45_000_000]]
    assert sorted(disturbance.gaps_within(streams, 20_000_000, 50_000_000)) == [30.0, 40.0]


def test_long_text_has_the_asked_length_and_depends_on_the_seed() -> None:
    assert len(disturbance.long_text(1, 100_000)) == 100_000
    assert disturbance.long_text(1, 1000) != disturbance.long_text(2, 1000)


def test_a_neighbour_lives_for_the_block_and_no_longer() -> None:
    before = servers.cpu_seconds(os.getpid())
    sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(30)"]
    with disturbance.neighbour(sleeper):
        pass
    assert before is None or before >= 0
    with (
        pytest.raises(RuntimeError, match="ended early"),
        disturbance.neighbour([sys.executable, "-S", "-c", "raise SystemExit(3)"]),
    ):
        subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(0.3)"], check=True)
