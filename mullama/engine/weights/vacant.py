"""An engine without weights for a while: its context and its model go, its sequences and its cached KV stay.

``leave`` and ``enter`` are the two ends of it. Between them lies a change of weights that memory does not hold beside
each other (``engine/weights/change_with_gap.py``), or a sleep (``engine/weights/sleeping.py``). Engine thread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mullama._core import Core, Model, Vacancy
from mullama.engine.weights import load as loading

if TYPE_CHECKING:
    from mullama.config import ServeConfig
    from mullama.engine.weights.loras import Adapters


def leave(core: Core, adapters: Adapters | None) -> Vacancy:
    """Save the KV of all slots, then free context, adapters and weights. Raises before anything is freed, if at all."""
    vacancy = Vacancy(core)
    model = core.model
    vacancy.leave()
    if adapters is not None:
        adapters.leave()
    model.close()
    return vacancy


def enter(
    vacancy: Vacancy,
    path: str | Path,
    config: ServeConfig,
    progress: Callable[[float], bool | None] | None,
    adapters: Adapters | None,
    *,
    since_ns: int = 0,
    is_swap: bool = False,
) -> tuple[Model, int]:
    """Load a file, lay the adapters on it and go on: (the model, sequences that run again). See Vacancy.fill.

    Whatever it raises (ModelLoadError, InvalidRequest, ComputeFailed), the core is vacant as before.
    """
    model = loading.load_model(path, config, progress)
    try:
        context = vacancy.core.context.like(model)
        try:
            if adapters is not None:
                adapters.enter(model)
            return model, vacancy.fill(context, since_ns=since_ns, is_swap=is_swap)
        except BaseException:
            context.close()
            if adapters is not None:
                adapters.leave()
            raise
    except BaseException:
        model.close()
        raise
