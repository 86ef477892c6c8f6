"""The policies of one seam by name: built-in, from its entry-point group, or from a user's file or module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

from mullama.errors import InvalidRequest, MullamaError, PluginError
from mullama.plugins.foreign import Seam, complete, construct, make, signature_params
from mullama.plugins.groups import PluginGroup
from mullama.plugins.parameters import Policy
from mullama.plugins.user_code import is_path, load_object


def names_code(spec: str, params: Mapping[str, Any] | None = None) -> bool:
    """Whether the policy or one of its parameters names a file or a module, whose code ``create`` would run."""
    texts = [spec, *(params or {}).values()]
    return any(isinstance(text, str) and is_path(text) for text in texts)


P = TypeVar("P")


class PolicyGroup(Generic[P]):
    """What a :class:`PluginGroup` offers, made and described as the policies of ``seam``."""

    def __init__(self, plugins: PluginGroup, builtins: Mapping[str, str], seam: Seam) -> None:
        self._plugins = plugins
        self._builtins = builtins
        self._seam = seam

    def is_builtin(self, spec: str) -> bool:
        """Whether the policy is one of mullama's own."""
        return spec in self._builtins

    def names(self) -> list[str]:
        """Every registered name, built-ins first."""
        return self._plugins.names()

    def create(self, spec: str, params: Mapping[str, Any] | None = None) -> P:
        """A new policy. ``spec`` is a name, ``FILE.py:CLASS`` or ``package.module:CLASS``.

        Values of ``params`` may be texts, as from a command line. Raises InvalidRequest for an unknown policy or
        parameter (it names the valid ones) and PluginError for a class that cannot be loaded, made or used.
        """
        found = self._find(spec)
        if issubclass(found, Policy):
            return cast(P, complete(make(found, spec, params or {}, self._seam), {}, self._seam))
        return cast(P, construct(found, spec, params or {}, self._seam))

    def describe(self, spec: str) -> dict[str, Any]:
        """``name``, ``summary``, ``source``, ``builtin`` and ``params`` of a policy; the errors of :meth:`create`."""
        found = self._find(spec)
        declared = found.PARAMS if issubclass(found, Policy) else signature_params(found).values()
        return {
            "name": spec,
            "summary": (inspect.getdoc(found) or "").partition("\n")[0].replace("``", ""),
            "source": str(getattr(found, "SOURCE", "")),
            "builtin": self.is_builtin(spec),
            "params": [param.describe() for param in declared],
        }

    def describe_all(self) -> list[dict[str, Any]]:
        """Every registered policy; one that cannot be loaded has ``name``, ``builtin`` and ``error`` only."""
        found = []
        for name in self.names():
            try:
                found.append(self.describe(name))
            except MullamaError as error:
                found.append({"name": name, "builtin": self.is_builtin(name), "error": error.message})
        return found

    def _find(self, spec: str) -> type:
        """The class of a policy, its methods checked."""
        noun = self._seam.noun
        if is_path(spec):
            found = load_object(spec, noun)
        elif self._plugins.has(spec):
            found = self._plugins.load(spec)
        else:
            there = f"there are {', '.join(self.names())}, and FILE.py:CLASS or package.module:CLASS"
            raise InvalidRequest(f"there is no {noun} '{spec}'; {there}", param=self._seam.param)
        if not isinstance(found, type):
            raise PluginError(f"the {noun} '{spec}' is a {type(found).__name__}, a class is needed")
        needed = self._seam.methods
        missing = [name for name in needed if not callable(getattr(found, name, None))]
        if missing:
            needs = f"{', '.join(needed[:-1])} and {needed[-1]} are" if len(needed) > 1 else f"{needed[0]} is"
            raise PluginError(f"the {noun} '{spec}' has no method {', '.join(missing)}; {needs} needed")
        return found
