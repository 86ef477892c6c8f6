"""Writes docs/configuration.md from ``ServeConfig``: ``python -m mullama.cli.config_docs docs/configuration.md``."""

from __future__ import annotations

import sys
from dataclasses import Field
from pathlib import Path
from typing import Any

from mullama.config import ENV_PREFIX, default_of, option_type, options

_INTRO = f"""# Configuration

<!-- Made by `python -m mullama.cli.config_docs docs/configuration.md` from mullama/config.py; do not edit. -->

Every option of `mullama serve` can be given in three ways. A flag wins over the environment, the environment over
the file, the file over the default.

- as a flag: `--ctx-size 4096`; repeat the flag where several values are taken; `--no-` switches a switch off
- as an environment variable: `{ENV_PREFIX}CTX_SIZE=4096`; several values are separated by commas, or are a
  JSON list where one of them holds a comma
- as a line of a TOML file: `ctx_size = 4096`; several values are a list. The file is named by `--config FILE` or
  `{ENV_PREFIX}CONFIG`

A value that is wrong stops the program with exit status 2 and one line that says where it came from and what would
be right. Keys (`--api-key`, `--admin-key`) belong into the environment, the TOML file, or a file of their own that the
flag names (`--api-key @FILE`, one key a line): other users of the machine can see flags. A key that is empty, as a
variable that is not set, is refused, and so is one that is given twice ([security](security.md#keys)).

| flag | variable | default | allowed | what it does |
|---|---|---|---|---|
"""

_OUTRO = f"""
Two more variables are no options of the server: `{ENV_PREFIX}HOME` is the folder of the model store (default: the
platform's cache folder, see [models](models.md)), and `{ENV_PREFIX}CONFIG` names the TOML file.

An example of a file:

```toml
model = ["smollm2:135m", "mine=./my-model.gguf"]
port = 8080
ctx_size = 4096
parallel = 8
```
"""

_KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false", list[str]: "texts"}


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    return _INTRO + "".join(_row(opt) for opt in options()) + _OUTRO


def _row(opt: Field[Any]) -> str:
    flag = f"`--{opt.name.replace('_', '-')}`"
    cells = (flag, f"`{ENV_PREFIX}{opt.name.upper()}`", _default(opt), _allowed(opt), opt.metadata["help"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _default(opt: Field[Any]) -> str:
    default = default_of(opt)
    if default in ("", []):
        return "–"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _allowed(opt: Field[Any]) -> str:
    meta = opt.metadata
    if meta.get("choices"):
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    if meta.get("pattern"):
        return f"`{meta['metavar']}`"
    kind = {"bytes": "bytes, as `8GB` or `512MiB`", "tokens": "tokens, as `4096` or `4k`"}.get(
        meta.get("unit", ""), _KINDS[option_type(opt)]
    )
    low, high = meta.get("minimum"), meta.get("maximum")
    if low is None:
        return kind
    return f"{kind}, at least {low:g}" if high is None else f"{kind}, {low} to {high}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(configuration_page(), encoding="utf-8")
