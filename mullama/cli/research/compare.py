"""``mullama compare``: one workload against several scheduling policies on the real engine."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mullama.cli.options import config_from, config_options
from mullama.cli.research.common import FILE, SEEDS_HELP, ReportWanted, policy_options, report_options, sweep_option
from mullama.config import DEFAULT_MODEL, ServeConfig
from mullama.files import STDIO

if TYPE_CHECKING:
    from mullama.compare.runner import PolicySpec, Run
    from mullama.engine.engine import Engine
    from mullama.scheduling import Scheduler
    from mullama.workload.base import Workload

#: Of the options of ``serve``, those that change what is compared.
CONFIG_OPTIONS = (
    *("ctx_size", "parallel", "threads", "threads_fixed", "batch_size", "kv_tokens", "swap_bytes", "plan_timeout_ms"),
    *("flash_attn", "mmap", "gpu_layers", "device", "split_mode", "tensor_split", "memory_check"),
)
_CTX_STEP = 256  # an automatic context is a multiple of it


@click.command(short_help="Compare scheduling policies under one workload.")
@click.option("--model", "reference", metavar="MODEL", help="model to load  [default: the default model]")
@policy_options
@click.option("--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help=SEEDS_HELP)
@sweep_option
@click.option("--rounds", type=click.IntRange(1, 100), default=1, show_default=True, help="runs of each policy")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="seed of arrivals, lengths, prompts")
@report_options
@click.option(
    "--record", type=FILE, metavar="FILE", help="write the workload to FILE (-: stdout), for --trace file:FILE"
)
@config_options(CONFIG_OPTIONS)
def command(
    reference: str | None,
    schedulers: str,
    policy_args: tuple[str, ...],
    spec: str,
    seeds: int,
    sweeps: tuple[str, ...],
    rounds: int,
    seed: int,
    wanted: ReportWanted,
    record: Path | None,
    **params: Any,
) -> None:
    """Play the identical workload with each policy, in interleaved rounds, and print a table.

    Ctrl-C ends it early; what was measured until then is reported.
    """
    from mullama.compare.report import make_report, to_markdown
    from mullama.compare.runner import parse_policies
    from mullama.workload.recorded import write_trace
    from mullama.workload.spec import parse_seeds

    # Whatever can be wrong is found before the minutes that loading and measuring take.
    if wanted.to_stdout + (record == STDIO) > 1:
        raise click.UsageError("of --json -, --csv - and --record - only one can be written to stdout")
    if record is not None and seeds > 1:
        raise click.UsageError("--record writes one workload; with --seeds, --out writes them all")
    policies, sources = swept(parse_policies(schedulers, policy_args), sweeps)
    workloads = parse_seeds(spec, seed, seeds)
    config = _config(config_from(params), workloads)
    if record is not None:
        write_trace(record, workloads[0])
    if wanted.out is not None:
        wanted.out.mkdir(parents=True, exist_ok=True)
    engine, runs = _measure(reference, config, policies, workloads, rounds)
    report = make_report(
        runs,
        policies,
        workloads,
        wanted.slo,
        rounds=rounds,
        provenance=_provenance(engine, config),
    )
    for entry in report["policies"]:
        entry["source"] = sources[entry["label"]]
    if runs:
        click.echo(to_markdown(report), nl=False, err=wanted.to_stdout > 0 or record == STDIO)
    wanted.write(report, runs, workloads)
    if report["interrupted"]:
        raise KeyboardInterrupt


def swept(
    policies: list[PolicySpec], sweeps: tuple[str, ...]
) -> tuple[list[PolicySpec], dict[str, dict[str, str] | None]]:
    """The entries with what is swept, and by label the file of a policy that is not mullama's own.

    Raises ConfigError for a policy or a parameter that there is not.
    """
    from mullama.compare.provenance import source_of
    from mullama.compare.sweeps import sweep

    policies = sweep(policies, sweeps, lambda policy: dict(make_policy(policy).params()))
    return policies, {policy.label: source_of(make_policy(policy)) for policy in policies}


def make_policy(policy: PolicySpec) -> Scheduler:
    """A new one. Raises ConfigError for a policy or a parameter that there is not."""
    from mullama.errors import ConfigError, InvalidRequest
    from mullama.scheduling import registry

    try:
        return registry.create(policy.spec, policy.params)
    except InvalidRequest as error:
        raise ConfigError(f"{policy.label}: {error.message}", param="schedulers") from None


def _config(config: ServeConfig, workloads: list[Workload]) -> ServeConfig:
    """Room for the longest request where nobody said otherwise, and a queue that takes them all."""
    tokens = max(workload.longest()[1] for workload in workloads)
    return replace(
        config,
        ctx_size=config.ctx_size or -(-tokens // _CTX_STEP) * _CTX_STEP,
        max_queue=max(config.max_queue, *(len(workload.all_requests()) for workload in workloads)),
    )


def _measure(
    reference: str | None,
    config: ServeConfig,
    policies: list[PolicySpec],
    workloads: list[Workload],
    rounds: int,
) -> tuple[Engine, list[Run]]:
    """Load the model, play, close it. Returns the closed engine, which still knows what it was."""
    import asyncio

    from mullama.cli.interrupt import on_interrupt
    from mullama.cli.load_progress import find_model, load_engine
    from mullama.cli.progress import StepProgress
    from mullama.compare.runner import compare_seeds, ordinary_tokens
    from mullama.machine.neighbours import Neighbours
    from mullama.workload.prompts import Prompts

    found = find_model(reference or (config.model[0] if config.model else DEFAULT_MODEL))
    engine = load_engine(found, config)

    async def play() -> list[Run]:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None, "this is a coroutine of asyncio.run"

        def stop() -> None:
            loop.call_soon_threadsafe(task.cancel)

        with StepProgress("compare") as progress, on_interrupt(stop):
            words = ordinary_tokens(engine)
            played = [(workload, Prompts(words, workload.seed)) for workload in workloads]
            return await compare_seeds(
                engine, policies, played, rounds=rounds, progress=progress.update, busy=Neighbours().busy
            )

    try:
        return engine, asyncio.run(play())
    finally:
        engine.close()


def _provenance(engine: Engine, config: ServeConfig) -> dict[str, Any]:
    from mullama.compare.provenance import build
    from mullama.config import default_of, options
    from mullama.machine.report import provenance

    changed = {
        option.name: getattr(config, option.name)
        for option in options()
        if not option.metadata.get("secret") and getattr(config, option.name) != default_of(option)
    }
    return {
        **build(),
        "command": shlex.join(["mullama", *sys.argv[1:]]),
        "machine": provenance(),
        "model": asdict(engine.info),
        "computing": engine.computing(),
        "options": changed,
    }
