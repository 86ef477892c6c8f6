"""What a comparison found, as one JSON object and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mullama.compare.intervals import intervals_of, ratio
from mullama.compare.runner import PolicySpec, Run
from mullama.files import counted
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
    workload: Workload | Sequence[Workload],
    slo: Slo,
    *,
    rounds: int,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The report: ``provenance`` first, then workload, and for each policy every run's metrics and their medians.

    ``workload``: one, or those of several seeds; then there are intervals over the seeds, and ratios to the first
    policy. A policy without a complete round is left out. ``interrupted`` says that rounds are missing.
    """
    workloads = [workload] if isinstance(workload, Workload) else list(workload)
    found = [entry for policy in policies if (entry := _policy(policy, runs, workloads, slo)) is not None]
    for entry in found[1:]:
        entry["against_first"] = _against(entry, found[0]) if len(workloads) > 1 else None
    return {
        **provenance,
        "workload": _workload(workloads[0]),
        "seeds": [one.seed for one in workloads],
        "slo": asdict(slo),
        "rounds": rounds,
        "interrupted": len(runs) < rounds * len(policies) * len(workloads),
        "notes": list(dict.fromkeys(_notes(runs))),
        "policies": found,
    }


def _policy(policy: PolicySpec, runs: Sequence[Run], workloads: Sequence[Workload], slo: Slo) -> dict[str, Any] | None:
    own = sorted((run for run in runs if run.policy == policy.label), key=lambda run: (run.seed, run.round))
    if not own:
        return None
    stops = {workload.seed: workload.stop_s for workload in workloads}
    stop_s = workloads[0].stop_s
    metrics = [measure(run.outcomes, slo, stop_s=stops.get(run.seed, stop_s)).to_dict() for run in own]
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for run, found in zip(own, metrics, strict=True):
        by_seed.setdefault(run.seed, []).append(found)
    medians = {seed: median_of(found) for seed, found in by_seed.items()}
    return {
        "label": policy.label,
        "scheduler": policy.spec,
        "params": own[0].params,
        "fallback": next((run.fallback for run in own if run.fallback), None),
        "late_ms": max(run.late_ms for run in own),
        "neighbours": [round(run.neighbours, 2) for run in own],
        "median": median_of(list(medians.values())),
        "interval": intervals_of(list(medians.values())) if len(workloads) > 1 else None,
        "seeds": medians if len(workloads) > 1 else None,
        "runs": [{"seed": run.seed, "round": run.round} for run in own],
        "rounds": metrics,
    }


def _against(entry: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """By column, how many times the first policy's number this one's is, on the seeds that both have."""
    seeds = [seed for seed in entry["seeds"] if seed in first["seeds"]]
    return {
        path: ratio(*([_value(one["seeds"][seed], path) for seed in seeds] for one in (entry, first)))
        for _, path, kind in COLUMNS
        if kind in ("ms", "rate")
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


def _notes(runs: Sequence[Run]) -> Iterable[str]:
    """What a reader must know before believing the numbers."""
    several = len({run.seed for run in runs}) > 1
    for run in runs:
        turn = f"round {run.round} of seed {run.seed}" if several else f"round {run.round}"
        if run.fallback:
            yield f"{run.policy}: fcfs took over in {turn}: {run.fallback}"
        if run.exhausted:
            yield f"{run.policy}: {run.exhausted} clients ran out of requests before the end; raise n"
        if run.late_ms > LATE_MS:
            yield f"{run.policy}: requests were sent up to {run.late_ms:.0f} ms late; the machine was too busy"
        if run.neighbours > LOUD:
            yield (
                f"{run.policy}: other processes kept {run.neighbours:.1f} cores busy in {turn}; "
                "its times are longer for it"
            )
        failures = [outcome.error for outcome in run.outcomes if outcome.error is not None]
        if failures:
            n_failed = counted(len(failures), "request")
            yield f"{run.policy}: {n_failed} failed in {turn}, the first with: {failures[0]}"


# -- Markdown --------------------------------------------------------------------------------------------------


def to_markdown(report: Mapping[str, Any]) -> str:
    """The tables, with what is needed to repeat them."""
    model, machine, workload = report["model"], report["machine"], report["workload"]
    version = f"mullama {report['version']}" + (f" ({report['commit']})" if report["commit"] else "")
    lines = [
        f"# {model['name']}: policies compared",
        "",
        f"- workload: `{workload['spec']}`, {_seeds(report['seeds'])}: {workload['requests']} arrivals, "
        f"{workload['clients']} clients",
        f"- engine: {model['description']}, {model['n_parallel']} at once, {model['n_ctx']} tokens each",
        f"- {version}, llama.cpp {(report['llama_cpp'] or 'unknown')[:9]}, {report['date']}",
        f"- machine: {machine['cpu'] or 'unknown processor'}, {machine['cores']} cores, {machine['system']}",
        f"- command: `{report['command']}`",
        f"- {_measured(report)}; milliseconds" + (", interrupted" if report["interrupted"] else ""),
        *(f"- {line}" for line in _sources(report)),
        *(f"- goodput: {limits}" for limits in _limits(report)),
        *(f"- **note:** {_cell(note)}" for note in report["notes"]),
        "",
    ]
    rows = [([entry["label"]], entry["interval"] or entry["median"]) for entry in report["policies"]]
    lines += _table(["policy"], rows)
    lines += _ratios(report["policies"])
    for part, title in (("groups", "class"), ("users", "user")):
        if part == "users" and all(
            entry["median"]["users"] == entry["median"]["groups"] for entry in report["policies"]
        ):
            continue  # each class is one user: the table above says it all
        parts = [
            ([name or "-", entry["label"]], metrics)
            for entry in report["policies"]
            for name, metrics in (entry["interval"] or entry["median"])[part].items()
        ]
        if parts:
            parts.sort(key=lambda row: row[0][0])  # stable: policies stay in their order
            lines += ["", f"## By {title}", "", *_table([title, "policy"], parts)]
    return "\n".join(lines) + "\n"


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), of the first"


def _measured(report: Mapping[str, Any]) -> str:
    """What the numbers of the tables are."""
    seeds, rounds = len(report["seeds"]), report["rounds"]
    done = min((len(entry["rounds"]) for entry in report["policies"]), default=0)
    if seeds == 1:
        return f"medians of {done} of {rounds} rounds"
    of = f"{done} of {seeds * rounds} runs" if rounds == 1 else f"{done} of {seeds} x {rounds} runs (medians of rounds)"
    return f"means of {of}, one seed a sample, and their 95 % intervals (Student's t)"


def _sources(report: Mapping[str, Any]) -> list[str]:
    """Files of policies that are not mullama's own, by their hashes."""
    files = {one["file"]: one["sha256"] for entry in report["policies"] if (one := entry.get("source")) is not None}
    return [f"policy file {name}: sha256 {digest[:16]}…" for name, digest in files.items()]


def _ratios(policies: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many times the first policy's numbers those of the others are."""
    rows = [(entry["label"], entry["against_first"]) for entry in policies[1:] if entry.get("against_first")]
    columns = [(name, path) for name, path, _ in COLUMNS if any(found.get(path) for _, found in rows)]
    if not columns:
        return []
    lines = [
        "",
        f"## Against {_cell(policies[0]['label'])}, seed by seed",
        "",
        "How many times its number: geometric means and their 95 % intervals; one that leaves out 1 is a difference.",
        "",
        f"| policy | {' | '.join(name for name, _ in columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for label, found in rows:
        cells = [
            f"{one['ratio']:.2f} ({one['low']:.2f}–{one['high']:.2f})" if (one := found.get(path)) else "-"
            for _, path in columns
        ]
        lines.append(f"| {_cell(label)} | {' | '.join(cells)} |")
    return lines


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
        numbers = [_shown(metrics, path, kind) for _, path, kind in columns]
        lines.append(f"| {' | '.join([*(_cell(cell) for cell in cells), *numbers])} |")
    return lines


def _value(metrics: Mapping[str, Any], path: str) -> float | None:
    """A number by its path; of an interval its mean."""
    value = _found(metrics, path)
    if isinstance(value, Mapping):
        value = value["mean"]
    return None if value is None else float(value)


def _found(metrics: Mapping[str, Any], path: str) -> Any:
    value: Any = metrics
    for name in path.split("."):
        value = value[name] if value is not None else None
    return value


def _shown(metrics: Mapping[str, Any], path: str, kind: str) -> str:
    found = _found(metrics, path)
    if not isinstance(found, Mapping):
        return _number(_value(metrics, path), kind)
    mean, low, high = (_number(found[name], kind) for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low}–{high})"


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
