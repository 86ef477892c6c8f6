"""Workloads: seeded synthetic arrivals and real traces, and what became of each request when they were played.

Internal.
"""

from mullama.workload.base import Client, Outcome, TraceRequest, Workload

__all__ = ["Client", "Outcome", "TraceRequest", "Workload"]
