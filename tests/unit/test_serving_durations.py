"""Durations as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama.errors import InvalidRequest
from mullama.serving.durations import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("5m", 300), ("1h30m", 5400), (" 2S ", 2), ("250ms", 0.25), ("1.5h", 5400), ("1d", 86400),
     (0, 0), (2.5, 2.5), ("0", 0), ("-1", -1), (-7, -1), ("-0.5", -1)],
)  # fmt: skip
def test_what_is_one(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "m", "5 m", "1x", "1h-2m", "--1", "1e3", "١", "inf", "nan", "9" * 50, True, False, 1e10,
             float("nan"), float("inf"), "99999999d"],
)  # fmt: skip
def test_what_is_none(text: str | float) -> None:
    with pytest.raises(InvalidRequest, match="keep_alive") as caught:
        parse_duration(text)
    assert caught.value.param == "keep_alive"


def test_the_error_names_the_field() -> None:
    with pytest.raises(InvalidRequest, match="timeout_s"):
        parse_duration("soon", "timeout_s")


@given(st.integers(0, 20), st.integers(0, 59), st.integers(0, 59))
def test_parts_add_up(hours: int, minutes: int, seconds: int) -> None:
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds


@given(st.text(max_size=30))
def test_any_text_is_a_duration_or_an_error(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        assert parse_duration(text) >= 0 or parse_duration(text) == -1
