"""Models that sleep: what a sleeping one holds, and how it comes back.

A sleeping model has no resident engine that anybody could reach: its engine waits in ``Served.asleep``. The next
request wakes it where it would else be loaded, so that requests are coalesced, and others give up memory, as for every
load.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol, cast

from mullama.engine.client import EngineClient, WeightsClient
from mullama.errors import AdapterLost, InvalidRequest, MemoryTooSmall, ModelBusy, ModelNotLoaded, MullamaError
from mullama.serving.served_models import ServedModels
from mullama.serving.states import Asleep, FallingAsleep, ModelState, Resident, Served
from mullama.types import SleepLevel

log = logging.getLogger(__name__)


class SleepyWeights(WeightsClient, Protocol):
    """What a sleep asks of an engine's weights."""

    def sleep(self, level: Any = "host") -> Any: ...

    def wake(self) -> float: ...


class SleepyEngine(EngineClient, Protocol):
    """An engine that can sleep."""

    @property
    def weights(self) -> SleepyWeights: ...


class Sleepers:
    """Event loop only."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    async def sleep(self, served: Served, level: str) -> None:
        """Let an idle model give up its weights; its cached KV waits in host memory or on disk. One asleep sleeps on.

        Raises ModelNotLoaded, ModelBusy while it is in use, InvalidRequest for an unknown level.
        """
        if level not in set(SleepLevel):
            raise InvalidRequest(f"level: it must be one of {', '.join(SleepLevel)}", param="level")
        resident = served.resident
        if resident is None:
            if served.asleep is not None or served.falling is not None:
                return
            raise ModelNotLoaded(f"'{served.name}' is not loaded: it cannot sleep", param="model")
        if not served.is_idle:
            raise ModelBusy(f"'{served.name}' is in use or being unloaded; only an idle model can sleep")
        # Whoever asked may leave: it falls asleep all the same.
        task = self._models.keep(self._fall(served, resident, SleepLevel(level)))
        # Out of reach first, so that nobody meets an engine without a context.
        served.resident, served.falling = None, FallingAsleep(resident, task)
        served.move(ModelState.FALLING_ASLEEP)
        await asyncio.shield(task)

    async def _fall(self, served: Served, resident: Resident, level: SleepLevel) -> None:
        try:
            report = await asyncio.to_thread(cast(SleepyEngine, resident.engine).weights.sleep, level)
        except BaseException:
            served.resident, served.falling = resident, None
            served.move(ModelState.READY)
            self._models.answer(served)
            raise
        else:
            served.asleep = Asleep(resident.engine, level, report.tokens, report.host_bytes, report.disk_bytes)
            served.falling = None
            served.move(ModelState.ASLEEP)
            log.info("%s: asleep after %.0f ms, with %d tokens", served.name, report.sleep_ms, report.tokens)
            self._models.tell(served, None)
        finally:
            if served.waiters:
                self._models.on_wanted(served)
            self._models.on_idle()  # its memory is free, and its keep-alive goes on

    async def wake(self, served: Served) -> EngineClient | None:
        """The engine of a sleeping model, awake; None where there is none, or it could not be woken: then load it.

        Raises MemoryTooSmall or AdapterLost: then it sleeps on.
        """
        asleep = served.asleep
        if asleep is None:
            return None
        try:
            woke_ms = await asyncio.to_thread(cast(SleepyEngine, asleep.engine).weights.wake)
        except (MemoryTooSmall, AdapterLost):
            raise  # it sleeps on, and is woken when there is more, or the file is back
        except MullamaError as error:
            log.warning("%s could not be woken, and is loaded anew: %s", served.name, error.message)
            served.move(ModelState.LOADING)
            await self._close(served)
            return None
        log.info("%s: awake after %.0f ms", served.name, woke_ms)
        return asleep.engine

    async def discard(self, served: Served) -> None:
        """Close a sleeping engine; what it held is lost, but for what is on disk."""
        if served.state is ModelState.ASLEEP:
            served.move(ModelState.UNLOADED)
            await self._close(served)

    async def _close(self, served: Served) -> None:
        asleep, served.asleep = served.asleep, None
        if asleep is not None:
            await self._models.close(asleep.engine, asleep.host_bytes)

    def in_the_way(self, served: Served, missing: int) -> Served | None:
        """Who sleeps longest of those whose memory would help, where ``missing`` bytes of the budget are; else None."""
        if missing <= 0:
            return None
        sleepers = [
            one
            for one in self._models
            if one is not served and one.state is ModelState.ASLEEP and one.asleep is not None and one.asleep.host_bytes
            and not one.pinned
        ]  # fmt: skip
        return min(sleepers, key=lambda one: one.last_used, default=None)
