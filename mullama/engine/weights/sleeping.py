"""Sleep: an idle engine gives up its weights and its context, and keeps what its KV cache holds.

The KV of the slots moves to the tiers, host memory or disk, where the next prompts find it after the wake; where there
is no tier, llama.cpp's own copy of each slot waits in host memory. The engine thread goes on all the while.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mullama._core import Model, Vacancy
from mullama.engine.memory import fits
from mullama.engine.weights import vacant
from mullama.engine.weights.change_with_gap import stand_in
from mullama.errors import InvalidRequest, ModelBusy, ModelLoadError, StoreError
from mullama.files import identity_of
from mullama.observe.process_memory import give_back_heap
from mullama.types import SleepLevel

if TYPE_CHECKING:
    from mullama.engine.weights.change import Host, Weights


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

        Raises ModelBusy while anything runs or the weights change, InvalidRequest without a disk tier, StoreError when
        the disk does not take the KV that is to wait there. Nothing is lost then.
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
                error = self._write_out(on_disk, host)
                report = host.call(lambda: self._leave(level, error, substitute, host.on_model, began)).result()
            finally:
                if self._vacancy is None:
                    substitute.close()
        return report

    def _check_idle(self) -> None:
        if self._weights.seqs or self._weights.active is not None:
            raise ModelBusy("the model computes now, or changes its weights; only an idle one can sleep")

    def _write_out(self, on_disk: bool, host: Host) -> StoreError | None:
        """Have the tiers hold what the slots do, and the disk all of it if ``on_disk``; nothing is given up yet.

        Returns why the disk did not take all that it should. Raises ModelBusy.
        """
        kv = self._weights.kv
        disk, works = kv.disk, [self._store_slots]
        if disk is None:
            host.call(self._store_slots).result()
            return None
        if on_disk:  # host memory first: for what the slots bring there, something else may have to go
            works.insert(0, self._keep_host)
        n_failed = disk.n_failed
        for work in works:
            while not host.call(partial(disk.hand_over, work)).result():
                disk.written().result()
            if not on_disk and host.call(self._is_in_memory).result():
                return None  # nobody depends on what the disk does
            disk.written().result()
            error = host.call(lambda: disk.error_since(n_failed)).result()
            if error is not None:
                return error
        return None

    def _store_slots(self) -> None:
        """Engine thread."""
        self._check_idle()
        if self._weights.kv.tiers.has_any:
            self._weights.kv.store_retained(self._weights.seqs.running())

    def _is_in_memory(self) -> bool:
        """Whether host memory has what the slots hold. Engine thread."""
        return all(node.host is not None for node in self._weights.kv.tree.nodes() if node.slots)

    def _keep_host(self) -> None:
        """Engine thread."""
        kv = self._weights.kv
        for node in list(kv.tree.nodes()):
            if node.host is not None and kv.disk is not None:
                kv.disk.put(node, node.host, time.monotonic_ns(), node.checkpoint)

    def _leave(
        self,
        level: SleepLevel,
        error: StoreError | None,
        substitute: Model,
        on_model: Callable[[Model], None],
        began: float,
    ) -> SleepReport:
        """Give up what the tiers hold now, context and weights. Engine thread.

        Raises ``error`` where KV would be lost, ModelBusy.
        """
        self._check_idle()
        kv, core = self._weights.kv, self._weights.core
        running = self._weights.seqs.running()
        if level is SleepLevel.DISK:
            if error is not None:
                raise type(error)(f"the model stays awake, for its cached KV cannot wait on disk: {error.message}")
            kv.drop_host()
            for slot in range(core.n_slots):
                if core.retained(slot)[0]:
                    kv.forget(slot)
        elif kv.tiers.has_any:
            kv.free_retained(running, only_stored=error is not None)  # the others wait outside the tiers
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
            level, tokens, kv.host.used + self._vacancy.n_bytes, disk_bytes, (time.monotonic() - began) * 1e3
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
