"""Entry-point groups: how schedulers, model sources and KV policies are found by name.

A built-in is declared in the same form as a third party's entry point (``"package.module:attribute"``) and is
imported only when its name is asked for. A room that offers a seam owns one :class:`PluginGroup`::

    SOURCES = PluginGroup("mullama.sources", "model source", {"pypi": "mullama.models.sources.pypi:PypiSource"})
    SOURCES.load("pypi")

A third party adds a name in its own ``pyproject.toml``::

    [project.entry-points."mullama.sources"]
    mine = "my_package:MySource"
"""

from __future__ import annotations

import importlib
import operator
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from mullama.errors import PluginError
from mullama.logs import said

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


SHOWN = 120  # characters of what foreign code said
MAX_PARAMS = 64 << 10  # bytes of a plugin's parameters as JSON


def is_fault(error: BaseException) -> bool:
    """Whether what foreign code raised is its own fault: all, also SystemExit, but the main thread's Ctrl-C."""
    return not isinstance(error, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread()


def shown(how: Callable[[Any], str], value: object) -> str:
    """``repr`` or ``str`` of what foreign code made, short."""
    try:
        text = str(how(value))
    except BaseException as error:
        if not is_fault(error):
            raise
        text = f"something ({type(value).__name__})"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


@dataclass(slots=True, frozen=True)
class Published:
    """What a plugin says of itself, as plain data: views read it, and never call the plugin."""

    name: str
    params: dict[str, Any]


def publish(plugin: Any, noun: str, spec: str) -> Published:
    """Ask a plugin for its name and parameters. Runs its code, so neither on the event loop nor on an engine thread.

    Raises PluginError for what JSON cannot carry.
    """
    try:
        name = getattr(plugin, "name", type(plugin).__name__)
        if not (isinstance(name, str) and 0 < len(name) <= SHOWN and name.isprintable()):
            raise TypeError(f"its name is {shown(repr, name)}; a text of 1 to {SHOWN} printable characters is needed")
        data = orjson.dumps({"name": str.__str__(name), "params": dict(plugin.params())})
        if len(data) > MAX_PARAMS:
            raise ValueError(f"its params() have {len(data)} bytes as JSON, {MAX_PARAMS} are allowed")
        return Published(**orjson.loads(data))
    except BaseException as error:
        if not is_fault(error):
            raise
        raise PluginError(f"the {noun} '{spec}' cannot be shown: {said(error)}") from None


class PluginGroup:
    """The names of one entry-point group, loaded on demand.

    Built-in names are reserved: an installed package cannot change what ``pypi:`` or ``fcfs`` mean. Two packages
    that offer the same name make that name (and no other) an error, because picking one would be chance.
    """

    def __init__(self, group: str, noun: str, builtins: Mapping[str, str]) -> None:
        self.group = group
        self.noun = noun
        self._builtins = dict(builtins)
        self._loaded: dict[str, Any] = {}

    def names(self) -> list[str]:
        """Every name that :meth:`load` knows, built-ins first. Reads the metadata of the installed packages."""
        return [*self._builtins, *sorted({entry.name for entry in self._installed()} - self._builtins.keys())]

    def has(self, name: str) -> bool:
        """Whether :meth:`load` knows the name. Nothing is imported; a built-in costs no look at the disk."""
        return name in self._builtins or name in self._loaded or any(e.name == name for e in self._installed())

    def load(self, name: str) -> Any:
        """The object registered under a name, imported at the first call.

        Raises PluginError: unknown name, a name offered twice, or an import that failed (the reason is in it).
        """
        if name not in self._loaded:
            value = self._builtins.get(name) or self._installed_value(name)
            self._loaded[name] = self._import(name, value)
        return self._loaded[name]

    def _installed(self) -> list[EntryPoint]:
        # Imported here: importlib.metadata costs more than most commands that never ask for a third party.
        from importlib.metadata import entry_points

        return list(entry_points(group=self.group))

    def _installed_value(self, name: str) -> str:
        """The ``module:attribute`` of a third party."""
        found = sorted({entry.value for entry in self._installed() if entry.name == name})
        if not found:
            raise PluginError(f"there is no {self.noun} '{name}'; there are {', '.join(self.names())}")
        if len(found) > 1:
            raise PluginError(f"several packages offer the {self.noun} '{name}': {', '.join(found)}")
        return found[0]

    def _import(self, name: str, value: str) -> Any:
        # An entry point may end in "[extra]", which says nothing to an importer.
        module, _, attribute = value.partition("[")[0].partition(":")
        try:
            found: Any = importlib.import_module(module.strip())
            return operator.attrgetter(attribute.strip())(found) if attribute else found
        # A plugin is foreign code: whatever its import raises is reported as its fault.
        except BaseException as error:
            if not is_fault(error):
                raise
            raise PluginError(f"cannot load the {self.noun} '{name}' ({value}): {said(error)}") from error
