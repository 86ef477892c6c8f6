"""The folder of a comparison: the report, the trace and every outcome, to be read and played again."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mullama.compare.report import to_markdown
from mullama.compare.runner import Run
from mullama.files import write_text
from mullama.workload.base import Workload
from mullama.workload.recorded import write_outcomes, write_trace


def write_json(file: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON to a file, or for ``-`` to stdout."""
    write_text(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def write_folder(
    folder: Path, report: Mapping[str, Any], runs: Sequence[Run], workload: Workload | Sequence[Workload]
) -> None:
    """``report.md``, ``report.json``, ``metrics.csv``, ``trace.jsonl`` and ``outcomes-POLICY-ROUND.jsonl``.

    Of several seeds ``trace-SEED.jsonl`` and ``outcomes-POLICY-SEED-ROUND.jsonl``. The folder may exist.
    """
    workloads = [workload] if isinstance(workload, Workload) else list(workload)
    several = len(workloads) > 1
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", to_markdown(report))
    write_json(folder / "report.json", report)
    write_csv(folder / "metrics.csv", report)
    for one in workloads:
        write_trace(folder / (f"trace-{one.seed}.jsonl" if several else "trace.jsonl"), one)
    names = file_names([run.policy for run in runs])
    for run in runs:
        number = f"{run.seed}-{run.round}" if several else str(run.round)
        write_outcomes(folder / f"outcomes-{names[run.policy]}-{number}.jsonl", run.outcomes)


def write_csv(file: Path, report: Mapping[str, Any]) -> None:
    """Every run's metrics to a file, or for ``-`` to stdout: a row for a run, and for each class and user of it.

    ``part`` is ``all``, ``class`` or ``user``, ``name`` which one; parameters are columns ``param.NAME``, numbers those
    of the report with their path (``ttft_ms.p50``). Cells without a number are empty.
    """
    rows = [row for entry in report["policies"] for row in _rows(entry)]
    heads = ["policy", "scheduler", "seed", "round", "part", "name"]
    heads += sorted({head for row in rows for head in row if head.startswith("param.")})
    heads += [head for head in dict.fromkeys(head for row in rows for head in row) if head not in heads]
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def _rows(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    params = {f"param.{name}": value for name, value in entry["params"].items()}
    for run, metrics in zip(entry["runs"], entry["rounds"], strict=True):
        head = {"policy": entry["label"], "scheduler": entry["scheduler"], **run}
        yield {**head, "part": "all", "name": "", **params, **_flat(metrics)}
        for part, field in (("class", "groups"), ("user", "users")):
            for name, own in metrics[field].items():
                yield {**head, "part": part, "name": name, **params, **_flat(own)}


def _flat(metrics: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.") if name not in ("groups", "users") else {}
        else:
            found[above + name] = value
    return found


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """A name for each label that any file system takes; different ones for different labels."""
    names: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        name = base = re.sub(r"[^\w.=+-]+", "_", label, flags=re.ASCII).strip("._") or "policy"
        number = 1
        while name in names.values():
            number += 1
            name = f"{base}_{number}"
        names[label] = name
    return names
