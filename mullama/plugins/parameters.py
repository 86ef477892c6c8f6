"""Parameters of a policy: declared once, checked in one place, changed while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mullama.errors import InvalidRequest

Value = bool | int | float | str

TRUE = ("true", "yes", "on", "1")
MAX_WHOLE = (1 << 63) - 1  # what JSON's readers and the core can hold
FALSE = ("false", "no", "off", "0")


@dataclass(slots=True, frozen=True)
class Param:
    """One parameter. Its type is that of ``default``; ``choices`` are for texts, the limits for numbers."""

    name: str
    default: Value
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """What it may be, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, str):
            return "a text"
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        if self.minimum is not None and self.maximum is not None:
            return f"{kind} from {_digits(self.minimum)} to {_digits(self.maximum)}"
        if self.minimum is not None:
            return f"{kind}, {_digits(self.minimum)} or more"
        return kind if self.maximum is None else f"{kind}, {_digits(self.maximum)} or less"

    def describe(self) -> dict[str, Any]:
        """For ``mullama schedulers`` and the docs."""
        return {"name": self.name, "default": self.default, "range": self.range, "help": self.help}

    def check(self, value: Any, owner: str) -> Value:
        """The value in the parameter's type; a text is converted. Raises InvalidRequest, naming ``owner``."""
        found = convert(value, type(self.default))
        is_right = found is not None
        if isinstance(found, (int, float)):
            is_right = (self.minimum is None or found >= self.minimum) and (
                self.maximum is None or found <= self.maximum
            )
        elif self.choices:
            is_right = found in self.choices
        if found is None or not is_right:
            message = f"{owner}: {self.name} must be {self.range}, not {value!r}"
            raise InvalidRequest(message, param=f"params.{self.name}")
        return found


def convert(value: Any, kind: type) -> Value | None:
    """A value, or the text of one, as bool, int, float or str; None where it is no such thing."""
    if isinstance(value, str) and kind is not str:
        return _parse(value.strip(), kind)
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) else None
    if type(value) is int and kind is int:
        return value if -MAX_WHOLE <= value <= MAX_WHOLE else None
    return value if type(value) is kind and isinstance(value, (bool, str)) else None


def _parse(text: str, kind: type) -> Value | None:
    if kind is bool:
        return True if text.lower() in TRUE else False if text.lower() in FALSE else None
    try:
        number = kind(text)
    except ValueError:
        return None
    if isinstance(number, int):
        return number if -MAX_WHOLE <= number <= MAX_WHOLE else None
    return number if isinstance(number, float) and math.isfinite(number) else None


def unknown_param(owner: str, name: str, valid: Mapping[str, Any]) -> InvalidRequest:
    """The error for a parameter that a policy does not have."""
    there = f"its parameters are {', '.join(valid)}" if valid else "it has no parameters"
    return InvalidRequest(f"{owner} has no parameter '{name}'; {there}", param=f"params.{name}")


def _digits(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:g}"


class Policy:
    """Base of the built-in policies: parameters in ``PARAMS`` become keywords, attributes and ``params()``."""

    name: ClassVar[str]
    SOURCE: ClassVar[str] = ""  # where the policy is described
    PARAMS: ClassVar[tuple[Param, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name", cls.__name__)

    def __init__(self, **params: Any) -> None:
        """Every parameter by keyword, its default where it is not given. Raises InvalidRequest."""
        self.configure(**{**{param.name: param.default for param in self.PARAMS}, **params})

    def configure(self, **changes: Any) -> None:
        """Change parameters while the policy runs: all of them, or none. Raises InvalidRequest."""
        known = {param.name: param for param in self.PARAMS}
        values: dict[str, Value] = {}
        for name, value in changes.items():
            if name not in known:
                raise unknown_param(self.name, name, known)
            values[name] = known[name].check(value, self.name)
        for name, value in values.items():
            setattr(self, name, value)
        self._configured()

    def params(self) -> Mapping[str, Any]:
        """The parameters and their values."""
        return {param.name: getattr(self, param.name) for param in self.PARAMS}

    def _configured(self) -> None:
        """For a policy that derives something from its parameters: they have just been set."""
