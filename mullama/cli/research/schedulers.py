"""``mullama schedulers``."""

from __future__ import annotations

import textwrap
from typing import Any

import click

from mullama.cli.options import echo_json, json_option


@click.command(short_help="List the scheduling policies, or show one's parameters.")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the scheduling policies that serve --scheduler knows, or show one with its parameters.

    NAME may also be FILE.py:CLASS or package.module:CLASS.
    """
    from mullama.scheduling.registry import describe, describe_all

    if name is not None:
        policy = describe(name)
        if as_json:
            echo_json(policy)
        else:
            _print(policy)
        return
    policies = describe_all()
    if as_json:
        echo_json(policies)
        return
    from mullama.cli.table import print_table, printable

    rows = [
        (policy["name"], printable(policy.get("summary") or f"broken: {policy.get('error')}")) for policy in policies
    ]
    print_table(("NAME", "WHAT IT DOES"), rows)


def _print(policy: dict[str, Any]) -> None:
    from mullama.cli.table import print_table, printable

    click.echo(printable(f"{policy['name']}: {policy['summary']}"))
    if policy["source"]:
        click.echo(
            textwrap.fill(printable(policy["source"]), 100, initial_indent="after: ", subsequent_indent="       ")
        )
    if not policy["params"]:
        return
    click.echo()
    rows = [(p["name"], _shown(p["default"]), p["range"], p["help"]) for p in policy["params"]]
    print_table(("PARAMETER", "DEFAULT", "RANGE", "MEANING"), [tuple(map(printable, row)) for row in rows])


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
