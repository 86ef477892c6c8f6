"""The folder of a comparison: the report, the trace and every outcome, to be read and played again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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


def write_folder(folder: Path, report: Mapping[str, Any], runs: Sequence[Run], workload: Workload) -> None:
    """``report.md``, ``report.json``, ``trace.jsonl`` and ``outcomes-POLICY-ROUND.jsonl``. The folder may exist."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    write_json(folder / "report.json", report)
    write_trace(folder / "trace.jsonl", workload)
    names = file_names([run.policy for run in runs])
    for run in runs:
        write_outcomes(folder / f"outcomes-{names[run.policy]}-{run.round}.jsonl", run.outcomes)


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
