"""What compare and simulate ask in the same words: policies and workload, and what becomes of the report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from mullama.files import STDIO

if TYPE_CHECKING:
    from mullama.compare.runner import Run
    from mullama.workload.base import Workload
    from mullama.workload.metrics import Slo

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


@dataclass(frozen=True, slots=True)
class ReportWanted:
    """What is good enough, and where the report goes."""

    slo: Slo
    out: Path | None
    plots: bool
    json_file: Path | None
    csv_file: Path | None

    @property
    def to_stdout(self) -> int:
        """How many files go to stdout, where there is place for one."""
        return (self.json_file, self.csv_file).count(STDIO)

    def write(self, report: dict[str, Any], runs: list[Run], workloads: list[Workload]) -> None:
        """Everything that was asked for. Raises OSError."""
        from mullama.compare.plots import write_plots
        from mullama.compare.recording import write_csv, write_folder, write_json

        if self.json_file is not None:
            write_json(self.json_file, report)
        if self.csv_file is not None:
            write_csv(self.csv_file, report)
        if self.out is not None:
            write_folder(self.out, report, runs, workloads)
            if self.plots and runs:
                write_plots(self.out, runs)


def report_options(command: F) -> F:
    """Options that come together as ``wanted``. Raises ConfigError where matplotlib is needed and not there."""

    @functools.wraps(command)
    def run(**params: Any) -> Any:
        from mullama.compare.plots import require_matplotlib
        from mullama.workload.metrics import Slo

        slo = Slo(*(params.pop(f"slo_{name}_ms") for name in ("ttft", "itl", "e2e")))
        wanted = ReportWanted(slo, *(params.pop(name) for name in ("out", "plots", "json_file", "csv_file")))
        if wanted.out is not None and wanted.plots:
            require_matplotlib()
        return command(wanted=wanted, **params)

    found = cast(F, run)
    for option in (
        click.option("--csv", "csv_file", type=FILE, metavar="FILE", help=f"write every run's numbers as CSV {_TO}"),
        click.option("--json", "json_file", type=FILE, metavar="FILE", help=f"write the report as JSON {_TO}"),
        click.option("--plots/--no-plots", default=True, help="with --out: draw figures (needs matplotlib)"),
        click.option("--out", type=FOLDER, metavar="DIR", help="write report, trace, outcomes and plots to DIR"),
        click.option("--slo-e2e-ms", type=_MS, metavar="MS", help="goodput: most time to the end of the answer"),
        click.option("--slo-itl-ms", type=_MS, metavar="MS", help="goodput: most mean time between tokens"),
        click.option("--slo-ttft-ms", type=_MS, metavar="MS", help="goodput: most time to the first token"),
    ):
        found = option(found)
    return found
