"""``mullama ps``: what a running server has loaded."""

from __future__ import annotations

import json
from typing import Any

import click

from mullama.cli.remote import DEFAULT_URL, Server, server_options
from mullama.cli.table import print_table


@click.command(short_help="Show the models of a running server.")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(url: str, key: str, as_json: bool) -> None:
    """Show what a running server serves: state, memory, requests, tokens a second, idle time, keep-alive."""
    found = Server(url, key).get("/internal/models")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    rows = [_row(model) for model in found["models"]]
    if not rows:
        click.echo("no models")
        return
    print_table(("NAME", "STATE", "WEIGHTS", "MEMORY", "RUNNING", "REQUESTS", "TOK/S", "IDLE", "KEEP ALIVE"), rows)


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    memory = model.get("memory_bytes")
    speed = model.get("tokens_per_second")
    idle = model.get("idle_s")
    return (
        model["name"],
        _state(model),
        model.get("weights") or "-",
        f"{memory / 1e6:.0f} MB" if memory else "-",
        str(model["in_use"]),
        str(model["requests"]),
        f"{speed:.0f}" if speed else "-",
        f"{idle:.0f} s" if idle is not None else "-",
        "for ever" if model["keep_alive_s"] is None else f"{model['keep_alive_s']:.0f} s",
    )


def _state(model: dict[str, Any]) -> str:
    asleep = model.get("asleep")
    state = str(model["state"])
    if asleep is not None:
        state += f" ({asleep['level']}, {asleep['tokens']} tokens)"
    return state + (" (pinned)" if model["pinned"] else "")


__all__ = ["DEFAULT_URL", "command"]
