"""What every benchmark shares: statistics, the machine's description, result records, tables, progress.

A record is one JSON object that carries its commit, flags, machine and date, so that a number found later can be
reproduced or doubted. No third-party package is needed here.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

_T0 = time.monotonic()


def progress(text: str) -> None:
    """One plain line on stderr with the seconds since the start; stdout holds only tables."""
    print(f"[{time.monotonic() - _T0:7.1f}s] {text}", file=sys.stderr, flush=True)


# --- statistics -------------------------------------------------------------------------------


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0–100) with linear interpolation between ranks, as numpy's default; nan when empty."""
    if not values:
        return math.nan
    if not 0 <= q <= 100:
        raise ValueError(f"a percentile lies between 0 and 100, not {q}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median and spread of repeated measurements: ``n, median, min, max, iqr`` (the middle half's width)."""
    if not values:
        return {"n": 0, "median": math.nan, "min": math.nan, "max": math.nan, "iqr": math.nan}
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "iqr": percentile(values, 75) - percentile(values, 25),
    }


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Percentiles of many samples, as latencies are reported: ``n, p50, p90, p99, max``."""
    return {
        "n": len(values),
        "p50": percentile(values, 50),
        "p90": percentile(values, 90),
        "p99": percentile(values, 99),
        "max": max(values) if values else math.nan,
    }


def median_by_key(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """``summarize`` for every key that occurs in the rows; values that are not finite are left out."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: summarize([row[key] for row in rows if key in row and math.isfinite(row[key])]) for key in keys}


def ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.nan


# --- where and what ---------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, instruction sets, cores and quota of this process, memory, system, Python. Unknown: ``None``."""
    from mullama.machine.report import provenance

    return provenance()


def commit() -> str:
    """``git describe --always --dirty`` of the checkout, or ``unknown`` outside of one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--tags"], cwd=ROOT, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def record(benchmark: str, flags: Mapping[str, Any], results: Any) -> dict[str, Any]:
    """A result with everything that is needed to reproduce it."""
    return {
        "benchmark": benchmark,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "flags": {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()},
        "machine": machine(),
        "results": results,
    }


def write_record(rec: Mapping[str, Any], file: str | Path | None = None) -> Path:
    """Write a record; by default to ``bench/results/BENCHMARK-DATE-COMMIT.json``. Returns the path."""
    if file is None:
        stamp = str(rec["date"]).replace(":", "").replace("-", "").split("+")[0]
        file = RESULTS / f"{rec['benchmark']}-{stamp}-{rec['commit']}.json"
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(rec), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    progress(f"wrote {path}")
    return path


def _plain(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null; floats lose digits nobody measured."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


# --- tables -----------------------------------------------------------------------------------


def number(value: Any) -> str:
    """A cell: three significant digits for floats below 1000, texts as they are, ``–`` for what was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns; the first column is text, the others are numbers."""
    cells = [list(header), *([number(value) for value in row] for row in rows)]
    for row in cells:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header {len(header)}")
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    lines = [line(row) for row in cells]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
