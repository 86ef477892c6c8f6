"""What becomes of idle models: who is unloaded, who sleeps, what a sleeping one holds, and how it comes back.

A sleeping model has no resident engine that anybody could reach: its engine waits in ``Served.asleep``. The next
request wakes it where it would else be loaded, so that requests are coalesced, and others make room, as for every load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Protocol, cast

from mullama.engine.client import EngineClient, WeightsClient
from mullama.errors import AdapterLost, InvalidRequest, MemoryTooSmall, ModelBusy, ModelNotLoaded, MullamaError
from mullama.serving.states import Asleep, ModelState, Resident, Served
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


class IdleMethods:
    """Mixed into ModelManager. Event loop only."""

    sleep_after_s: float
    sleep_level: str
    _changed: asyncio.Event
    _clock: Callable[[], float]
    _is_ending: bool
    _reaper: asyncio.Task[None] | None
    _served: dict[str, Served]
    _tasks: set[asyncio.Task[None]]

    def get(self, name: str | None) -> Served:
        raise NotImplementedError

    def _want(self, served: Served) -> None:
        raise NotImplementedError

    def _answer(self, served: Served) -> None:
        raise NotImplementedError

    def _close(self, engine: EngineClient, n_bytes: int) -> asyncio.Future[None]:
        raise NotImplementedError

    async def _unload(self, served: Served, *, wait: bool = True) -> None:
        raise NotImplementedError

    def _n_leases(self, one: Served) -> int:
        raise NotImplementedError

    def _tell(self, served: Served, engine: EngineClient | None) -> None:
        raise NotImplementedError

    async def sleep(self, name: str, level: str = SleepLevel.HOST) -> Served:
        """Let an idle model give up its weights; its cached KV waits in host memory or on disk. One asleep sleeps on.

        Raises ModelNotFound, ModelNotLoaded, ModelBusy while it is in use, InvalidRequest for an unknown level.
        """
        served = self.get(name)
        if level not in set(SleepLevel):
            raise InvalidRequest(f"level: it must be one of {', '.join(SleepLevel)}", param="level")
        resident = served.resident
        if resident is None:
            if served.asleep is not None or served.dozing is not None:
                return served
            raise ModelNotLoaded(f"'{served.name}' is not loaded: it cannot sleep", param="model")
        if resident.n_leases or served.state is not ModelState.READY:
            raise ModelBusy(f"'{served.name}' is in use or being unloaded; only an idle model can sleep")
        # Whoever asked may leave: it falls asleep all the same.
        task = asyncio.get_running_loop().create_task(self._doze(served, resident, SleepLevel(level)))
        served.dozing = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)
        return served

    async def _doze(self, served: Served, resident: Resident, level: SleepLevel) -> None:
        # Out of reach first, so that nobody meets an engine without a context.
        served.resident, served.state, served.gives_way = None, ModelState.UNLOADING, False
        engine = cast(SleepyEngine, resident.engine)
        served.falling = resident
        try:
            report = await asyncio.to_thread(engine.weights.sleep, level)
        except BaseException:
            served.resident, served.state = resident, ModelState.READY
            self._answer(served)
            raise
        else:
            served.asleep = Asleep(resident.engine, level, report.tokens, report.host_bytes, report.disk_bytes)
            served.state = ModelState.ASLEEP
            log.info("%s: asleep after %.0f ms, with %d tokens", served.name, report.sleep_ms, report.tokens)
            self._tell(served, None)
        finally:
            served.dozing = served.falling = None
            if served.waiters:
                self._want(served)
            self._watch_idle()  # its memory is free, and its keep-alive goes on

    async def _wake(self, served: Served) -> EngineClient | None:
        """The engine of a sleeping model, awake; None where there is none, or it could not be woken: then load it.

        Raises MemoryTooSmall or AdapterLost: then it sleeps on.
        """
        if served.dozing is not None:
            await asyncio.wait({served.dozing})
        asleep = served.asleep
        if asleep is None:
            return None
        try:
            woke_ms = await asyncio.to_thread(cast(SleepyEngine, asleep.engine).weights.wake)
        except (MemoryTooSmall, AdapterLost):
            raise  # it sleeps on, and is woken when there is more, or the file is back
        except MullamaError as error:
            log.warning("%s could not be woken, and is loaded anew: %s", served.name, error.message)
            await self._discard(served)
            return None
        log.info("%s: awake after %.0f ms", served.name, woke_ms)
        return asleep.engine

    async def _discard(self, served: Served) -> None:
        """Close a sleeping engine; what it held is lost, but for what is on disk."""
        asleep, served.asleep = served.asleep, None
        if asleep is None:
            return
        if served.state is ModelState.ASLEEP:
            served.state = ModelState.UNLOADED
        await self._close(asleep.engine, asleep.host_bytes)

    def _sleeper_in_the_way(self, served: Served, missing: int) -> Served | None:
        """Who sleeps longest of those whose memory would help, where ``missing`` bytes of the budget are; else None."""
        if missing <= 0:
            return None
        sleepers = [
            one
            for one in self._served.values()
            if one is not served and one.state is ModelState.ASLEEP and one.asleep is not None and one.asleep.host_bytes
            and not one.pinned
        ]  # fmt: skip
        return min(sleepers, key=lambda one: one.last_used, default=None)

    def asleep(self) -> list[tuple[str, EngineClient]]:
        """The sleeping ones, of which only ``memory_report`` may be asked."""
        return [(one.name, one.asleep.engine) for one in self._served.values() if one.asleep is not None]

    def _watch_idle(self) -> None:
        """See that somebody watches what is idle. Before the loop runs nobody does: ``start`` sees to it then."""
        self._changed.set()
        if self._reaper is not None and not self._reaper.done():
            return
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            if any(self._limits(one) for one in self._served.values()):
                self._reaper = loop.create_task(self._reap())

    async def _reap(self) -> None:
        """Unload what has been idle for longer than its keep-alive; let sleep what has been for long enough."""
        while not self._is_ending:
            due = [self._due(one) for one in self._served.values() if self._limits(one)]
            if not due:
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(min(due), 0.05))
            for one in list(self._served.values()):
                try:
                    await self._reap_one(one)
                except Exception:  # of one model; the others are watched on
                    log.exception("%s: it could not be unloaded", one.name)
                    one.last_used = self._clock()  # tried again when it is due again

    async def _reap_one(self, one: Served) -> None:
        is_idle = one.state is ModelState.READY and not self._n_leases(one)
        idle_s = self._clock() - one.last_used
        if is_idle and 0 <= one.keep_alive_s <= idle_s:
            log.info("%s: unloaded after %.0f idle seconds", one.name, idle_s)
            await self._unload(one)
        elif one.state is ModelState.ASLEEP and 0 <= one.keep_alive_s <= idle_s and not one.waiters:
            log.info("%s: given up in its sleep after %.0f idle seconds", one.name, idle_s)
            await self._discard(one)
        elif is_idle and not one.cannot_sleep and 0 <= self.sleep_after_s <= idle_s:
            try:
                await self.sleep(one.name, self.sleep_level)
            except ModelBusy:
                one.last_used = self._clock()  # its last request was ending just now
            except MullamaError as error:
                one.cannot_sleep = True
                log.warning("%s does not sleep: %s", one.name, error.message)
            except Exception:
                one.cannot_sleep = True
                log.exception("%s does not sleep", one.name)

    def _limits(self, one: Served) -> list[float]:
        """Idle seconds after which something becomes of it."""
        limits = [one.keep_alive_s] if one.resident is not None or one.state is ModelState.ASLEEP else []
        if one.resident is not None and not one.cannot_sleep:
            limits.append(self.sleep_after_s)
        return [limit for limit in limits if limit >= 0]

    def _due(self, one: Served) -> float:
        """Seconds until its keep-alive ends; from when the last lease was given back."""
        if self._n_leases(one):
            return max(min(self._limits(one)), 1.0)  # its end wakes the watcher
        return one.last_used + min(self._limits(one)) - self._clock()
