"""Objects named by ``FILE.py:NAME`` or ``package.module:NAME``: a user's policies and predictors."""

from __future__ import annotations

import importlib
import itertools
import operator
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mullama.errors import InvalidRequest, PluginError
from mullama.home import expand
from mullama.logs import said
from mullama.plugins.groups import is_fault

_numbers = itertools.count(1)


def is_path(spec: str) -> bool:
    """Whether the spec names a file or a module rather than a registered name."""
    return ":" in spec


def load_object(spec: str, noun: str) -> Any:
    """What the spec names. A file is read anew at each call, so that its changes take effect.

    Raises InvalidRequest where there is no such file, module or name, and PluginError where its code fails; both say
    which ``noun`` was looked for.
    """
    where, _, attribute = spec.rpartition(":")
    if not where or not attribute:
        raise InvalidRequest(f"a {noun} is named FILE.py:CLASS or package.module:CLASS, not '{spec}'")
    module = _run_file(expand(where), noun) if where.endswith(".py") else _import(where, noun)
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError:
        classes = [name for name, value in vars(module).items() if _is_own_class(value, module)]
        there = f"its classes are {', '.join(classes)}" if classes else "it defines no class"
        raise InvalidRequest(f"{where} has no '{attribute}' to use as {noun}; {there}") from None


def _is_own_class(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _run_file(path: Path, noun: str) -> ModuleType:
    """The file as a module under a name of its own. No byte code is cached: an edit within the second counts."""
    try:
        source = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidRequest(f"cannot read the {noun} file {path}: {reason}") from None
    module = ModuleType(f"_mullama_{path.stem}_{next(_numbers)}")
    module.__file__ = str(path.resolve())
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    # Foreign code: whatever it raises is reported as its fault.
    except BaseException as error:
        del sys.modules[module.__name__]
        if not is_fault(error):
            raise
        raise PluginError(f"cannot load the {noun} file {path}: {said(error)}") from error
    return module


def _import(name: str, noun: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise InvalidRequest(f"there is no module '{name}' to load a {noun} from") from None
        raise PluginError(f"cannot load the {noun} module {name}: {said(error)}") from error
    except BaseException as error:
        if not is_fault(error):
            raise
        raise PluginError(f"cannot load the {noun} module {name}: {said(error)}") from error
