"""``mullama swap``: other weights for a model that a server is serving."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import click

from mullama.cli.progress import StepProgress
from mullama.cli.remote import Server, server_options
from mullama.cli.table import printable


@click.command(short_help="Change the weights of a served model.")
@click.argument("name")
@click.argument("to", metavar="TO")
@click.option(
    "--kv",
    type=click.Choice(["auto", "carry", "recompute", "drain"]),
    default="auto",
    show_default=True,
    help="What becomes of the KV cache.",
)
@click.option(
    "--gap",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Whether the old weights may be freed first where memory does not hold both.",
)
@click.option("--kl", is_flag=True, help="Measure how far the new weights are from the old ones; takes seconds more.")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str, to: str, kv: str, gap: str, kl: bool, url: str, key: str, as_json: bool) -> None:
    """Let the served model NAME go on with other weights; no request is dropped.

    TO is a quantisation such as Q4_0 (made when there is none), a reference, or a file of the server.
    """
    server = Server(url, key)
    path = f"/internal/models/{quote(name, safe='/:')}/swap"
    with _Steps(f"{name} to {to}") as steps:
        found = server.watch(path, {"to": to, "kv": kv, "gap": gap, "kl": kl}, steps.show)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(_line(found))


class _Steps(StepProgress):
    """The phases of a swap on stderr, and once what is made for it."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self._is_told = False

    def show(self, record: dict[str, Any]) -> None:
        if record.get("note") and not self._is_told:
            self._is_told = True
            click.echo(f"note: {printable(record['note'])}", err=True)
        self.update(printable(record["phase"]), record.get("done") or 0, record.get("total"))


def _line(found: dict[str, Any]) -> str:
    pause = "nothing ran" if found["pause_ms"] is None else f"a pause of {found['pause_ms']:.1f} ms"
    if found.get("gap_ms") is not None:
        pause += f", a gap of {found['gap_ms']:.0f} ms without weights"
    apart = "" if found.get("kl") is None else f"; {_apart(found['kl'], found['kl_detail'])}"
    moved, recomputed = found["sequences_moved"], found["sequences_recomputed"]
    return (
        f"{found['model']}: {found['weights_from']} -> {found['weights_to']} in {found['total_ms']:.0f} ms "
        f"({found['kv']}: {pause}, {moved} sequences went on, {recomputed} are computed again){apart}"
    )


def _apart(kl: float, detail: dict[str, Any]) -> str:
    on = "carried KV" if detail["carried"] is not None else "KV of their own"
    return (
        f"{kl:.4f} nats from the old weights on {on}, the same best token at {detail['same_top']:.0%} of "
        f"{detail['tokens']} places"
    )
