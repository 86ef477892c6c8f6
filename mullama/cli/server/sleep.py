"""``mullama sleep``: a served model gives up its weights and keeps its cached KV."""

from __future__ import annotations

import json
from urllib.parse import quote

import click

from mullama.cli.remote import Server, server_options


@click.command(short_help="Let a served model sleep until it is asked for.")
@click.argument("name")
@click.option(
    "--level",
    type=click.Choice(["host", "disk"]),
    default=None,
    help="Where its cached KV waits; none: what the server's --sleep-level says.",
)
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str, level: str | None, url: str, key: str, as_json: bool) -> None:
    """Let the idle model NAME give up its weights; the next request for it wakes it."""
    body = {} if level is None else {"level": level}
    found = Server(url, key).post(f"/internal/models/{quote(name, safe='/:')}/sleep", body, timeout_s=None)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    held = found["asleep"]
    if held is None:
        click.echo(f"{found['name']}: {found['state']}")
        return
    click.echo(
        f"{found['name']}: asleep ({held['level']}), {held['tokens']} tokens of KV kept, "
        f"{held['host_bytes'] / 1e6:.0f} MB in host memory, {held['disk_bytes'] / 1e6:.0f} MB on disk"
    )
