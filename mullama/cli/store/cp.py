"""``mullama cp``."""

from __future__ import annotations

import click

from mullama.cli.options import echo_json, json_option


@click.command(short_help="Give a model in the store another name.")
@click.argument("old")
@click.argument("new")
@json_option
def command(old: str, new: str, as_json: bool) -> None:
    """Give the model OLD the name NEW as well. The file is not copied; it goes with the last of its names."""
    from mullama.models.store.store import Store
    from mullama.models.store.upkeep import entry_of

    store = Store()
    entry = store.copy(entry_of(store, old).key, new)
    if as_json:
        echo_json({"name": entry.key, "sha256": entry.sha256, "size": entry.size, "path": str(store.path_of(entry))})
        return
    click.echo(f"{entry.key} is another name of {old}")
