"""``mullama list``."""

from __future__ import annotations

import click

from mullama.cli.options import echo_json, json_option


@click.command(short_help="List the models in the store.")
@json_option
def command(as_json: bool) -> None:
    """List the models in the store."""
    from mullama.cli.table import print_table, printable
    from mullama.files import human_size
    from mullama.models.store.store import Store

    store = Store()
    entries = store.list()
    if as_json:
        echo_json([{"name": e.key, **e.to_json(), "path": str(store.path_of(e))} for e in entries])
        return
    if not entries:
        click.echo("the store is empty; fetch a model with: mullama pull smollm2:135m", err=True)
        return
    rows = [
        (
            e.key,
            human_size(e.size),
            e.quant or "-",
            e.sha256[:12],
            printable(e.license or "-"),
            e.pulled_at[:10],
        )
        for e in entries
    ]
    print_table(("NAME", "SIZE", "QUANT", "SHA256", "LICENCE", "PULLED"), rows)
