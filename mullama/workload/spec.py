"""From a text such as ``poisson:rate=2,n=200`` or ``azure:trace.csv,n=500`` to a workload."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mullama.errors import ConfigError
from mullama.workload.base import Workload
from mullama.workload.recorded import read_trace
from mullama.workload.synthetic import bursty, closed, poisson, two_class
from mullama.workload.traces import OPTIONS, azure, mooncake

SYNTHETIC: dict[str, Callable[[str, int], Workload]] = {
    "poisson": poisson,
    "bursty": bursty,
    "two-class": two_class,
    "closed": closed,
}
FILES: dict[str, Callable[[str, str], Workload]] = {"azure": azure, "mooncake": mooncake}
KINDS = (*SYNTHETIC, *FILES, "file")

#: A path ends where the first option begins, so that it may hold commas itself.
_PATH = re.compile(rf"(.*?)(?:,\s*((?:{'|'.join((*OPTIONS, 'block'))})\s*=.*))?", re.DOTALL)


def parse_workload(spec: str, seed: int = 0) -> Workload:
    """The workload that a spec describes (docs/compare.md has the grammar); the same for the same seed, on any machine.

    Traces from files do not depend on the seed. Raises ConfigError that names what is wrong and what there is.
    """
    kind, colon, rest = spec.strip().partition(":")
    kind = kind.strip()
    if kind not in KINDS:
        raise ConfigError(f"there is no workload '{kind}'; there are {', '.join(KINDS)}", param="trace")
    if kind in SYNTHETIC:
        workload = SYNTHETIC[kind](rest, seed)
    elif not colon or not rest.strip():
        raise ConfigError(f"{kind} needs a file: {kind}:PATH", param="trace")
    elif kind in FILES:
        match = _PATH.fullmatch(rest)
        assert match is not None, "the first group takes anything"
        workload = FILES[kind](match[1].strip(), match[2] or "")
    else:
        return read_trace(Path(rest.strip()))  # it says itself what it was made from
    return replace(workload, spec=spec.strip(), seed=seed)


def parse_seeds(spec: str, seed: int, n: int) -> list[Workload]:
    """The workloads of ``n`` seeds from ``seed`` on. Raises ConfigError, also where the seed changes nothing."""
    found = [parse_workload(spec, seed + i) for i in range(n)]
    if n > 1 and found[0].requests == found[1].requests and found[0].clients == found[1].clients:
        raise ConfigError(
            f"'{spec}' is the same for every seed, so that several seeds say nothing; several rounds do", param="seeds"
        )
    return found
