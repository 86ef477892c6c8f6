"""``NAME=VALUE`` texts of a command line as the parameters of a policy."""

from __future__ import annotations

from collections.abc import Iterable

from mullama.errors import ConfigError


def parse_args(texts: Iterable[str], option: str = "scheduler_arg") -> dict[str, str]:
    """Names and values, in order; the policy converts and checks the values. Raises ConfigError."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name.strip() or not equals:
            raise ConfigError(f"a policy's parameter is given as NAME=VALUE, not '{text}'", param=option)
        found[name.strip().replace("-", "_")] = value.strip()
    return found
