"""``mullama simulate``: scheduling policies under one workload, on a cost model instead of an engine."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mullama.cli.options import Size
from mullama.cli.research.common import FILE, SEEDS_HELP, ReportWanted, policy_options, report_options, sweep_option
from mullama.cli.research.compare import make_policy, swept

if TYPE_CHECKING:
    from mullama.compare.runner import PolicySpec, Run
    from mullama.simulation import CostModel, SimConfig
    from mullama.workload.base import Workload

_CTX_STEP = 256  # a context is a multiple of it


@click.command(short_help="Compare scheduling policies in a simulator.")
@click.option(
    "--costs", "cost_file", required=True, type=FILE, metavar="FILE", help="what calibrate wrote; -: from stdin"
)
@policy_options
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="seed of arrivals and lengths")
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help=SEEDS_HELP)
@sweep_option
@click.option("--parallel", type=click.IntRange(1, 256), help="requests that run at once  [default: as calibrated]")
@click.option(
    "--ctx-size",
    type=Size(1, 1 << 24),
    metavar="N",
    help="tokens one request may use  [default: what the longest one needs]",
)
@click.option("--batch-size", type=Size(1, 1 << 14), metavar="N", help="prompt tokens a step  [default: as calibrated]")
@click.option(
    "--kv-tokens",
    type=Size(0, 1 << 40),
    metavar="N",
    default=0,
    help="KV of all running requests  [default: all there is]",
)
@click.option(
    "--kv-host-tokens",
    type=Size(0, 1 << 40),
    metavar="N",
    help="KV of prefixes kept in host memory  [default: as calibrated]",
)
@click.option("--sampled", is_flag=True, help="tokens cost what the default samplers cost, not greedy ones")
@report_options
def command(
    cost_file: Path,
    schedulers: str,
    policy_args: tuple[str, ...],
    spec: str,
    seed: int,
    seeds: int,
    sweeps: tuple[str, ...],
    parallel: int | None,
    ctx_size: int | None,
    batch_size: int | None,
    kv_tokens: int,
    kv_host_tokens: int | None,
    sampled: bool,
    wanted: ReportWanted,
) -> None:
    """Simulate the workload with each policy, and print the table of compare.

    The same arguments give the same numbers.
    """
    from mullama.compare.report import make_report, to_markdown
    from mullama.compare.runner import parse_policies
    from mullama.simulation import SimConfig, read_costs
    from mullama.workload.spec import parse_seeds

    costs = read_costs(cost_file)
    if wanted.to_stdout > 1:
        raise click.UsageError("of --json - and --csv - only one can be written to stdout")
    policies, sources = swept(parse_policies(schedulers, policy_args), sweeps)
    workloads = parse_seeds(spec, seed, seeds)
    config = SimConfig(
        n_slots=parallel or _calibrated(costs, "n_parallel", 8),
        n_ctx=-(-(ctx_size or max(workload.longest()[1] for workload in workloads)) // _CTX_STEP) * _CTX_STEP,
        n_batch=batch_size or int(costs.about.get("batch_size") or 512),
        kv_tokens=kv_tokens,
        host_tokens=kv_host_tokens if kv_host_tokens is not None else _calibrated(costs, "kv_host_tokens", 1 << 16),
        sampled=sampled,
    )
    start = time.perf_counter()
    runs: list[Run] = []
    counters: dict[str, dict[int, Any]] = {policy.label: {} for policy in policies}
    for workload in workloads:
        for policy in policies:
            run, counters[policy.label][workload.seed] = _simulate(policy, workload, costs, config)
            runs.append(run)
    spent = time.perf_counter() - start
    report = make_report(
        runs,
        policies,
        workloads,
        wanted.slo,
        rounds=1,
        provenance=_provenance(costs, cost_file, config),
    )
    report["notes"].insert(0, f"simulated, by costs of {costs.about.get('date', 'an unknown date')}")
    for entry in report["policies"]:
        by_seed = counters[entry["label"]]
        entry["counters"] = by_seed if seeds > 1 else by_seed[workloads[0].seed]
        entry["source"] = sources[entry["label"]]
    click.echo(to_markdown(report), nl=False, err=wanted.to_stdout > 0)
    n = sum(len(run.outcomes) for run in runs)
    click.echo(f"simulated {n} requests in {spent:.2f} s: {n / max(spent, 1e-9):,.0f} a second", err=True)
    wanted.write(report, runs, workloads)


def _simulate(
    policy: PolicySpec, workload: Workload, costs: CostModel, config: SimConfig
) -> tuple[Run, dict[str, Any]]:
    from dataclasses import asdict

    from mullama.compare.runner import Run
    from mullama.simulation import simulate

    scheduler = make_policy(policy)
    params = dict(scheduler.params())
    found = simulate(workload, scheduler, costs, config)
    run = Run(
        policy.label,
        1,
        found.outcomes,
        params,
        fallback=None,
        late_ms=0.0,
        exhausted=found.exhausted,
        seed=workload.seed,
    )
    return run, asdict(found.counters)


def _calibrated(costs: CostModel, name: str, default: int) -> int:
    """A size of the engine that was calibrated."""
    model = costs.about.get("model")
    value = model.get(name) if isinstance(model, dict) else None
    return value if isinstance(value, int) and value > 0 else default


def _provenance(costs: CostModel, cost_file: Path, config: SimConfig) -> dict[str, Any]:
    """As compare has it; machine, model, llama.cpp and date are those of the calibration."""
    from dataclasses import asdict

    from mullama.compare.provenance import commit
    from mullama.installation import VERSION

    about = costs.about
    model = about.get("model") if isinstance(about.get("model"), dict) else {}
    machine = about.get("machine") if isinstance(about.get("machine"), dict) else {}
    return {
        "version": VERSION,
        "commit": commit(),
        "llama_cpp": about.get("llama_cpp"),
        "date": about.get("date"),
        "command": shlex.join(["mullama", *sys.argv[1:]]),
        "machine": {"cpu": None, "cores": None, "system": "unknown", **(machine or {})},
        "model": {
            "name": "unknown",
            "description": "unknown",
            **(model or {}),
            "n_parallel": config.n_slots,
            "n_ctx": config.n_ctx,
        },
        "options": asdict(config),
        "costs": str(cost_file),
        "computing": about.get("computing"),
        "simulated": True,
    }
