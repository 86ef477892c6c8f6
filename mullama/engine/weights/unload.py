"""An engine without weights for a while: its context and its model go, its sequences and its cached KV stay.

``unload`` and ``load_again`` are the two ends of it. Between them lies a change of weights that memory does not hold
beside each other (change_with_gap.py), or a sleep (sleeping.py). Engine thread, but for ``stand_in``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mullama._core import Model, Vacancy
from mullama.config import ServeConfig
from mullama.engine.parts import EngineParts
from mullama.engine.weights import load


def stand_in(model: Model, config: ServeConfig) -> Model:
    """What tokenises and renders chats while there are no weights. Raises ModelLoadError."""
    return Model(model.path, vocab_only=True, chat_template=load.chat_template(config.chat_template))


def unload(parts: EngineParts, substitute: Model) -> Vacancy:
    """Save the KV of all slots, then free context, LoRA adapters and weights; ``substitute`` speaks meanwhile.

    Raises before anything is freed, if at all.
    """
    weights, model = parts.weights, parts.core.model
    parts.model, weights.are_away = substitute, True
    try:
        vacancy = Vacancy(parts.core)
        vacancy.leave()
    except BaseException:
        parts.model, weights.are_away = model, False  # it is still in charge
        raise
    weights.vacancy = vacancy
    parts.loras.unload_all()
    model.close()
    return vacancy


def load_again(
    parts: EngineParts,
    path: str | Path,
    progress: Callable[[float], bool | None] | None,
    *,
    since_ns: int = 0,
    is_swap: bool = False,
) -> int:
    """Load a file, lay the LoRA adapters on it and go on. Returns the sequences that do. See Vacancy.fill.

    Whatever it raises (ModelLoadError, InvalidRequest, ComputeFailed), there are no weights as before.
    """
    vacancy = parts.weights.vacancy
    assert vacancy is not None
    model = load.load_model(path, parts.config, progress)
    try:
        context = vacancy.core.context.like(model)
        try:
            parts.loras.load_all(model)
            n_running = vacancy.fill(context, since_ns=since_ns, is_swap=is_swap)
        except BaseException:
            context.close()
            parts.loras.unload_all()
            raise
    except BaseException:
        model.close()
        raise
    parts.model, parts.weights.vacancy, parts.weights.are_away = model, None, False
    return n_running
