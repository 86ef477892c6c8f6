"""What a server serves: names, the engines behind them as they come and go, and who waits for one.

The parts that act on it (loads.py, sleepers.py, model_eviction.py, idle.py) know each other no more than they must:
``on_wanted`` and ``on_idle`` are where it tells of a model that is to be loaded, and of one whose idle time begins.
Event loop only, but for ``add`` and ``install`` before it runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from mullama.engine.client import EngineClient
from mullama.errors import ConfigError, EngineDead, ModelNotLoaded, MullamaError
from mullama.serving.budget import Budget
from mullama.serving.states import Lease, ModelState, Resident, Served

log = logging.getLogger(__name__)


#: Which served names whoever asks just now may use; None: all. Set for the task of a request, and what works for it.
VISIBLE: ContextVar[Callable[[str], bool] | None] = ContextVar("visible", default=None)


def is_visible(name: str) -> bool:
    visible = VISIBLE.get()
    return visible is None or visible(name)


@dataclass(slots=True, frozen=True)
class Names:
    """Further names of served models, and what becomes of requests whose name is none.

    ``aliases``: an alias in lower case, and the served name that it means.
    """

    aliases: dict[str, str] = field(default_factory=dict)
    any_is_first: bool = False  # a name that is not served means the first model
    is_required: bool = False  # a request without a name is refused

    @classmethod
    def of(cls, texts: Iterable[str], *, any_is_first: bool, is_required: bool) -> Names:
        """``texts``: each ``ALIAS=NAME``. Raises ConfigError for an alias that is given twice."""
        aliases: dict[str, str] = {}
        for text in texts:
            alias, _, name = text.partition("=")
            if alias.lower() in aliases:
                raise ConfigError(f"--alias: '{alias}' is given twice", param="alias")
            aliases[alias.lower()] = name
        return cls(aliases, any_is_first, is_required)

    def meant(self, name: str) -> str:
        return self.aliases.get(name.lower(), name) if self.aliases else name

    def of_model(self, name: str) -> list[str]:
        """The aliases of a served name."""
        return [alias for alias, meant in self.aliases.items() if meant.lower() == name.lower()]


class ServedModels:
    """In the order they were named. ``clock``: seconds; all times of a Served are of it."""

    def __init__(self, budget: Budget, clock: Callable[[], float]) -> None:
        self.budget = budget
        self.clock = clock
        self.changed = asyncio.Event()  # somebody went idle, or came
        self.is_ending = False
        self.watchers: list[Callable[[str, EngineClient | None], None]] = []  # told of engines that come and go
        self.on_wanted: Callable[[Served], None] = lambda served: None
        self.on_idle: Callable[[], None] = lambda: None
        self.by_name: dict[str, Served] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self.by_name)

    def __iter__(self) -> Iterator[Served]:
        return iter(self.by_name.values())

    def in_any_case(self, name: str) -> Served | None:
        """What is served as ``name`` but for its capitals; the lower-case one of several."""
        folded = name.lower()
        found = [one for served, one in self.by_name.items() if served.lower() == folded]
        return self.by_name.get(folded) or (found[0] if found else None)

    def add(self, served: Served) -> None:
        """The name is not taken; the caller sees that one thread at a time adds."""
        self.by_name = {**self.by_name, served.name: served}  # another one: somebody may be iterating

    def all(self) -> list[Served]:
        """Every one as it is now: engines that have stopped are given up."""
        found = list(self)
        for one in found:
            self.bury(one)
        return found

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have work done to its end, whoever asked for it and leaves."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- engines that come --------------------------------------------------------------------------------------

    def install(self, served: Served, engine: EngineClient) -> Resident:
        """Requests get this engine from now on."""
        now = self.clock()
        resident = Resident(engine, lambda was_request: self._returned(served, was_request), now)
        served.resident, served.asleep, served.error = resident, None, None
        served.move(ModelState.READY)
        served.failures.clear()
        served.last_used = now
        served.n_bytes = served.n_bytes or engine.info.size_bytes
        self.tell(served, engine)
        self.on_idle()
        return resident

    def tell(self, served: Served, engine: EngineClient | None) -> None:
        for watcher in self.watchers:
            watcher(served.name, engine)

    def lease(self, served: Served, *, is_hold: bool = False) -> Lease | None:
        """A lease where the model takes requests now; a hold stands for none, and does not make it look used."""
        self.bury(served)
        if served.state is not ModelState.READY or served.resident is None or self.is_ending:
            return None
        return served.resident.lease(served.name, is_hold=True) if is_hold else self._grant(served, served.resident)

    def _grant(self, served: Served, resident: Resident) -> Lease:
        served.n_requests += 1
        served.last_used = self.clock()
        return resident.lease(served.name)

    def _returned(self, served: Served, was_request: bool) -> None:
        if was_request:
            served.last_used = self.clock()  # idle time begins with the end of the last answer
        if not served.n_leases:
            self.changed.set()

    def answer(self, served: Served) -> None:
        """Give all who wait for it a lease."""
        assert served.resident is not None
        waiters, served.waiters = served.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(self._grant(served, served.resident))

    def refuse(self, served: Served, error: Exception) -> None:
        """Tell all who wait for it that it does not come."""
        waiters, served.waiters = served.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)

    # -- engines that go ----------------------------------------------------------------------------------------

    async def unload(self, served: Served, *, wait: bool = True) -> None:
        """Take no new requests, wait for those that run, close. Who asks meanwhile waits for it to be loaded again.

        Without ``wait`` the engine is closed while the caller goes on.
        """
        while (resident := served.resident) is not None:
            served.move(ModelState.UNLOADING)
            await resident.idle()
            if served.resident is resident:  # else a swap has put another engine there meanwhile
                break
        else:
            return
        served.resident = None
        self.tell(served, None)
        closing = self.close(resident.engine, served.n_bytes)
        try:
            if wait:
                await closing
        finally:
            if served.state is ModelState.UNLOADING and served.resident is None:  # it may be loading again already
                served.move(ModelState.UNLOADED)
            if served.waiters:
                self.on_wanted(served)

    def close(self, engine: EngineClient, n_bytes: int) -> asyncio.Future[None]:
        """In a thread; what it takes counts until it is done."""
        closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
        self.budget.closing[closing] = n_bytes
        closing.add_done_callback(self.budget.closing.pop)
        return closing

    def replace(self, served: Served, engine: EngineClient, reference: str = "") -> Resident:
        """New leases get another engine from now on. Returns the one before, which its leases keep alive.

        The caller lets it end: ``await resident.idle()``, then ``retire``. Raises ModelNotLoaded.
        """
        old = served.resident
        if old is None:
            raise ModelNotLoaded(f"'{served.name}' is not loaded", param="model")
        self.budget.left[old] = served.n_bytes
        # What a model takes beside its weights is taken to stay.
        served.n_bytes = max(served.n_bytes - old.engine.info.size_bytes, 0) + engine.info.size_bytes
        served.reference = reference or served.reference
        self.install(served, engine)
        return old

    def give_up(self, served: Served, error: MullamaError) -> None:
        """Its engine has lost its weights for good: it is closed when nobody uses it; the next request loads anew."""
        resident = served.resident
        if resident is None:
            return
        served.resident = None
        served.move(ModelState.FAILED)
        served.error = error.message
        served.failures.note_death(error, self.clock(), resident.loaded_at)
        self.budget.left[resident] = served.n_bytes
        self.tell(served, None)
        self.keep(self.retire(resident))

    def bury(self, served: Served) -> None:
        """Give up an engine that has stopped by itself; by whoever looks at the model."""
        resident = served.resident
        why = resident.engine.death if resident is not None else None
        if served.state is not ModelState.READY or why is None:
            return
        log.error("the engine of '%s' stopped: %s; the next request loads it anew", served.name, why)
        told = f"the engine of '{served.name}' stopped; the server's log says why, and the next request loads it anew"
        self.give_up(served, EngineDead(told))
        served.error = f"the engine stopped: {why}"

    async def retire(self, resident: Resident) -> None:
        """Close an engine that was replaced and that nobody uses any more."""
        await resident.idle()
        closing = self.close(resident.engine, self.budget.left.pop(resident, 0))
        self.changed.set()  # its memory is free as soon as it is closed
        await closing

    # -- the end ------------------------------------------------------------------------------------------------

    def loaded(self) -> list[tuple[str, EngineClient]]:
        return [(one.name, one.resident.engine) for one in self if one.resident is not None]

    def asleep(self) -> list[tuple[str, EngineClient]]:
        """The sleeping ones, of which only ``memory_report`` may be asked."""
        return [(one.name, one.asleep.engine) for one in self if one.asleep is not None]

    def engines(self) -> list[EngineClient]:
        """Every engine that is not closed, also those that were replaced."""
        named = [engine for _, engine in (*self.loaded(), *self.asleep())]
        falling = [one.falling.resident.engine for one in self if one.falling is not None]
        return [*named, *falling, *(one.engine for one in self.budget.left)]

    def close_all(self) -> None:
        """Close every engine. Idempotent. The loop has ended, or nothing of this runs on it."""
        for engine in self.engines():
            engine.close()
        for one in self:
            one.resident = one.asleep = None
        self.budget.left.clear()
