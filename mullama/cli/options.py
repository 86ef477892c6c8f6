"""click options made from ``ServeConfig``, so that a flag is described in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any, TypeVar

import click

from mullama.config import ENV_PREFIX, GROUPS, ServeConfig, default_of, load_config, option_type, options
from mullama.files import parse_size

F = TypeVar("F", bound=Callable[..., Any])


class Grouped(click.Command):
    """A command whose help shows the options of ``ServeConfig`` in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        titles: dict[str, str] = {}
        title = ""
        for opt in options():
            title = titles[opt.name] = GROUPS.get(opt.name, title)
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in (*titles.values(), "Other options")}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                rows[titles.get(param.name or "", "Other options")].append(record)
        for title, records in rows.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Size(click.ParamType[int]):
    """A whole number, which may be written as a size: ``4k`` tokens are 4096, ``8GB`` 8 * 10**9 bytes."""

    name = "size"

    def __init__(self, low: int, high: int, *, unit: str = "tokens") -> None:
        self._low, self._high, self._unit = low, high, unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = value if isinstance(value, int) else parse_size(str(value), binary=self._unit == "tokens")
        except ValueError:
            self.fail(f"'{value}' is not a number of {self._unit}", param, ctx)
        if not self._low <= number <= self._high:
            self.fail(f"{value} is not in the range {self._low} to {self._high}", param, ctx)
        return number


def flag_name(opt: Field[Any]) -> str:
    return f"--{opt.name.replace('_', '-')}"


def config_options(names: Iterable[str] | None = None) -> Callable[[F], F]:
    """Decorate a command with the options of ``ServeConfig`` (all, or those in ``names``) and ``--config``.

    Values are passed on as texts, and only if given: ``load_config`` is the one that checks them.
    """
    wanted = None if names is None else set(names)

    def decorate(function: F) -> F:
        for opt in reversed(options()):
            if wanted is None or opt.name in wanted:
                function = _option(opt)(function)
        file = click.Path(path_type=Path, dir_okay=False)
        text = f"TOML file with these options.  [env: {ENV_PREFIX}CONFIG]"
        return click.option("--config", "config_file", metavar="FILE", type=file, help=text)(function)

    return decorate


def config_from(params: Mapping[str, Any]) -> ServeConfig:
    """The configuration of a command decorated with :func:`config_options`. Raises ConfigError."""
    known = {opt.name for opt in options()}
    given = {name: value for name, value in params.items() if name in known and value is not None and value != ()}
    config = load_config(given, file=params.get("config_file"))
    _warn_of_visible_keys(given)
    return config


def _warn_of_visible_keys(given: Mapping[str, Any]) -> None:
    for opt in options():
        values = given.get(opt.name, ()) if opt.metadata.get("secret") else ()
        if any(not text.startswith("@") for text in ([values] if isinstance(values, str) else values)):
            flag, variable = flag_name(opt), f"{ENV_PREFIX}{opt.name.upper()}"
            click.echo(
                f"warning: other users of this machine can see {flag} in the list of processes; "
                f"use {variable} or {flag} @FILE",
                err=True,
            )


def _option(opt: Field[Any]) -> Callable[[F], F]:
    kind, flag, meta = option_type(opt), flag_name(opt), opt.metadata
    help_text = f"{meta['help']}.  {_origin(opt)}"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", opt.name, default=None, help=help_text)
    metavar = meta.get("metavar") or "|".join(meta.get("choices", ())) or {int: "N", float: "SECONDS"}.get(kind, "TEXT")
    return click.option(flag, opt.name, multiple=kind == list[str], default=None, metavar=metavar, help=help_text)


def _origin(opt: Field[Any]) -> str:
    default = default_of(opt)
    shown = "" if default in ("", []) else f"default: {str(default).lower() if default in (True, False) else default}; "
    return f"[{shown}env: {ENV_PREFIX}{opt.name.upper()}]"


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def echo_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
