"""The engine's twin without a model: the same policies, slots and rules on a step-cost model of a machine. No compiled
code; docs/simulator.md says what is modelled and what is not.

Internal.
"""

from mullama.simulation.cost_model.costs import CostModel, read_costs, write_costs
from mullama.simulation.cost_model.grid import Grid
from mullama.simulation.records import Counters, Override, SimConfig, Simulated
from mullama.simulation.simulated_engine import simulate

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
