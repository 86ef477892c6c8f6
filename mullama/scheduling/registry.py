"""Policies by name: built-in, from the entry-point group ``mullama.schedulers``, or from a user's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

_GROUP: PolicyGroup[Scheduler] = PolicyGroup(SCHEDULERS, BUILTINS, Seam("scheduler", ("add", "remove", "plan")))

#: See the methods of these names.
is_builtin, create = _GROUP.is_builtin, _GROUP.create
describe, describe_all = _GROUP.describe, _GROUP.describe_all


def is_foreign(spec: str, params: Mapping[str, Any] | None = None) -> bool:
    """Whether it runs somebody's code, be it that of a parameter: such a policy has a thread of its own."""
    return not is_builtin(spec) or names_code(spec, params)
