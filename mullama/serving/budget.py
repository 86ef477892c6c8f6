"""How much of the limits on models is taken: by those that are loaded, that sleep, that drain, and that are closed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from mullama.serving.states import Resident, Served
from mullama.types import MemoryLeft


@dataclass(slots=True)
class Budget:
    """The limits, and what takes of them beside the served models; 0 is no limit. ``models`` are the served ones."""

    max_models: int = 0
    n_bytes: int = 0
    left: dict[Resident, int] = field(default_factory=dict)  # engines that were replaced and still drain; their bytes
    closing: dict[asyncio.Future[None], int] = field(default_factory=dict)  # engines that are being closed

    def missing(
        self, served: Served, models: Iterable[Served], *, with_left: bool = True, with_closing: bool = False
    ) -> int:
        """Bytes that are too few for one more; 0 where it fits."""
        if not self.n_bytes:
            return 0
        taken = self._taken(served, models, with_left=with_left, with_closing=with_closing)
        return max(taken + served.n_bytes - self.n_bytes, 0)

    def fits(self, served: Served, models: Iterable[Served], *, with_left: bool = True) -> bool:
        """Whether it holds one more; ``with_left``: beside those that drain."""
        others = [one for one in models if one is not served]
        if self.max_models and sum(one.resident is not None for one in others) >= self.max_models:
            return False
        return self.missing(served, others, with_left=with_left) == 0

    def fits_beside(self, served: Served, models: Iterable[Served]) -> bool:
        """Whether an engine may go on closing while one more is loaded: it is known that its memory is not needed."""
        return bool(self.n_bytes) and self.missing(served, models, with_closing=True) == 0

    def memory_left(self, served: Served, models: Iterable[Served]) -> MemoryLeft | None:
        """What is left for other weights of a loaded model; None: no limit."""
        if not self.n_bytes:
            return None
        alone = self.n_bytes - self._taken(served, models, with_left=True, with_closing=True)
        return MemoryLeft(alone - served.held_bytes, alone)

    def _taken(self, but: Served, models: Iterable[Served], *, with_left: bool, with_closing: bool) -> int:
        taken = sum(self.left.values()) if with_left else 0
        taken += sum(self.closing.values()) if with_closing else 0
        for one in models:
            if one is not but:
                taken += one.held_bytes if one.resident is not None else 0
                taken += one.asleep.host_bytes if one.asleep is not None else 0
        return taken
