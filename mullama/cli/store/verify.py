"""``mullama verify``."""

from __future__ import annotations

import click

from mullama.cli.options import echo_json, json_option


@click.command(short_help="Check the models in the store for damage.")
@click.argument("names", metavar="[NAME...]", nargs=-1)
@json_option
def command(names: tuple[str, ...], as_json: bool) -> int:
    """Read the models in the store (default: all) and compare them with their checksums.

    A damaged file is set aside and not used any more. Exit status 1 when there is one, or a file is missing.
    """
    from mullama.cli.progress import PullProgress
    from mullama.files import human_size
    from mullama.models.store.store import Store
    from mullama.models.store.upkeep import DAMAGED, SOUND, entry_of, verify

    store = Store()
    # All are known before the first is read.
    entries = {e.key: e for e in [entry_of(store, name) for name in names]} if names else {}
    results: dict[str, str] = {}
    seen: dict[str, str] = {}
    for entry in list(entries.values()) if names else store.entries():
        if entry.sha256 not in seen:  # a file with several names is read once
            with PullProgress(entry.key) as progress:
                seen[entry.sha256] = verify(store, entry, progress)
        results[entry.key] = seen[entry.sha256]
        if not as_json:
            click.echo(f"{entry.key}: {results[entry.key]}, {human_size(entry.size)}")
            if results[entry.key] == DAMAGED:
                click.echo(f"  set aside; fetch it again with: mullama pull --force {entry.key}", err=True)
    if as_json:
        echo_json([{"name": key, "status": status} for key, status in results.items()])
    elif not results:
        click.echo("the store is empty", err=True)
    return 0 if all(status == SOUND for status in results.values()) else 1
