"""Policies by name: built-in, from the entry-point group ``mullama.schedulers``, or from a user's file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from mullama.errors import InvalidRequest, MullamaError, PluginError
from mullama.plugins import PluginGroup
from mullama.scheduling.base import Scheduler
from mullama.scheduling.foreign import construct, make, signature_params
from mullama.scheduling.loading import is_path, load_object
from mullama.scheduling.params import Policy

BUILTINS = {
    "fcfs": "mullama.scheduling.fcfs:Fcfs",
    "round_robin": "mullama.scheduling.round_robin:RoundRobin",
    "priority": "mullama.scheduling.priority:Priority",
    "preemptive": "mullama.scheduling.preemptive:Preemptive",
    "fair": "mullama.scheduling.fair:Fair",
    "srpt": "mullama.scheduling.srpt:Srpt",
    "deadline": "mullama.scheduling.deadline:Deadline",
}

SCHEDULERS = PluginGroup("mullama.schedulers", "scheduler", BUILTINS)


def is_builtin(spec: str) -> bool:
    """Whether the policy is one of mullama's own (which run on the engine thread)."""
    return spec in BUILTINS


def names_code(spec: str, params: Mapping[str, Any] | None = None) -> bool:
    """Whether the policy or one of its parameters names a file or a module, whose code :func:`create` would run."""
    texts = [spec, *(params or {}).values()]
    return any(isinstance(text, str) and is_path(text) for text in texts)


def create(spec: str, params: Mapping[str, Any] | None = None) -> Scheduler:
    """A new policy. ``spec`` is a name, ``FILE.py:CLASS`` or ``package.module:CLASS``.

    Values of ``params`` may be texts, as from a command line. Raises InvalidRequest for an unknown policy or parameter
    (it names the valid ones) and PluginError for a class that cannot be loaded, made or used.
    """
    found = _find(spec)
    if issubclass(found, Policy):
        return cast(Scheduler, make(found, spec, params or {}))
    return construct(found, spec, params or {})


def describe(spec: str) -> dict[str, Any]:
    """``name``, ``summary``, ``source``, ``builtin`` and ``params`` of a policy; the errors of :func:`create`."""
    found = _find(spec)
    declared = found.PARAMS if issubclass(found, Policy) else signature_params(found).values()
    return {
        "name": spec,
        "summary": (inspect.getdoc(found) or "").partition("\n")[0],
        "source": str(getattr(found, "SOURCE", "")),
        "builtin": is_builtin(spec),
        "params": [param.describe() for param in declared],
    }


def describe_all() -> list[dict[str, Any]]:
    """Every registered policy; one that cannot be loaded has ``name``, ``builtin`` and ``error`` only."""
    found = []
    for name in SCHEDULERS.names():
        try:
            found.append(describe(name))
        except MullamaError as error:
            found.append({"name": name, "builtin": is_builtin(name), "error": error.message})
    return found


def _find(spec: str) -> type:
    """The class of a policy, its methods checked."""
    if is_path(spec):
        found = load_object(spec, "scheduler")
    elif SCHEDULERS.has(spec):
        found = SCHEDULERS.load(spec)
    else:
        names = ", ".join(SCHEDULERS.names())
        message = f"there is no scheduler '{spec}'; there are {names}, and FILE.py:CLASS or package.module:CLASS"
        raise InvalidRequest(message, param="policy")
    if not isinstance(found, type):
        raise PluginError(f"the scheduler '{spec}' is a {type(found).__name__}, a class is needed")
    missing = [name for name in ("add", "remove", "plan") if not callable(getattr(found, name, None))]
    if missing:
        raise PluginError(f"the scheduler '{spec}' has no method {', '.join(missing)}; add, remove and plan are needed")
    return found
