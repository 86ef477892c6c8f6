"""``mullama calibrate``: measure what steps cost on this machine, for ``mullama simulate``."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mullama.cli.options import config_from, config_options
from mullama.config import DEFAULT_MODEL
from mullama.files import STDIO, counted
from mullama.machine.neighbours import LOUD

if TYPE_CHECKING:
    from mullama.config import ServeConfig
    from mullama.engine.engine import Engine
    from mullama.models.resolve import ResolvedModel
    from mullama.simulation import CostModel

#: Of the options of ``serve``, those that change what a decode costs.
CONFIG_OPTIONS = (
    *("ctx_size", "parallel", "threads", "batch_size", "flash_attn"),
    *("mmap", "gpu_layers", "device", "split_mode", "tensor_split", "memory_check"),
)


LOOK_S = 0.5  # how long the machine is looked at before anything is measured


@click.command(short_help="Measure what steps cost on this machine, for simulate.")
@click.option("--model", "reference", metavar="MODEL", help="model to measure  [default: the default model]")
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="cost file to write; -: to stdout",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1, 3600),
    default=30.0,
    show_default=True,
    help="about how long decodes are measured; the engine's overheads take some ten more",
)
@config_options(CONFIG_OPTIONS)
def command(reference: str | None, out: Path, seconds: float, **params: Any) -> None:
    """Measure decodes of one to all sequences and prompt chunks at several contexts, then a running engine.

    The machine should have nothing else to do: what disturbs the measurement is in the costs.
    """
    from mullama.cli.load_progress import find_model
    from mullama.cli.progress import StepProgress
    from mullama.machine.neighbours import Neighbours
    from mullama.simulation import write_costs
    from mullama.simulation.cost_model.calibration import with_about

    config = replace(config_from(params), threads_fixed=True)
    if out != STDIO:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()  # a file that cannot be written is no surprise after a minute's work
    found = find_model(reference or (config.model[0] if config.model else DEFAULT_MODEL))
    neighbours = Neighbours()
    try:
        time.sleep(LOOK_S)
        _warn(neighbours.busy(), "are keeping", "wait until they have ended, or")
        with StepProgress("calibrate") as progress:
            costs = _measure(found, config, seconds, progress.update)
        costs = with_about(costs, {**costs.about, "neighbours": round(neighbours.busy(), 2)})
    except BaseException:
        if out != STDIO and out.stat().st_size == 0:
            out.unlink()
        raise
    write_costs(out, costs)
    _show(costs, out)
    _warn(costs.about["neighbours"])


def _warn(busy: float, kept: str = "kept", advice: str = "the costs are too high for it;") -> None:
    if busy > LOUD:
        click.echo(
            f"warning: other processes {kept} {busy:.1f} cores busy: {advice} calibrate again on a quiet machine",
            err=True,
        )


def _measure(found: ResolvedModel, config: ServeConfig, seconds: float, progress: Any) -> CostModel:
    from mullama.cli.load_progress import load_engine
    from mullama.engine.memory import fits
    from mullama.engine.weights import load
    from mullama.simulation.cost_model.calibration import measure_core, measure_engine, with_about

    sizes = fits.sizes_for(found.path, config, found.name)
    model = load.load_model(found.path, config, None)
    try:
        core = load.make_core(model, found.name, config, sizes=sizes)
        try:
            costs = measure_core(core, model.n_vocab, seconds=seconds, progress=progress)
        finally:
            core.close()
    finally:
        model.close()
    engine = load_engine(found, config)
    try:
        costs = measure_engine(engine, costs, progress=progress)
        return with_about(costs, _about(engine, config))
    finally:
        engine.close()


def _about(engine: Engine, config: ServeConfig) -> dict[str, Any]:
    from mullama.compare.provenance import build
    from mullama.machine.cores import usable_threads
    from mullama.machine.report import provenance

    info = engine.info
    return {
        "model": {
            "name": info.name,
            "description": info.description,
            "size_bytes": info.size_bytes,
            "n_params": info.n_params,
            "n_parallel": info.n_parallel,
            "n_ctx": info.n_ctx,
            "kv_host_tokens": engine.planning.host_tokens,
        },
        "machine": provenance(),
        "threads": config.threads or usable_threads(),
        "batch_size": config.batch_size,
        "flash_attn": config.flash_attn,
        "computing": engine.computing(),
        **build(),
    }


def _show(costs: CostModel, out: Path) -> None:
    """The main figures, as a check."""
    echo = functools.partial(click.echo, err=out == STDIO)
    rows = [int(n) for n in costs.decode.x]
    chunk = int(costs.prefill.x[-1])
    echo(f"{out}: {costs.about['model']['name']}, {counted(costs.about['threads'], 'thread')}; milliseconds")
    echo("  decode of " + ", ".join(f"{n}: {costs.decode_ns(n, 256, 256) / 1e6:.2f}" for n in rows) + " sequences")
    echo(f"  prompt of {chunk} tokens: {costs.prefill_ns(chunk, 0) / 1e6:.1f}")
    echo(
        f"  step {costs.step_ns / 1e6:.3f} + {costs.token_ns / 1e6:.3f} a token, plan {costs.plan_ns / 1e6:.3f}, "
        f"new graph {costs.rebuild_ns / 1e6:.3f}, waking {costs.wake_ns / 1e6:.3f}"
    )
    echo(
        f"  measured: 1 to {counted(rows[-1], 'sequence')} with up to {costs.decode.y[-1]:,.0f} tokens each, "
        f"prompt chunks of up to {chunk:,} tokens behind up to {costs.prefill.y[-1]:,.0f}"
    )
    slots = (costs.about.get("model") or {}).get("n_parallel") or rows[-1]
    if slots > rows[-1]:
        echo(f"  beyond {counted(rows[-1], 'sequence')} of the {slots} slots costs are extrapolated; raise --seconds")
