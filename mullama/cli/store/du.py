"""``mullama du``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mullama.cli.options import echo_json, json_option

if TYPE_CHECKING:
    from mullama.models.store.upkeep import Usage


@click.command(short_help="Show what the store takes on disk.")
@json_option
def command(as_json: bool) -> None:
    """Show what each model takes on disk, what several names share counted once, and what is free."""
    from mullama.models.store.store import Store
    from mullama.models.store.upkeep import usage

    store = Store()
    found = usage(store)
    if as_json:
        sums = {name: value for name, value in asdict(found).items() if name != "models"}
        models = [{"name": e.key, "size": size, "own": own, "place": e.place} for e, size, own in found.models]
        echo_json({"root": str(store.root), "models": models, **sums})
        return
    _print(found)


def _print(found: Usage) -> None:
    from mullama.cli.table import print_table
    from mullama.files import human_size

    if found.models:
        rows = [
            (e.key, human_size(size), human_size(own), "the hub's cache" if e.place is not None else "the store")
            for e, size, own in found.models
        ]
        print_table(("NAME", "SIZE", "OWN", "WHERE"), rows)
        click.echo()
    notes = [f"{human_size(found.elsewhere)} of it in the hub's cache"] if found.elsewhere else []
    notes += [f"{human_size(found.unfinished)} of unfinished downloads"] if found.unfinished else []
    notes += [f"{human_size(found.quarantine)} set aside as damaged"] if found.quarantine else []
    also = f" ({', '.join(notes)})" if notes else ""
    click.echo(f"in all {human_size(found.total)}{also}; {human_size(found.free)} free on the disk")
