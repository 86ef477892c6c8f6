"""``mullama lora``: LoRA adapters of a model that a server is serving."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import click

from mullama.cli.remote import Server, server_options
from mullama.cli.table import print_table, printable
from mullama.files import human_size
from mullama.home import expand

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(short_help="Load, list and unload LoRA adapters of a served model.")
def command() -> None:
    """LoRA adapters of the served model NAME. Requests use them as "NAME+ID", or by their field lora."""


@command.command("list")
@click.argument("name")
@server_options
@_as_json
def list_(name: str, url: str, key: str, as_json: bool) -> None:
    """List the adapters of NAME."""
    found = Server(url, key).get(_path(name))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found["adapters"]:
        click.echo("no adapters")
        return
    rows = [
        (
            *(one["id"], f"{one['scale']:g}", str(one["rank"]), human_size(one["size_bytes"])),
            *(str(one["requests"]), printable(one.get("path") or "-")),
        )
        for one in found["adapters"]
    ]
    print_table(("ID", "SCALE", "RANK", "SIZE", "REQUESTS", "FILE"), rows)


@command.command()
@click.argument("name")
@click.argument("file", metavar="FILE|REFERENCE")
@click.option("--id", "adapter", help="By which requests name it; default: the file's name.", metavar="ID")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Where a request names none.")
@server_options
@_as_json
def load(name: str, file: str, adapter: str | None, scale: float, url: str, key: str, as_json: bool) -> None:
    """Load an adapter onto NAME, from a file that the server can read or from a reference."""
    here = expand(file)
    body: dict[str, Any] = {"path": str(here.resolve())} if here.is_file() else {"reference": file}
    body |= {"scale": scale} | ({"id": adapter} if adapter is not None else {})
    found = Server(url, key).post(_path(name), body)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"{name}+{found['id']}: {human_size(found['size_bytes'])}, rank {found['rank']}, {found['path']}")


@command.command()
@click.argument("name")
@click.argument("adapter", metavar="ID")
@server_options
def unload(name: str, adapter: str, url: str, key: str) -> None:
    """Unload the adapter ID of NAME; refused while a request uses it."""
    Server(url, key).delete(f"{_path(name)}/{quote(adapter, safe='')}")
    click.echo(f"{name}+{adapter}: unloaded")


def _path(name: str) -> str:
    return f"/internal/models/{quote(name, safe='/:')}/adapters"
