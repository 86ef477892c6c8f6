"""``mullama version``."""

from __future__ import annotations

import platform
import sys

import click

from mullama.cli.options import echo_json, json_option
from mullama.installation import VERSION, llama_commit


@click.command(short_help="Print the version.")
@json_option
def command(as_json: bool) -> None:
    """Print the versions of mullama, its llama.cpp, and Python."""
    versions = {
        "mullama": VERSION,
        "llama.cpp": llama_commit(),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }
    if as_json:
        echo_json(versions)
        return
    for name, version in versions.items():
        click.echo(f"{name:<10} {version or 'unknown'}")
