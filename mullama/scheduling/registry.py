"""Policies by name: built-in, from the entry-point group ``mullama.schedulers``, or from a user's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from mullama.plugins.foreign import Seam
from mullama.plugins.groups import PluginGroup
from mullama.plugins.policy_groups import PolicyGroup, names_code
from mullama.scheduling.base import Scheduler

__all__ = ["BUILTINS", "SCHEDULERS", "create", "describe", "describe_all", "is_builtin", "is_foreign", "names_code"]

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

_GROUP = PolicyGroup(SCHEDULERS, BUILTINS, Seam("scheduler", ("add", "remove", "plan")))


def is_builtin(spec: str) -> bool:
    """Whether the policy is one of mullama's own."""
    return _GROUP.is_builtin(spec)


def is_foreign(spec: str, params: Mapping[str, Any] | None = None) -> bool:
    """Whether it runs somebody's code, be it that of a parameter: such a policy has a thread of its own."""
    return not is_builtin(spec) or names_code(spec, params)


def create(spec: str, params: Mapping[str, Any] | None = None) -> Scheduler:
    """A new policy: see :meth:`PolicyGroup.create`."""
    return cast(Scheduler, _GROUP.create(spec, params))


def describe(spec: str) -> dict[str, Any]:
    """What a policy is: see :meth:`PolicyGroup.describe`."""
    return _GROUP.describe(spec)


def describe_all() -> list[dict[str, Any]]:
    """Every registered policy: see :meth:`PolicyGroup.describe_all`."""
    return _GROUP.describe_all()
