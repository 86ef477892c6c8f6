"""``mullama version``."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import click

from mullama.cli.options import echo_json, json_option
from mullama.installation import VERSION


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


def llama_commit() -> str | None:
    """The upstream commit of the llama.cpp in use, from the lock file: installed beside it, or of the checkout."""
    import tomllib

    package = Path(__file__).resolve().parent.parent
    for file in (package / "lib" / "llama.lock.toml", package.parent / "vendor" / "llama.lock.toml"):
        try:
            return str(tomllib.loads(file.read_text(encoding="utf-8"))["upstream_commit"])
        except (OSError, KeyError, tomllib.TOMLDecodeError):
            continue
    return None
