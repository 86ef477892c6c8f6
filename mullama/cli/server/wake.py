"""``mullama wake``: the weights of a sleeping model come back before somebody asks for it."""

from __future__ import annotations

import json
from urllib.parse import quote

import click

from mullama.cli.remote import Server, server_options


@click.command(short_help="Wake a sleeping model.")
@click.argument("name")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str, url: str, key: str, as_json: bool) -> None:
    """Load the weights of the sleeping model NAME again. One that is not loaded at all is loaded."""
    found = Server(url, key).post(f"/internal/models/{quote(name, safe='/:')}/wake", {}, timeout_s=None)
    click.echo(json.dumps(found, indent=2) if as_json else f"{found['name']}: {found['state']}")
