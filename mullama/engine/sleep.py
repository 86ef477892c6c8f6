"""Sleep: an idle engine gives up its weights and its context, and keeps what its KV cache holds.

The KV of the slots moves to the tiers, host memory or disk, where the next prompts find it after the wake; where there
is no tier, llama.cpp's own copy of each slot waits in host memory. The engine thread goes on all the while.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mullama._core import Model, Vacancy
from mullama.engine import fits, vacant
from mullama.engine.gap import stand_in
from mullama.errors import InvalidRequest, ModelBusy, ModelLoadError
from mullama.files import identity_of
from mullama.observe.memory import give_back_heap
from mullama.types import SleepLevel

if TYPE_CHECKING:
    from mullama.engine.weights import Host, Weights


@dataclass(slots=True, frozen=True)
class SleepReport:
    """What a sleeping engine holds; ``sleep_ms``: how long it took to fall asleep."""

    level: SleepLevel
    tokens: int  # of cached prefixes
    host_bytes: int
    disk_bytes: int
    sleep_ms: float


class Sleep:
    """The sleep of one engine. ``fall`` and ``wake`` block, and are not for the engine thread; one at a time."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._vacancy: Vacancy | None = None
        self._substitute: Model | None = None  # tokenises meanwhile
        self._path = ""
        self._identity: tuple[int, int, int] | None = None

    @property
    def is_asleep(self) -> bool:
        return self._vacancy is not None

    @property
    def held_bytes(self) -> int:
        """Of KV that waits in host memory outside the tier."""
        return self._vacancy.n_bytes if self._vacancy is not None else 0

    def fall(self, level: SleepLevel, host: Host) -> SleepReport:
        """Free context and weights.

        Raises ModelBusy while anything runs or the weights change, InvalidRequest without a disk tier.
        """
        weights = self._weights
        if self._vacancy is not None:
            raise InvalidRequest("the model is asleep already", param="level")
        began = time.monotonic()
        on_disk = level is SleepLevel.DISK
        with weights.held():  # first: while the weights change, the disk tier is away for a moment
            if on_disk and weights.kv.disk is None:
                raise InvalidRequest("there is no disk tier: start the server with --kv-disk-dir DIR", param="level")
            substitute = stand_in(weights.core.model, weights.config)
            try:
                host.call(lambda: self._store(on_disk)).result()
                if on_disk and weights.kv.disk is not None:
                    weights.kv.disk.flush()
                report = host.call(lambda: self._leave(level, substitute, host.on_model, began)).result()
            finally:
                if self._vacancy is None:
                    substitute.close()
        return report

    def _check_idle(self) -> None:
        if self._weights.seqs or self._weights.active is not None:
            raise ModelBusy("the model computes now, or changes its weights; only an idle one can sleep")

    def _store(self, on_disk: bool) -> None:
        """Move the KV of the slots to the tiers. Engine thread."""
        self._check_idle()
        kv = self._weights.kv
        if kv.has_tiers:
            kv.evict_retained(1 << 62, self._weights.seqs.running())  # in the policy's order: who is last stays longest
        if on_disk and kv.disk is not None:
            for node in kv.tree.nodes():
                if node.host is not None:
                    kv.disk.keep(node)

    def _leave(
        self, level: SleepLevel, substitute: Model, on_model: Callable[[Model], None], began: float
    ) -> SleepReport:
        """Engine thread."""
        self._check_idle()
        kv, core = self._weights.kv, self._weights.core
        if level is SleepLevel.DISK:
            kv.drop_host()
            for slot in range(core.n_slots):
                if core.retained(slot)[0]:
                    kv.forget(slot)
        path = Path(core.model.path)
        self._path, self._identity = str(path), identity_of(path)
        model = core.model
        on_model(substitute)
        try:
            self._vacancy = vacant.leave(core, self._weights.adapters)
        except BaseException:
            on_model(model)
            raise
        self._substitute, self._weights.in_gap = substitute, True
        give_back_heap()
        tokens = sum(node.n_tokens for node in kv.tree.nodes() if node.is_stored or node.slots)
        disk_bytes = kv.disk.store.bytes_used if kv.disk is not None else 0
        return SleepReport(
            level, tokens, kv.tier.used + self._vacancy.n_bytes, disk_bytes, (time.monotonic() - began) * 1e3
        )

    def wake(self, host: Host) -> float:
        """Load the weights again and go on; ms it took, 0 when it was awake.

        Raises ModelLoadError, also when the file has changed meanwhile, and MemoryTooSmall before anything is loaded:
        then it sleeps on, and may only be closed or woken again.
        """
        vacancy = self._vacancy
        if vacancy is None:
            return 0.0
        began = time.monotonic()
        if identity_of(Path(self._path)) != self._identity:
            raise ModelLoadError(f"{self._path} has changed, or gone, while the model was asleep")
        core = self._weights.core
        with self._weights.held():
            fits.check(self._path, self._weights.config, self._weights.seqs.model, core.n_ctx, core.n_slots)
            host.call(lambda: self._enter(vacancy, host)).result()
        return (time.monotonic() - began) * 1e3

    def _enter(self, vacancy: Vacancy, host: Host) -> None:
        """Engine thread."""
        weights = self._weights
        model, _ = vacant.enter(
            vacancy, self._path, weights.config, lambda fraction: not host.is_stopping(), weights.adapters
        )
        self._vacancy = None
        weights.in_gap = False
        host.on_model(model)
        if self._substitute is not None:
            self._substitute.close()
            self._substitute = None
