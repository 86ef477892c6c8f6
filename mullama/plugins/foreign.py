"""Policies that other people wrote: their parameters are read from ``__init__``, what they leave out is filled in."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from mullama.errors import InvalidRequest, MullamaError, PluginError
from mullama.logs import said
from mullama.plugins.groups import is_fault, shown
from mullama.plugins.parameters import convert, unknown_param

PLAIN = (bool, int, float, str)
REQUIRED = inspect.Parameter.empty
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(slots=True, frozen=True)
class Seam:
    """A kind of policy: what it is called, which methods it must have, and which do nothing where they are left out.

    ``param`` is the request field to blame for an unknown name.
    """

    noun: str
    methods: tuple[str, ...]
    optional: tuple[str, ...] = ()
    param: str = "policy"


@dataclass(slots=True, frozen=True)
class SignatureParam:
    """A keyword of a constructor. ``kind`` is one of the plain types, None where nothing says which."""

    name: str
    default: Any
    kind: type | None

    def describe(self) -> dict[str, Any]:
        """The same keys as a declared parameter."""
        default = self.default if isinstance(self.default, PLAIN) else None
        needed = "required" if self.default is REQUIRED else ""
        return {"name": self.name, "default": default, "range": KINDS.get(self.kind or object, "any"), "help": needed}


def signature_params(found: type) -> dict[str, SignatureParam]:
    """The parameters of a class by name, without ``*args`` and ``**kwargs``."""
    try:
        hints = typing.get_type_hints(found.__init__)  # type: ignore[misc]
    except Exception:  # annotations that name what is not there are no reason to refuse a policy
        hints = {}
    return {
        name: SignatureParam(name, parameter.default, _kind(hints.get(name), parameter.default))
        for name, parameter in _signature(found).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _signature(found: type) -> inspect.Signature:
    try:
        return inspect.signature(found)
    except (TypeError, ValueError):  # compiled code may not say
        return inspect.Signature()


def _kind(hint: Any, default: Any) -> type | None:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next((part for part in typing.get_args(hint) if part in PLAIN), None)
    if hint in PLAIN:
        return cast(type, hint)
    return type(default) if type(default) in PLAIN else None


def construct(found: type, spec: str, params: Mapping[str, Any], seam: Seam) -> Any:
    """An instance with these parameters (texts converted). Raises InvalidRequest and PluginError."""
    owner = f"the {seam.noun} '{spec}'"
    known = signature_params(found)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in _signature(found).parameters.values())
    values = {}
    for name, value in params.items():
        if name not in known and not takes_any:
            raise unknown_param(owner, name, known)
        values[name] = _converted(known.get(name), value, owner)
    missing = [name for name, param in known.items() if param.default is REQUIRED and name not in values]
    if missing:
        raise InvalidRequest(f"{owner} needs a value for {', '.join(missing)}", param="params")
    policy = make(found, spec, values, seam)
    defaults = {name: param.default for name, param in known.items()}
    return complete(policy, {**defaults, **values}, seam)


def complete(policy: Any, values: Mapping[str, Any], seam: Seam) -> Any:
    """The policy itself, or with what it leaves out filled in; ``values`` is what it was made with."""
    is_named = isinstance(getattr(policy, "name", None), str)
    if is_named and all(callable(getattr(policy, name, None)) for name in ("params", *seam.optional)):
        return policy
    return Adapter(policy, values, seam)


def make(found: type, spec: str, values: Mapping[str, Any], seam: Seam) -> Any:
    """Call the class. Raises InvalidRequest for a ValueError, PluginError for whatever else its code raises."""
    try:
        return found(**values)
    except MullamaError:
        raise
    except ValueError as error:
        message = f"the {seam.noun} '{spec}' refuses its parameters: {shown(str, error)}"
        raise InvalidRequest(message, param="params") from error
    except BaseException as error:
        if not is_fault(error):
            raise
        raise PluginError(f"cannot make the {seam.noun} '{spec}': {said(error)}") from error


def _converted(param: SignatureParam | None, value: Any, owner: str) -> Any:
    if param is None or param.kind is None or (value is None and param.default is None):
        return value
    found = convert(value, param.kind)
    if found is None:
        message = f"{owner}: {param.name} must be {KINDS[param.kind]}, not {value!r}"
        raise InvalidRequest(message, param=f"params.{param.name}")
    return found


class Adapter:
    """A policy without ``name``, ``params`` or an optional method: its class's name, the values it was made with,
    and a method that does nothing."""

    def __init__(self, policy: Any, values: Mapping[str, Any], seam: Seam) -> None:
        self.policy = policy
        name = getattr(policy, "name", None)
        self.name = name if isinstance(name, str) else type(policy).__name__
        self._values = dict(values)
        for method in seam.methods:
            setattr(self, method, getattr(policy, method))
        for method in seam.optional:
            own = getattr(policy, method, None)
            setattr(self, method, own if callable(own) else _nothing)

    def params(self) -> Mapping[str, Any]:
        own = getattr(self.policy, "params", None)
        return cast(Mapping[str, Any], own()) if callable(own) else dict(self._values)


def _nothing(*_: Any) -> None:
    pass
