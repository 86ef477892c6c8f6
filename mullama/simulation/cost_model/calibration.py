"""The calibration of a machine: a core is measured, then a running engine, and the cost model is fitted to both."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from mullama.simulation.cost_model.costs import CostModel
from mullama.simulation.cost_model.fitting import fit
from mullama.simulation.cost_model.gauge import CoreLike, Gauge, Progress
from mullama.simulation.cost_model.overhead import EngineLike, OverheadGauge


def measure_core(core: CoreLike, n_vocab: int, *, seconds: float, progress: Progress) -> CostModel:
    """What decodes cost. The core must be new and is spent afterwards: close it."""
    return fit(Gauge(core, n_vocab, seconds=seconds, progress=progress).run())


def measure_engine(engine: EngineLike, costs: CostModel, *, progress: Progress) -> CostModel:
    """``costs`` with what the engine adds to its decodes. Call it where no event loop runs."""
    return asyncio.run(OverheadGauge(engine, costs, progress=progress).run())


def with_about(costs: CostModel, about: dict[str, Any]) -> CostModel:
    """``costs`` with a note of where they come from."""
    return msgspec.structs.replace(costs, about=about)
