"""Sleep: an idle engine gives up its weights and its context, and keeps what its KV cache holds.

The KV of the slots moves to the tiers, host memory or disk, where the next prompts find it after the wake; where there
is no tier, llama.cpp's own copy of each slot waits in host memory. The engine thread goes on all the while.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mullama._core import Model
from mullama.engine.memory import fits
from mullama.engine.parts import EngineParts
from mullama.engine.weights.unload import load_again, stand_in, unload
from mullama.errors import InvalidRequest, ModelBusy, ModelLoadError, StoreError
from mullama.files import identity_of
from mullama.observe.process_memory import give_back_heap
from mullama.types import SleepLevel


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

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._substitute: Model | None = None  # tokenises while it is asleep
        self._path = ""
        self._identity: tuple[int, int, int] | None = None

    @property
    def is_asleep(self) -> bool:
        return self._substitute is not None

    def fall(self, level: SleepLevel) -> SleepReport:
        """Free context and weights.

        Raises ModelBusy while anything runs or the weights change, InvalidRequest without a disk tier, StoreError when
        the disk does not take the KV that is to wait there. Nothing is lost then.
        """
        parts = self._parts
        parts.commands.call(self._take_none).result()
        try:
            if self.is_asleep:
                raise InvalidRequest("the model is asleep already", param="level")
            began = time.monotonic()
            on_disk = level is SleepLevel.DISK
            with parts.weights.held():  # first: while the weights change, the disk tier is away for a moment
                if on_disk and parts.kv.disk is None:
                    raise InvalidRequest(
                        "there is no disk tier: start the server with --kv-disk-dir DIR", param="level"
                    )
                substitute = stand_in(parts.core.model, parts.config)
                try:
                    error = self._write_out(on_disk)
                    return parts.commands.call(lambda: self._leave(level, error, substitute, began)).result()
                finally:
                    if not self.is_asleep:
                        substitute.close()
        finally:
            self._take_again()

    def _take_none(self) -> None:
        """No request is taken from here on: it would meet an engine without a context. Engine thread."""
        parts = self._parts
        with parts.commands.lock:
            if parts.n_waiting or parts.seqs:
                raise ModelBusy("the model computes now; only an idle one can sleep")
            parts.takes_none = True

    def _take_again(self) -> None:
        """Requests are taken again, unless it sleeps."""
        with self._parts.commands.lock:
            self._parts.takes_none = self.is_asleep

    def _check_idle(self) -> None:
        if self._parts.seqs or self._parts.weights.change is not None:
            raise ModelBusy("the model computes now, or changes its weights; only an idle one can sleep")

    def _write_out(self, on_disk: bool) -> StoreError | None:
        """Have the tiers hold what the slots do, and the disk all of it if ``on_disk``; nothing is given up yet.

        Returns why the disk did not take all that it should. Raises ModelBusy.
        """
        kv, call = self._parts.kv, self._parts.commands.call
        disk, works = kv.disk, [self._store_slots]
        if disk is None:
            call(self._store_slots).result()
            return None
        if on_disk:  # host memory first: for what the slots bring there, something else may have to go
            works.insert(0, self._keep_host)
        n_failed = disk.n_failed
        for work in works:
            while not call(partial(disk.hand_over, work)).result():
                disk.written().result()
            if not on_disk and call(self._is_in_memory).result():
                return None  # nobody depends on what the disk does
            disk.written().result()
            error = call(lambda: disk.error_since(n_failed)).result()
            if error is not None:
                return error
        return None

    def _store_slots(self) -> None:
        """Engine thread."""
        self._check_idle()
        if self._parts.kv.tiers.has_any:
            self._parts.kv.store_retained(self._parts.seqs.running())

    def _is_in_memory(self) -> bool:
        """Whether host memory has what the slots hold. Engine thread."""
        return all(node.host is not None for node in self._parts.kv.tree.nodes() if node.slots)

    def _keep_host(self) -> None:
        """Engine thread."""
        kv = self._parts.kv
        for node in list(kv.tree.nodes()):
            if node.host is not None and kv.disk is not None:
                kv.disk.put(node, node.host, time.monotonic_ns(), node.checkpoint)

    def _leave(self, level: SleepLevel, error: StoreError | None, substitute: Model, began: float) -> SleepReport:
        """Give up what the tiers hold now, context and weights. Engine thread.

        Raises ``error`` where KV would be lost, ModelBusy.
        """
        self._check_idle()
        kv, core, running = self._parts.kv, self._parts.core, self._parts.seqs.running()
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
        vacancy = unload(self._parts, substitute)
        self._substitute = substitute
        give_back_heap()
        tokens = sum(node.n_tokens for node in kv.tree.nodes() if node.is_stored or node.slots)
        disk_bytes = kv.disk.store.bytes_used if kv.disk is not None else 0
        return SleepReport(level, tokens, kv.host.used + vacancy.n_bytes, disk_bytes, (time.monotonic() - began) * 1e3)

    def wake(self) -> float:
        """Load the weights again and go on; ms it took, 0 when it was awake.

        Raises ModelLoadError, also when the file has changed meanwhile, and MemoryTooSmall before anything is loaded:
        then it sleeps on, and may only be closed or woken again.
        """
        if not self.is_asleep:
            return 0.0  # also while it falls asleep: who asked for that has not been answered yet
        began, parts = time.monotonic(), self._parts
        try:
            if identity_of(Path(self._path)) != self._identity:
                raise ModelLoadError(f"{self._path} has changed, or gone, while the model was asleep")
            with parts.weights.held():
                fits.check(self._path, parts.config, parts.info.name, parts.core.n_ctx, parts.core.n_slots)
                parts.commands.call(self._enter).result()
        finally:
            self._take_again()
        return (time.monotonic() - began) * 1e3

    def _enter(self) -> None:
        """Engine thread."""
        load_again(self._parts, self._path, lambda fraction: not self._parts.commands.stopping)
        if self._substitute is not None:
            self._substitute.close()
            self._substitute = None
