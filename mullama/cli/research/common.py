"""What compare and simulate ask in the same words: policies and workload, and what becomes of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mullama.compare.runner import Run
    from mullama.workload.base import Workload

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)
FOLDER = click.Path(path_type=Path, file_okay=False)
SEEDS_HELP = "play that many workloads, of --seed and the seeds after it; the report has their intervals"

_MS = click.FloatRange(min=0, min_open=True)
_TO = "to FILE; -: to stdout, and the table to stderr"


def policy_options(command: F) -> F:
    """Which policies, under which workload."""
    policies = "policies, with commas: names, FILE:CLASS, or NAME(PARAM=VALUE,…)"
    for option in (
        click.option("--trace", "spec", required=True, metavar="SPEC", help="workload, such as poisson:rate=2,n=200"),
        click.option("--scheduler-arg", "policy_args", multiple=True, metavar="POLICY.PARAM=VALUE", help="repeatable"),
        click.option("--schedulers", required=True, metavar="NAMES", help=policies),
    ):
        command = option(command)
    return command


def sweep_option(command: F) -> F:
    told = "an entry for each value, of the policies that have the parameter; repeatable"
    return click.option("--sweep", "sweeps", multiple=True, metavar="[POLICY.]PARAM=V,V", help=told)(command)


def report_options(command: F) -> F:
    """What is good enough, and where the report goes."""
    for option in (
        click.option("--csv", "csv_file", type=FILE, metavar="FILE", help=f"write every run's numbers as CSV {_TO}"),
        click.option("--json", "json_file", type=FILE, metavar="FILE", help=f"write the report as JSON {_TO}"),
        click.option("--plots/--no-plots", default=True, help="with --out: draw figures (needs matplotlib)"),
        click.option("--out", type=FOLDER, metavar="DIR", help="write report, trace, outcomes and plots to DIR"),
        click.option("--slo-e2e-ms", type=_MS, metavar="MS", help="goodput: most time to the end of the answer"),
        click.option("--slo-itl-ms", type=_MS, metavar="MS", help="goodput: most mean time between tokens"),
        click.option("--slo-ttft-ms", type=_MS, metavar="MS", help="goodput: most time to the first token"),
    ):
        command = option(command)
    return command


def write_report(
    report: dict[str, Any],
    runs: list[Run],
    workloads: list[Workload],
    *,
    json_file: Path | None,
    csv_file: Path | None,
    out: Path | None,
    plots: bool,
) -> None:
    """Everything that was asked for. Raises OSError."""
    from mullama.compare.plots import write_plots
    from mullama.compare.recording import write_csv, write_folder, write_json

    if json_file is not None:
        write_json(json_file, report)
    if csv_file is not None:
        write_csv(csv_file, report)
    if out is not None:
        write_folder(out, report, runs, workloads)
        if plots and runs:
            write_plots(out, runs)
