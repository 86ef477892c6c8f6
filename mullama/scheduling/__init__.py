"""Scheduling policies: small classes that decide, by name. ``_core`` carries out."""

from mullama.scheduling.base import EngineState, Plan, Scheduler, SeqView, check_plan
from mullama.scheduling.fcfs import Fcfs

POLICIES: dict[str, type[Scheduler]] = {Fcfs.name: Fcfs}

__all__ = ["POLICIES", "EngineState", "Fcfs", "Plan", "Scheduler", "SeqView", "check_plan"]
