"""How far is the simulator from the real engine? Plays the traces of ``mullama compare --out`` folders again.

    python bench/simulator_error.py --costs costs.json results/poisson results/azure

For each folder and policy: median TTFT and throughput as measured (medians of the rounds, and their range) and as
simulated by a cost file of the same machine and model, with the error of the simulation. Runs in which the machine was
disturbed differ among themselves by more than that: look at the range first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is used
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import common
from mullama.errors import MullamaError
from mullama.scheduling import registry
from mullama.simulation import CostModel, SimConfig, read_costs, simulate
from mullama.workload.metrics import measure
from mullama.workload.recorded import read_trace

NUMBERS = (("TTFT p50 ms", "ttft_ms", "p50"), ("tok/s", "tokens_per_s", None))


def config_of(report: Mapping[str, Any]) -> SimConfig:
    """The sizes of the engine that a report of ``compare`` is of."""
    options = report.get("options", {})
    return SimConfig(
        n_slots=report["model"]["n_parallel"],
        n_ctx=report["model"]["n_ctx"],
        n_batch=options.get("batch_size") or 512,
        kv_tokens=options.get("kv_tokens") or 0,
    )


def value(metrics: Mapping[str, Any], key: str, part: str | None) -> float | None:
    found = metrics[key] if part is None else metrics[key][part]
    return None if found is None else float(found)


def errors_of(folder: Path, costs: CostModel) -> list[dict[str, Any]]:
    """For each policy of a folder that ``compare --out`` wrote: every number measured, simulated, and the error."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    workload = read_trace(folder / "trace.jsonl")
    rows = []
    for entry in report["policies"]:
        policy = registry.create(entry["scheduler"], entry["params"])
        outcomes = simulate(workload, policy, costs, config_of(report)).outcomes
        simulated = asdict(measure(outcomes, stop_s=workload.stop_s))
        row: dict[str, Any] = {"trace": folder.name, "policy": entry["label"], "rounds": len(entry["rounds"])}
        for name, key, part in NUMBERS:
            real, ours = value(entry["median"], key, part), value(simulated, key, part)
            rounds = [found for one in entry["rounds"] if (found := value(one, key, part)) is not None]
            row[name] = {
                "real": real,
                "range": [min(rounds), max(rounds)] if rounds else None,
                "simulated": ours,
                "error": ours / real - 1 if real and ours is not None else None,
            }
        rows.append(row)
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["trace", "policy", "rounds"]
    for name, _, _ in NUMBERS:
        head += [name, "range", "simulated", "error"]
    cells = []
    for row in rows:
        line: list[Any] = [row["trace"], row["policy"], row["rounds"]]
        for name, _, _ in NUMBERS:
            found = row[name]
            span = "-" if found["range"] is None else "–".join(common.number(end) for end in found["range"])
            error = "-" if found["error"] is None else f"{100 * found['error']:+.1f} %"
            line += [found["real"], span, found["simulated"], error]
        cells.append(line)
    return common.table(head, cells)


def worst(rows: Sequence[Mapping[str, Any]]) -> float:
    """The largest error without its sign; 0 without any."""
    errors = [row[name]["error"] for row in rows for name, _, _ in NUMBERS]
    return max((abs(error) for error in errors if error is not None), default=0.0)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.simulator_error", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="what mullama compare --out wrote")
    parser.add_argument("--costs", required=True, type=Path, metavar="FILE", help="what mullama calibrate wrote")
    parser.add_argument("--limit", type=float, default=None, metavar="PERCENT", help="exit with 1 above this error")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the record here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        costs = read_costs(args.costs)
        rows = [row for folder in args.folders for row in errors_of(folder, costs)]
    except (MullamaError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report(rows))
    if args.json is not None:
        flags = {"folders": [str(folder) for folder in args.folders], "costs": str(args.costs)}
        common.write_record(common.record("simulator_error", flags, {"costs": costs.about, "rows": rows}), args.json)
    return int(args.limit is not None and worst(rows) > args.limit / 100)


if __name__ == "__main__":
    sys.exit(main())
