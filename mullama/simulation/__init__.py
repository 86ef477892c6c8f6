"""The engine's twin without a model: the same policies, slots and rules on a step-cost model of a machine. No compiled
code; docs/simulator.md says what is modelled and what is not."""

from mullama.simulation.costs import CostModel, read_costs, write_costs
from mullama.simulation.engine import simulate
from mullama.simulation.grid import Grid
from mullama.simulation.records import Counters, Override, SimConfig, Simulated

__all__ = [
    "CostModel",
    "Counters",
    "Grid",
    "Override",
    "SimConfig",
    "Simulated",
    "read_costs",
    "simulate",
    "write_costs",
]
