"""What a comparison found, as one JSON object and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mullama.compare.runner import PolicySpec, Run
from mullama.machine.neighbours import LOUD
from mullama.workload.base import Workload
from mullama.workload.metrics import Slo, measure, median_of

LATE_MS = 50.0  # sent so late, a request's TTFT says more of this process than of the policy

#: Heads of the tables, the number behind each (a path in the metrics), and how it is written.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("TTFT p50", "ttft_ms.p50", "ms"),
    ("p90", "ttft_ms.p90", "ms"),
    ("p99", "ttft_ms.p99", "ms"),
    ("ITL p50", "itl_ms.p50", "ms"),
    ("p90", "itl_ms.p90", "ms"),
    ("p99", "itl_ms.p99", "ms"),
    ("e2e p50", "e2e_ms.p50", "ms"),
    ("p90", "e2e_ms.p90", "ms"),
    ("p99", "e2e_ms.p99", "ms"),
    ("tok/s", "tokens_per_s", "rate"),
    ("req/s", "requests_per_s", "rate"),
    ("goodput/s", "goodput_per_s", "rate"),
    ("good", "goodput_share", "share"),
    ("fairness", "fairness", "index"),
    ("preempted", "preemptions", "count"),
    ("failed", "failed", "count"),
)


def make_report(
    runs: Sequence[Run],
    policies: Sequence[PolicySpec],
    workload: Workload,
    slo: Slo,
    *,
    rounds: int,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The report: ``provenance`` first, then workload, and for each policy every round's metrics and their medians.

    A policy without a complete round is left out. ``interrupted`` says that rounds are missing.
    """
    found = [entry for policy in policies if (entry := _policy(policy, runs, workload, slo)) is not None]
    return {
        **provenance,
        "workload": _workload(workload),
        "slo": asdict(slo),
        "rounds": rounds,
        "interrupted": len(runs) < rounds * len(policies),
        "notes": list(dict.fromkeys(_notes(runs))),
        "policies": found,
    }


def _policy(policy: PolicySpec, runs: Sequence[Run], workload: Workload, slo: Slo) -> dict[str, Any] | None:
    own = sorted((run for run in runs if run.policy == policy.label), key=lambda run: run.round)
    if not own:
        return None
    metrics = [measure(run.outcomes, slo, stop_s=workload.stop_s).to_dict() for run in own]
    return {
        "label": policy.label,
        "scheduler": policy.spec,
        "params": own[0].params,
        "fallback": next((run.fallback for run in own if run.fallback), None),
        "late_ms": max(run.late_ms for run in own),
        "neighbours": [round(run.neighbours, 2) for run in own],
        "median": median_of(metrics),
        "rounds": metrics,
    }


def _workload(workload: Workload) -> dict[str, Any]:
    requests = workload.all_requests()
    return {
        "spec": workload.spec,
        "seed": workload.seed,
        "requests": len(workload.requests),
        "clients": len(workload.clients),
        "stop_s": workload.stop_s,
        "prompt_tokens": sum(request.prompt_tokens for request in requests),
        "output_tokens": sum(request.output_tokens for request in requests),
    }


def _notes(runs: Iterable[Run]) -> Iterable[str]:
    """What a reader must know before believing the numbers."""
    for run in runs:
        if run.fallback:
            yield f"{run.policy}: fcfs took over in round {run.round}: {run.fallback}"
        if run.exhausted:
            yield f"{run.policy}: {run.exhausted} clients ran out of requests before the end; raise n"
        if run.late_ms > LATE_MS:
            yield f"{run.policy}: requests were sent up to {run.late_ms:.0f} ms late; the machine was too busy"
        if run.neighbours > LOUD:
            yield (
                f"{run.policy}: other processes kept {run.neighbours:.1f} cores busy in round {run.round}; "
                "its times are longer for it"
            )
        failures = [outcome.error for outcome in run.outcomes if outcome.error is not None]
        if failures:
            yield f"{run.policy}: {len(failures)} requests failed in round {run.round}, the first with: {failures[0]}"


# -- Markdown --------------------------------------------------------------------------------------------------


def to_markdown(report: Mapping[str, Any]) -> str:
    """The tables, with what is needed to repeat them."""
    model, machine, workload = report["model"], report["machine"], report["workload"]
    version = f"mullama {report['version']}" + (f" ({report['commit']})" if report["commit"] else "")
    done = min((len(entry["rounds"]) for entry in report["policies"]), default=0)
    lines = [
        f"# {model['name']}: policies compared",
        "",
        f"- workload: `{workload['spec']}`, seed {workload['seed']}: {workload['requests']} arrivals, "
        f"{workload['clients']} clients",
        f"- engine: {model['description']}, {model['n_parallel']} at once, {model['n_ctx']} tokens each",
        f"- {version}, llama.cpp {(report['llama_cpp'] or 'unknown')[:9]}, {report['date']}",
        f"- machine: {machine['cpu'] or 'unknown processor'}, {machine['cores']} cores, {machine['system']}",
        f"- command: `{report['command']}`",
        f"- medians of {done} of {report['rounds']} rounds; milliseconds"
        + (", interrupted" if report["interrupted"] else ""),
        *(f"- goodput: {limits}" for limits in _limits(report)),
        *(f"- **note:** {_cell(note)}" for note in report["notes"]),
        "",
    ]
    rows = [([entry["label"]], entry["median"]) for entry in report["policies"]]
    lines += _table(["policy"], rows)
    for part, title in (("groups", "class"), ("users", "user")):
        if part == "users" and all(
            entry["median"]["users"] == entry["median"]["groups"] for entry in report["policies"]
        ):
            continue  # each class is one user: the table above says it all
        parts = [
            ([name or "-", entry["label"]], metrics)
            for entry in report["policies"]
            for name, metrics in entry["median"][part].items()
        ]
        if parts:
            parts.sort(key=lambda row: row[0][0])  # stable: policies stay in their order
            lines += ["", f"## By {title}", "", *_table([title, "policy"], parts)]
    return "\n".join(lines) + "\n"


def _limits(report: Mapping[str, Any]) -> list[str]:
    names = {"ttft_ms": "TTFT", "itl_ms": "mean ITL", "e2e_ms": "end to end"}
    limits = [f"{names[key]} at most {value:g} ms" for key, value in report["slo"].items() if value is not None]
    if not limits and all(entry["median"]["goodput_share"] is None for entry in report["policies"]):
        return []
    return [", ".join(limits) or "each request's own slo_ms"]


def _table(head: list[str], rows: Sequence[tuple[list[str], Mapping[str, Any]]]) -> list[str]:
    """A Markdown table; a column that is empty in every row is left out."""
    columns = [column for column in COLUMNS if any(_value(metrics, column[1]) is not None for _, metrics in rows)]
    lines = [
        f"| {' | '.join([*head, *(name for name, _, _ in columns)])} |",
        f"|{'---|' * len(head)}{'---:|' * len(columns)}",
    ]
    for cells, metrics in rows:
        numbers = [_number(_value(metrics, path), kind) for _, path, kind in columns]
        lines.append(f"| {' | '.join([*(_cell(cell) for cell in cells), *numbers])} |")
    return lines


def _value(metrics: Mapping[str, Any], path: str) -> float | None:
    value: Any = metrics
    for name in path.split("."):
        value = value[name] if value is not None else None
    return None if value is None else float(value)


def _number(value: float | None, kind: str) -> str:
    if value is None:
        return "-"
    if kind == "share":
        return f"{100 * value:.0f} %"
    if kind == "index":
        return f"{value:.3f}"
    if kind == "count":
        return f"{value:g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
