"""``mullama quantize``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from mullama.cli.options import echo_json, json_option


@click.command(short_help="Make another quantisation of a model.")
@click.argument("model")
@click.argument("type_", metavar="TYPE")
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Importance matrix, made with llama-imatrix.",
)
@click.option("--name", metavar="NAME", help="Keep it under this name; default: the model's, and the type.")
@click.option("--threads", type=click.IntRange(1, 512), metavar="N", help="Threads; default: half of the cores.")
@json_option
def command(model: str, type_: str, imatrix: Path | None, name: str | None, threads: int | None, as_json: bool) -> None:
    """Quantise MODEL to TYPE (such as Q8_0, Q4_K_M) and keep the result in the store as a variant of it.

    MODEL is in the store or a local file. It is served with --model NAME, or with --model MODEL --quant TYPE.
    """
    from mullama.cli.progress import PullProgress
    from mullama.files import human_size
    from mullama.machine.cores import usable_threads
    from mullama.models.parse import parse_spec
    from mullama.models.quantizing import quantize_variant
    from mullama.models.store.store import Store

    store = Store()
    spec = parse_spec(model, store.lookup)
    entry = None if spec.reference.is_local else store.find(spec.reference.key)
    source = entry or store.resolve(spec.reference)
    started = time.time()
    with PullProgress(model) as progress:
        made = quantize_variant(
            store,
            source,
            type_,
            progress,
            key=name or spec.name,
            imatrix=imatrix,
            n_threads=threads or max(1, usable_threads() // 2),
        )
    path = store.path_of(made)
    is_new = made.pulled_at >= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(started))
    if as_json:
        echo_json(
            {
                "name": made.key,
                "quant": made.quant,
                "variant_of": made.variant_of,
                "sha256": made.sha256,
                "size": made.size,
                "path": str(path),
                "made": is_new,
            }
        )
        return
    state = "is ready" if is_new else "is here already"
    click.echo(f"{made.key} {state}: {made.quant}, {human_size(made.size)}")
