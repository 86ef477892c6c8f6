"""``mullama rm``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mullama.cli.options import echo_json, json_option
from mullama.errors import ReferenceNotFound

if TYPE_CHECKING:
    from mullama.models.store.store import Store


@click.command(short_help="Remove models from the store.")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@json_option
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Remove models from the store. A file goes when no other name uses it; files of your own are never touched."""
    from mullama.files import human_size
    from mullama.models.store.store import Store

    store = Store()
    keys = list(dict.fromkeys(_key(name, store) for name in names))  # all are known before one is removed
    freed = {key: store.remove(key) for key in keys}
    if as_json:
        echo_json([{"name": key, "freed": size} for key, size in freed.items()])
        return
    for key, size in freed.items():
        click.echo(f"removed {key}, {human_size(size)} freed")


def _key(name: str, store: Store) -> str:
    """The store's key for what the user wrote. Raises ReferenceNotFound."""
    from mullama.models.parse import parse_reference

    for key in (name, name.lower()):
        if store.has(key):
            return key
    reference = parse_reference(name, store.lookup)
    if reference.is_local:
        raise ReferenceNotFound(f"{name} is a file of yours; mullama removes only what it pulled")
    if not store.has(reference.key):
        raise ReferenceNotFound(f"{reference.key} is not in the store")
    return reference.key
