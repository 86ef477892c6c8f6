"""``mullama fit``, and how an estimate is printed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mullama.cli.options import Size, echo_json, json_option

if TYPE_CHECKING:
    from mullama.models.files.estimate import Estimate


@click.command(short_help="Say whether a model fits this machine, and with which sizes.")
@click.argument("model")
@click.option("--ctx", "n_ctx", type=Size(1, 1 << 24), metavar="N", help="Tokens of context a request may use.")
@click.option("--parallel", "n_parallel", type=click.IntRange(1, 256), metavar="N", help="Requests that run at once.")
@click.option("--quant", metavar="QUANT", help="The variant in this quantisation.")
@json_option
def command(model: str, n_ctx: int | None, n_parallel: int | None, quant: str | None, as_json: bool) -> int:
    """Say whether MODEL fits the memory that is free, and the largest sizes that do.

    Nothing is loaded: the numbers come from the file's header. Without --ctx and --parallel they are those that serve
    starts from. The exit status is 1 when it does not fit.
    """
    from mullama.cli.table import print_table
    from mullama.engine.memory import sizing
    from mullama.files import human_size
    from mullama.machine import memory
    from mullama.models.files import gguf
    from mullama.models.files.estimate import estimate, fit, is_enough, verdict, way_out
    from mullama.models.files.shape import shape_of
    from mullama.models.parse import parse_spec
    from mullama.models.resolve import in_quant
    from mullama.models.store.store import Store

    store = Store()
    spec = parse_spec(model, store.lookup)
    if quant:
        spec = in_quant(model, spec, quant, store)
    path = store.resolve(spec.reference)
    header = gguf.check(path)
    trained = shape_of(header, str(path)).n_ctx_train
    n_ctx = n_ctx or min(trained or sizing.DEFAULT_CTX, sizing.DEFAULT_CTX)
    n_parallel = n_parallel or sizing.DEFAULT_PARALLEL
    needs = estimate(header, n_ctx=n_ctx, n_parallel=n_parallel)
    free = memory.available_memory()
    fits = fit(header, free, n_ctx=n_ctx, n_parallel=n_parallel) if free is not None else []
    does_fit = is_enough(needs, free)
    if as_json:
        echo_json(
            {
                "fits": does_fit,
                "free": free,
                "estimate": needs.to_json(),
                "largest": [asdict(row) for row in fits],
            }
        )
        return 0 if does_fit else 1
    click.echo(verdict(needs, free, spec.name or spec.reference.key))
    print_estimate(needs)
    if fits:
        click.echo("")
        print_table(
            ("KV TYPE", "MEMORY", "FITS", f"LARGEST CONTEXT (x {n_parallel})", f"MOST PARALLEL (x {needs.n_ctx})"),
            [
                (
                    row.kv_type,
                    human_size(row.total),
                    "yes" if row.fits else "no",
                    str(row.n_ctx or "none"),
                    str(row.n_parallel or "none"),
                )
                for row in fits
            ],
        )
    if not does_fit:
        click.echo(f"\n{way_out(needs)}")
    return 0 if does_fit else 1


def print_estimate(needs: Estimate) -> None:
    """The parts of an estimate, a line each."""
    from mullama.files import human_size

    parts = {
        "weights, mapped": needs.weights_mapped,
        "weights, copied": needs.weights_copied,
        **{f"KV, {name}": size for name, size in needs.kv.items()},
        "compute buffers": needs.compute,
        "logits": needs.output,
        "adapters": needs.adapters,
        "total": needs.total,
    }
    for name, size in parts.items():
        if size:
            click.echo(f"  {name:<18}{human_size(size)}")
