"""Scheduling policies: small classes that decide, by name; ``_core`` carries out. Public: what ``__all__`` names."""

from mullama.plugins.parameters import Param, Policy
from mullama.scheduling.base import Costs, EngineState, Plan, Scheduler, SeqView, check_plan, own_plan
from mullama.scheduling.batching import Batching
from mullama.scheduling.fcfs import Fcfs
from mullama.scheduling.registry import SCHEDULERS, create, describe, describe_all, is_builtin, names_code

__all__ = [
    "SCHEDULERS",
    "Batching",
    "Costs",
    "EngineState",
    "Fcfs",
    "Param",
    "Plan",
    "Policy",
    "Scheduler",
    "SeqView",
    "check_plan",
    "create",
    "describe",
    "describe_all",
    "is_builtin",
    "names_code",
    "own_plan",
]
