"""``--sweep``: one entry of a comparison becomes one for each value of a parameter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from mullama.compare.runner import PolicySpec
from mullama.errors import ConfigError
from mullama.workload.grammar import split

MOST = 200  # entries that a sweep may make

#: The names of a policy's parameters.
ParamsOf = Callable[[PolicySpec], Collection[str]]


def sweep(policies: Sequence[PolicySpec], sweeps: Sequence[str], params_of: ParamsOf) -> list[PolicySpec]:
    """Each entry with every combination of the values that concern it; the others stay as they are.

    A sweep is ``PARAM=VALUE,VALUE`` for all policies that have the parameter, or ``POLICY.PARAM=VALUE,VALUE`` for one.
    What an entry says in parentheses is not swept. Raises ConfigError.
    """
    wanted = [_parse(text) for text in sweeps]
    used: set[int] = set()
    found: list[PolicySpec] = []
    for policy in policies:
        known = params_of(policy) if wanted else ()
        axes: list[list[tuple[str, str]]] = []
        for number, (spec, param, values) in enumerate(wanted):
            if spec not in (None, policy.spec) or param not in known:
                continue
            used.add(number)
            if param not in policy.params:
                axes.append([(param, value) for value in values])
        for combination in itertools.product(*axes):
            found.append(_with(policy, dict(combination)))
    for number, text in enumerate(sweeps):
        if number not in used:
            spec, param, _ = wanted[number]
            who = f"'{spec}' with" if spec else "policy with"
            raise ConfigError(f"--sweep: {text}: no {who} a parameter '{param}' is compared", param="sweep")
    if len(found) > MOST:
        raise ConfigError(f"--sweep: {len(found)} entries are too many; {MOST} are allowed", param="sweep")
    labels = [one.label for one in found]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"--sweep: {twice} is there twice", param="sweep")
    return found


def _parse(text: str) -> tuple[str | None, str, list[str]]:
    name, equals, values = text.partition("=")
    spec, dot, param = name.strip().rpartition(".")
    found = [value.strip() for value in split(values)] if equals else []
    if not equals or not param or (dot and not spec) or not found or not all(found):
        raise ConfigError(f"--sweep: '{text}' is not PARAM=VALUE,VALUE or POLICY.PARAM=VALUE,VALUE", param="sweep")
    return (spec if dot else None), param, list(dict.fromkeys(found))


def _with(policy: PolicySpec, more: dict[str, str]) -> PolicySpec:
    if not more:
        return policy
    inner = policy.label.removeprefix(policy.spec).strip("()")
    parts = [*([inner] if inner else []), *(f"{name}={value}" for name, value in more.items())]
    return replace(policy, label=f"{policy.spec}({','.join(parts)})", params={**policy.params, **more})
