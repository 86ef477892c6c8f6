"""The small language of workload specs: ``KIND:NAME=VALUE,NAME=VALUE``, where a value is a number, a distribution such
as ``uniform(16,64)``, or pairs such as ``flood:10,quiet:1``.

Every mistake is a ConfigError that names the option and what it may be.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mullama.errors import ConfigError

MAX_TOKENS = 1 << 22  # longest prompt or output of one request
MAX_REQUESTS = 1_000_000
MAX_SECONDS = 1e7

#: Distributions and their parameters, in order, with defaults (None: must be given).
SHAPES: dict[str, dict[str, float | None]] = {
    "uniform": {"low": None, "high": None},
    "lognormal": {"median": 128.0, "sigma": 0.6, "min": 0.0, "max": math.inf},
    "exponential": {"mean": 128.0, "min": 0.0, "max": math.inf},
}


def split(text: str) -> list[str]:
    """The parts between commas outside parentheses, trimmed."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == "," and depth <= 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return parts


def parse_number(text: str, where: str, low: float, high: float, *, whole: bool = False) -> float:
    """A finite number between ``low`` and ``high``. ``where`` begins the message and ends with the option's name."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (whole and not value.is_integer()):
        raise ConfigError(f"{where}: '{text}' is not a {'whole ' if whole else ''}number", param=_option(where))
    if not low <= value <= high:
        bounds = f"it must be between {low:g} and {high:g}"
        raise ConfigError(f"{where}: {text} is out of range; {bounds}", param=_option(where))
    return value


def _option(where: str) -> str:
    return where.split(" ")[-1]


@dataclass(slots=True, frozen=True)
class Distribution:
    """What a length or a gap is drawn from. ``shape`` is a name of SHAPES, or ``constant``."""

    shape: str
    args: Mapping[str, float]

    def seconds(self, rng: random.Random) -> float:
        """One draw, at least 0."""
        args = self.args
        if self.shape == "constant":
            return args["value"]
        if self.shape == "uniform":
            return rng.uniform(args["low"], args["high"])
        if self.shape == "lognormal":
            value = rng.lognormvariate(math.log(args["median"]), args["sigma"])
        else:
            value = rng.expovariate(1 / args["mean"])
        return min(max(value, args["min"]), args["max"])

    def tokens(self, rng: random.Random) -> int:
        """One draw as a number of tokens, at least 1; ``uniform`` includes both ends."""
        if self.shape == "uniform":
            return max(rng.randint(round(self.args["low"]), round(self.args["high"])), 1)
        return min(max(round(self.seconds(rng)), 1), MAX_TOKENS)


def parse_distribution(text: str, where: str, high: float) -> Distribution:
    """``64``, ``uniform(16,64)``, ``lognormal(median=120,sigma=0.6,max=800)``, ``exponential(90)``."""
    match = re.fullmatch(r"([a-z]+)\s*(?:\((.*)\))?", text, re.DOTALL)
    if match is None:
        if re.match(r"[-+.\d]", text):
            return Distribution("constant", {"value": parse_number(text, where, 0, high)})
        raise ConfigError(f"{where}: '{text}' is neither a number nor one of {_forms()}", param=_option(where))
    shape, inner = match[1], match[2] or ""
    if shape not in SHAPES:
        raise ConfigError(f"{where}: there is no distribution '{shape}'; there are {_forms()}", param=shape)
    args = _arguments(shape, inner, where, high)
    low, top = ("low", "high") if shape == "uniform" else ("min", "max")
    if args[low] > args[top]:
        raise ConfigError(f"{where}: {low} of {shape} is above its {top}", param=low)
    return Distribution(shape, args)


def _arguments(shape: str, text: str, where: str, high: float) -> dict[str, float]:
    names = list(SHAPES[shape])
    args: dict[str, float] = {}
    for position, part in enumerate(split(text) if text.strip() else []):
        name, equals, value = part.partition("=")
        if not equals:
            if position >= len(names):
                raise ConfigError(f"{where}: {shape} takes {', '.join(names)}, '{part}' is one too many", param=shape)
            name, value = names[position], part
        name = name.strip()
        if name not in names:
            raise ConfigError(f"{where}: {shape} has no '{name}'; it has {', '.join(names)}", param=name)
        if name in args:
            raise ConfigError(f"{where}: {name} of {shape} is given twice", param=name)
        smallest = 1e-9 if name in ("median", "mean") else 0.0
        args[name] = parse_number(value.strip(), f"{where}: {name}", smallest, 10 if name == "sigma" else high)
    for name, default in SHAPES[shape].items():
        if name not in args and default is None:
            raise ConfigError(f"{where}: {shape} needs {', '.join(names)}", param=name)
        args.setdefault(name, default if default is not None else 0.0)
    return args


def _forms() -> str:
    return ", ".join(f"{shape}({','.join(names)})" for shape, names in SHAPES.items())


class Options:
    """The ``NAME=VALUE`` parts of one spec. A part without ``=`` belongs to the option before it."""

    def __init__(self, kind: str, text: str, names: Sequence[str]) -> None:
        self.kind = kind
        self._values: dict[str, str] = {}
        name = ""
        for part in split(text) if text.strip() else []:
            head, equals, value = part.partition("=")
            if not equals or "(" in head:
                if not name:
                    raise ConfigError(f"{kind}: '{part}' is not NAME=VALUE; names: {', '.join(names)}", param=part)
                self._values[name] += f",{part}"
                continue
            name = head.strip()
            if name not in names:
                raise ConfigError(f"{kind}: unknown option '{name}'; there are {', '.join(names)}", param=name)
            if name in self._values:
                raise ConfigError(f"{kind}: {name} is given twice", param=name)
            self._values[name] = value.strip()

    def has(self, name: str) -> bool:
        return name in self._values

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number; ``default`` when it is not given."""
        return parse_number(self._values[name], f"{self.kind} {name}", low, high) if self.has(name) else default

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number."""
        if not self.has(name):
            return default
        return int(parse_number(self._values[name], f"{self.kind} {name}", low, high, whole=True))

    def maybe(self, name: str, low: float, high: float) -> float | None:
        """A number, or None when it is not given."""
        return self.number(name, 0.0, low, high) if self.has(name) else None

    def lengths(self, name: str, default: str) -> Distribution:
        """A distribution of token counts."""
        return parse_distribution(self._values.get(name, default), f"{self.kind} {name}", MAX_TOKENS)

    def gaps(self, name: str, default: str) -> Distribution:
        """A distribution of seconds."""
        return parse_distribution(self._values.get(name, default), f"{self.kind} {name}", MAX_SECONDS)

    def pairs(self, name: str, low: float, high: float, *, whole: bool = False) -> dict[str, float]:
        """``flood:10,quiet:1``; empty when it is not given."""
        pairs: dict[str, float] = {}
        for part in split(self._values[name]) if self.has(name) else []:
            key, colon, value = part.rpartition(":")
            if not colon or not key.strip() or not key.isprintable():
                raise ConfigError(f"{self.kind} {name}: {part!r} is not NAME:NUMBER", param=name)
            if key.strip() in pairs:
                raise ConfigError(f"{self.kind} {name}: {key.strip()} is given twice", param=name)
            pairs[key.strip()] = parse_number(value.strip(), f"{self.kind} {name}", low, high, whole=whole)
        return pairs

    def exclude(self, first: str, second: str, why: str) -> None:
        """Refuse both options together."""
        if self.has(first) and self.has(second):
            raise ConfigError(f"{self.kind}: {first} and {second} exclude each other: {why}", param=second)
