"""A change of weights where memory holds both: the old ones compute until the new ones have warmed up.

A context of the new model takes the KV over where it lies, at a step boundary (_core/weights/carrier.pyx).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mullama import faults
from mullama._core import Carrier, Context, Model
from mullama.engine.parts import EngineParts
from mullama.engine.weights import load
from mullama.engine.weights.change import ChangeState, WeightChange
from mullama.engine.weights.comparing import Compared, texts_of, try_to_compare
from mullama.engine.weights.loras import Twins, close_twins
from mullama.engine.weights.soundness import mode_of
from mullama.errors import InvalidRequest, NeedsAnotherEngine
from mullama.types import KvMode


class ChangeBeside(WeightChange):
    """``run`` is for a thread of low priority."""

    mode = "beside"

    def __init__(
        self, parts: EngineParts, path: str | Path, label: str, kv: KvMode, *listeners: Any, kl: bool = False
    ) -> None:
        """``kl``: the report says how far the new weights are from the old ones."""
        super().__init__(parts, path, label, kv, *listeners)
        self._kl = kl
        self._old = parts.core.model
        self._texts: list[list[int]] = []
        self._model: Model | None = None
        self._context: Context | None = None
        self._left: Context | None = None  # the old one, after the exchange
        self._twins: Twins = []
        self._carrier: Carrier | None = None
        self._is_warm = False

    def _prepare(self) -> None:
        began, parts = time.monotonic_ns(), self._parts
        parts.loras.check_on(self._path)
        self._on_phase("loading")
        self._model = model = load.load_model(self._path, parts.config, self._progress)
        self._twins = parts.loras.twins(model)
        faults.crash_point("swap:after-load")
        self.kv = mode_of(self._old, model, self.kv, self._kl)
        if self._kl:
            self._texts = parts.commands.call(lambda: texts_of(parts.core)).result()
        self._context = parts.core.context.like(model)
        self.load_ms = (time.monotonic_ns() - began) / 1e6
        self._on_phase("switching")

    def _enter(self) -> None:
        assert self._context is not None
        try:
            self._carrier = Carrier(self._parts.core, self._context)
        except InvalidRequest as error:
            raise NeedsAnotherEngine(error.message, param="to") from None
        self.move(ChangeState.WARMING)

    def _warm(self, until_ns: int) -> bool:
        assert self._carrier is not None
        while not self._is_warm and time.monotonic_ns() < until_ns:
            self._is_warm = not self._carrier.warm()
        return self._is_warm

    def _exchange(self, recomputed: int) -> tuple[int, int]:
        assert self._carrier is not None and self._model is not None
        moved, n_bytes = self._carrier.commit(with_kv=self.kv is KvMode.CARRY)
        self.move(ChangeState.IN_CHARGE)
        self._left = self._carrier.finish()
        self._parts.loras.take_over(self._twins)
        self._adopt(self._model)
        return moved, n_bytes

    def _abandon(self) -> None:
        if self._carrier is not None:
            self._carrier.abandon()

    def _compare(self) -> Compared | None:
        assert self._model is not None and self._left is not None
        self._left.close()  # it lies on the old model, as the old adapters do
        self._left = None
        if not self._kl:
            return None
        self._on_phase("comparing")
        return try_to_compare(
            self._old,
            self._model,
            self._texts,
            self._parts.config,
            carry=self.kv is KvMode.CARRY,
            goes_on=lambda: not self._parts.commands.stopping,
            locks=[self._parts.weights.comparing],
        )

    def _clean_up(self) -> None:
        is_in_charge = self._context is not None and self._parts.core.context is self._context
        context, model = (self._left, self._old) if is_in_charge else (self._context, self._model)
        if context is not None:
            context.close()
        close_twins(self._twins)  # whichever of the two they are
        if model is not None:
            model.close()
