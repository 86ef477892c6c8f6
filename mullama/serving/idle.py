"""Who is unloaded, and who sleeps, after having been idle for long enough."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from mullama.errors import ModelBusy, MullamaError
from mullama.serving.served_models import ServedModels
from mullama.serving.sleepers import Sleepers
from mullama.serving.states import ModelState, Resident, Served

log = logging.getLogger(__name__)


class IdleWatch:
    """Event loop only. ``sleep_after_s``: idle seconds after which a model sleeps; < 0: never."""

    def __init__(self, models: ServedModels, sleepers: Sleepers, sleep_after_s: float, sleep_level: str) -> None:
        self.sleep_level = sleep_level
        self._models = models
        self._sleepers = sleepers
        self._sleep_after_s = sleep_after_s
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Something is idle, or is to be idle for another time. Before the loop runs nobody looks: ``start`` does."""
        self._models.changed.set()
        if self._task is not None and not self._task.done():
            return
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            if any(self._limits(one) for one in self._models):
                self._task = loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Unload what has been idle for longer than its keep-alive; let sleep what has been for long enough."""
        models = self._models
        while not models.is_ending:
            due = [self._due(one) for one in models if self._limits(one)]
            if not due:
                return
            models.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(models.changed.wait(), max(min(due), 0.05))
            for one in list(models):
                try:
                    await self._look_at(one)
                except Exception:  # of one model; the others are watched on
                    log.exception("%s: it could not be unloaded", one.name)
                    one.last_used = models.clock()  # tried again when it is due again

    async def _look_at(self, one: Served) -> None:
        idle_s = self._models.clock() - one.last_used
        if one.is_idle and 0 <= one.keep_alive_s <= idle_s:
            log.info("%s: unloaded after %.0f idle seconds", one.name, idle_s)
            await self._models.unload(one)
        elif one.state is ModelState.ASLEEP and 0 <= one.keep_alive_s <= idle_s and not one.waiters:
            log.info("%s: given up in its sleep after %.0f idle seconds", one.name, idle_s)
            await self._sleepers.discard(one)
        elif one.is_idle and one.resident is not None and 0 <= self._sleep_after_s <= idle_s:
            await self._sleep(one, one.resident)

    async def _sleep(self, one: Served, resident: Resident) -> None:
        if resident.cannot_sleep:
            return
        try:
            await self._sleepers.sleep(one, self.sleep_level)
        except ModelBusy:
            one.last_used = self._models.clock()  # its last request was ending just now
        except MullamaError as error:
            resident.cannot_sleep = True
            log.warning("%s does not sleep: %s", one.name, error.message)
        except Exception:
            resident.cannot_sleep = True
            log.exception("%s does not sleep", one.name)

    def _limits(self, one: Served) -> list[float]:
        """Idle seconds after which something becomes of it."""
        limits = [one.keep_alive_s] if one.resident is not None or one.state is ModelState.ASLEEP else []
        if one.resident is not None and not one.resident.cannot_sleep:
            limits.append(self._sleep_after_s)
        return [limit for limit in limits if limit >= 0]

    def _due(self, one: Served) -> float:
        """Seconds until its keep-alive ends; from when the last lease was given back."""
        if one.n_leases:
            return max(min(self._limits(one)), 1.0)  # its end wakes the watcher
        return one.last_used + min(self._limits(one)) - self._models.clock()
