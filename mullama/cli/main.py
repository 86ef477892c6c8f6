"""The program ``mullama``: finds the command, and turns every error into one line and an exit status.

0: done. 1: it failed, one line on stderr says why; several where several things are wrong with the machine.
2: wrong usage or configuration. 130: Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import cast

import click

from mullama.errors import ConfigError, MachineUnfit, MullamaError

#: The commands in the order ``mullama --help`` shows them, by the folder of ``mullama.cli`` that has ``NAME.py``.
FOLDERS = {
    "server.": ("serve", "ps", "swap", "sleep", "wake", "lora", "batch"),
    "talk.": ("run", "embed"),
    "store.": ("pull", "list", "show", "fit", "quantize", "cp", "du", "verify", "rm"),
    "research.": ("schedulers", "compare", "simulate", "calibrate"),
}
MODULES = {name: f"mullama.cli.{folder}{name}" for folder, names in FOLDERS.items() for name in names}
MODULES |= {"doctor": "mullama.cli.server.doctor", "version": "mullama.cli.version"}
COMMANDS = tuple(MODULES)


class Commands(click.Group):
    """Imports the module of a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return cast(click.Command, importlib.import_module(MODULES[name]).command)


def _print_version(context: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from mullama.installation import VERSION, llama_commit

        click.echo(f"mullama {VERSION} (llama.cpp {(llama_commit() or 'unknown')[:9]})")
        context.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def cli() -> None:
    """Serve GGUF models with llama.cpp, with every decision of the server visible and replaceable."""
    from mullama import logs

    logs.set_up("warning")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status. Errors of mullama never become a traceback."""
    try:
        status = cli.main(args=None if argv is None else list(argv), prog_name="mullama", standalone_mode=False)
    except click.Abort:  # click's form of KeyboardInterrupt
        return 130
    except KeyboardInterrupt:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except MachineUnfit as error:
        return max(_fail(fault, 1) for fault in error.faults)
    except MullamaError as error:
        return _fail(error.message, 2 if isinstance(error, ConfigError) else 1)
    except OSError as error:  # the machine's fault, not the program's
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    from mullama.cli.table import printable

    line = printable(" ".join(message.split()))
    click.echo(f"{click.style('error:', fg='red')} {line}", err=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
