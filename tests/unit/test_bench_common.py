"""Statistics, records and tables of the benchmarks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench import common


def test_percentile_interpolates_as_numpy_does() -> None:
    assert common.percentile([3, 1, 2, 4], 50) == 2.5
    assert common.percentile([1, 2, 3, 4], 0) == 1
    assert common.percentile([1, 2, 3, 4], 100) == 4
    assert common.percentile([1, 2, 3, 4, 5], 99) == pytest.approx(4.96)
    assert common.percentile([7], 99) == 7
    assert math.isnan(common.percentile([], 50))
    with pytest.raises(ValueError, match="between 0 and 100"):
        common.percentile([1], 101)


def test_summarize_gives_median_and_spread() -> None:
    assert common.summarize([10.0, 30.0, 20.0, 40.0, 50.0]) == {
        "n": 5,
        "median": 30.0,
        "min": 10.0,
        "max": 50.0,
        "iqr": 20.0,
    }
    assert common.summarize([])["n"] == 0


def test_median_by_key_leaves_out_what_was_not_measured() -> None:
    rows = [{"a": 1.0, "b": math.nan}, {"a": 3.0, "b": 5.0}, {"a": 2.0}]
    medians = common.median_by_key(rows)
    assert medians["a"]["median"] == 2.0
    assert medians["b"] == common.summarize([5.0])


def test_a_record_says_where_it_comes_from_and_is_valid_json(tmp_path: Path) -> None:
    rec = common.record(
        "online", {"model": Path("m.gguf"), "ctx": 2048}, {"bad": math.nan, "rows": [(1.23456789, "x")]}
    )
    file = common.write_record(rec, tmp_path / "sub" / "r.json")
    read = json.loads(file.read_text(encoding="utf-8"))
    assert read["flags"] == {"model": "m.gguf", "ctx": 2048}
    assert read["results"] == {"bad": None, "rows": [[1.23457, "x"]]}
    assert read["commit"]
    assert read["machine"]["cores"] >= 1
    assert read["machine"]["system"]
    assert "quota" in read["machine"]
    assert isinstance(read["machine"]["instruction_sets"], list)
    assert read["date"].endswith("+00:00")


def test_table_is_aligned_markdown() -> None:
    text = common.table(["name", "t/s"], [["one", 123.4], ["eight clients", math.nan], ["x", None]])
    assert text.splitlines() == [
        "| name          | t/s |",
        "|---------------|----:|",
        "| one           | 123 |",
        "| eight clients |   – |",
        "| x             |   – |",
    ]
    with pytest.raises(ValueError, match="cells"):
        common.table(["a", "b"], [["only one"]])


def test_ratio_of_nothing_is_not_a_number() -> None:
    assert common.ratio(3.0, 2.0) == 1.5
    assert math.isnan(common.ratio(3.0, 0.0))
