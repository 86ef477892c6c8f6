"""Many names, few of them loaded: loading on demand, one at a time, within a budget; idle models make room.

The laws:

- An engine that somebody has a lease on is neither unloaded nor freed.
- Requests for a model that is not loaded wait in the order of their arrival; a model whose memory is wanted takes no
  new requests meanwhile, so that nobody waits for ever.
- Every waiter is answered: with a lease, or with the error of the load.

Everything belongs to one event loop, but for ``add_loaded`` and ``add`` before it runs, and ``close`` after it;
``start`` tells that it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import cast

from mullama.engine.client import EngineClient
from mullama.errors import (
    ConfigError,
    InvalidRequest,
    LoadCancelled,
    ModelBusy,
    ModelNotFound,
    ModelNotLoaded,
    QueueFull,
    ShuttingDown,
)
from mullama.files import counted
from mullama.serving.budget import Budget
from mullama.serving.idle import IdleWatch
from mullama.serving.loads import Loader, Loads
from mullama.serving.model_eviction import POLICIES, Evictor, ModelPolicy
from mullama.serving.served_models import VISIBLE, Names, ServedModels, is_visible
from mullama.serving.sleepers import Sleepers
from mullama.serving.states import Lease, ModelState, Resident, Served
from mullama.types import MemoryLeft, SleepLevel

FOR_EVER = -1.0


class ModelManager:
    """The models of a server, in the order they were named; the first answers requests that name none.

    ``engines`` are loaded already, by name; ``load`` loads those that are asked for.

    ``find`` says what a name stands for that nobody has added (a model of the store), ``others`` lists such names.
    ``estimate`` guesses the bytes that a reference will take. A limit of 0 is none.
    """

    def __init__(
        self,
        engines: Iterable[tuple[str, EngineClient]] = (),
        *,
        load: Loader | None = None,
        max_models: int = 0,
        memory_budget: int = 0,
        max_waiting: int = 256,
        keep_alive_s: float = FOR_EVER,
        sleep_after_s: float = FOR_EVER,
        sleep_level: str = SleepLevel.HOST,
        policy: str = "lru",
        find: Callable[[str], str | None] = lambda name: None,
        others: Callable[[], Iterable[tuple[str, str]]] | None = None,
        estimate: Callable[[str], int | None] = lambda reference: None,
        names: Names | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = Budget(max_models, memory_budget)
        self.served = ServedModels(self.budget, clock)
        self.watchers = self.served.watchers  # told of engines that come and go
        self.sleepers = Sleepers(self.served)
        self.evictor = Evictor(self.served, self.sleepers, cast(ModelPolicy, POLICIES.load(policy)()))
        self.loads = Loads(self.served, self.sleepers, self.evictor, load, estimate)
        self.idle = IdleWatch(self.served, self.sleepers, sleep_after_s, sleep_level)
        self.served.on_wanted, self.served.on_idle = self.loads.want, self.idle.look
        self._keep_alive_s = keep_alive_s
        self._max_waiting = max_waiting
        self._find = find
        self._others = others
        self._estimate = estimate
        self.names = names or Names()
        self._is_leaving = False
        self._lock = threading.RLock()  # names come from the threads that parse bodies
        for name, engine in engines:
            self.add_loaded(name, engine)

    def start(self) -> None:
        """Requests may come from now on, on the running loop: the idle time of what is loaded begins."""
        for one in self.served:
            if one.resident is not None:
                one.last_used = self.now()
        self.idle.look()

    # -- names ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.served)

    def add(self, name: str, reference: str, *, from_store: bool = False) -> Served:
        """Serve a name, loaded on demand. Raises ConfigError when it is taken."""
        with self._lock:
            if name in self.served.by_name:
                raise ConfigError(f"two models are served as '{name}'; give one another name with NAME=REFERENCE")
            served = Served(name, reference, self._keep_alive_s, from_store=from_store)
            self.served.add(served)
        return served

    def add_loaded(self, name: str, engine: EngineClient, reference: str = "") -> Served:
        """Serve an engine that is there. Raises ConfigError when the name is taken."""
        served = self.add(name, reference)
        if reference:  # as when it is loaded later: the weights are not all that it takes
            served.n_bytes = self._estimate(reference) or 0
        self.served.install(served, engine)
        return served

    def get(self, name: str | None) -> Served:
        """What is served as ``name``, or the first model when it is None. Raises ModelNotFound."""
        if name is None:
            for first in self._visible():
                return first
            raise ModelNotFound("no model is served", param="model")
        for one in dict.fromkeys((name, self.names.meant(name))):
            served = self.served.by_name.get(one) or self.served.in_any_case(one)
            if served is not None and ((visible := VISIBLE.get()) is None or visible(served.name)):
                return served
        name = self.names.meant(name)
        if len(name) <= 200 and is_visible(name) and (reference := self._find(name)) is not None:
            with self._lock:
                return self.served.in_any_case(name) or self.add(name.lower(), reference, from_store=True)
        known = ", ".join(one.name for one in self._visible()) or "none"
        raise ModelNotFound(f"the model '{name[:200]}' is not served here; served models: {known}", param="model")

    def _visible(self) -> Iterator[Served]:
        return (one for one in self.served if is_visible(one.name))

    def asked(self, name: str | None) -> Served:
        """What answers a request for ``name``. Raises ModelNotFound, InvalidRequest where it must name a model."""
        if name is None and self.names.is_required:
            raise InvalidRequest("model: it is missing; it must be the name of a served model", param="model")
        try:
            return self.get(name)
        except ModelNotFound:
            if not self.names.any_is_first:
                raise
            return self.get(None)

    def resolve(self, name: str | None) -> tuple[str, EngineClient]:
        """The served name and its engine. Raises ModelNotFound, ModelNotLoaded.

        For a look that does not outlast the moment, or that may fail when the engine is closed under it: native code
        is never reached by a closed engine. What needs the model to stay takes a lease.
        """
        served, resident = self._loaded(name)
        return served.name, resident.engine

    def _loaded(self, name: str | None) -> tuple[Served, Resident]:
        served = self.get(name)
        self.served.bury(served)
        if served.resident is None:
            raise ModelNotLoaded(f"'{served.name}' is not loaded now (it is {served.state.shown})", param="model")
        return served, served.resident

    def now(self) -> float:
        """The clock that ``last_used`` and ``loaded_at`` are of, in seconds."""
        return self.served.clock()

    def all(self) -> list[Served]:
        """Every name that was added or asked for, as it is now: engines that have stopped are given up."""
        return [one for one in self.served.all() if is_visible(one.name)]

    def items(self) -> list[tuple[str, EngineClient]]:
        """The loaded ones."""
        return [(name, engine) for name, engine in self.served.loaded() if is_visible(name)]

    def others(self) -> list[tuple[str, str]]:
        """(name, reference) of what could be loaded as well, and nobody has asked for yet."""
        if self._others is None:
            return []
        return [
            (name, reference)
            for name, reference in self._others()
            if self.served.in_any_case(name) is None and is_visible(name)
        ]

    @property
    def has_others(self) -> bool:
        """Whether there is somewhere to look for them; ``others`` reads the disk."""
        return self._others is not None

    # -- leases ---------------------------------------------------------------------------------------------------

    def try_lease(self, name: str | None) -> Lease | None:
        """A lease at once, where the model is loaded and may take requests; else None. Raises ModelNotFound."""
        return self.served.lease(self.get(name))

    def hold(self, name: str | None) -> Lease | None:
        """As ``try_lease``, for what is no request: it is not counted as one, and does not make the model look used."""
        return self.served.lease(self.get(name), is_hold=True)

    def borrow(self, name: str | None) -> Lease:
        """A hold on an engine in whatever state, for a look or a change that does not take long: it is closed after
        that. Raises ModelNotFound, ModelNotLoaded."""
        served, resident = self._loaded(name)
        return resident.lease(served.name, is_hold=True)

    async def lease(self, name: str | None) -> Lease:
        """A lease, once the model is loaded. Cancel to give up waiting.

        Raises ModelNotFound, QueueFull, ShuttingDown, and what loading it raised.
        """
        lease = self.try_lease(name)
        if lease is not None:
            return lease
        if self.served.is_ending:
            raise ShuttingDown("the server is shutting down", retry_after=5)
        served = self.get(name)
        if sum(len(one.waiters) for one in self.served) >= self._max_waiting:
            raise QueueFull(f"{self._max_waiting} requests wait for models already", retry_after=1)
        if served.state is ModelState.FAILED:
            served.failures.check_pause(self.now())
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        served.waiters.append(waiter)
        self.loads.want(served)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().release()  # it came in the same moment
            raise
        finally:
            with contextlib.suppress(ValueError):
                served.waiters.remove(waiter)
                self.served.changed.set()  # the memory may not be wanted any more

    # -- by hand --------------------------------------------------------------------------------------------------

    def try_anew(self, name: str) -> None:
        """No pause after loads that failed: whoever asks by hand has mended something."""
        self.get(name).failures.retry_at = 0.0

    async def load(self, name: str) -> Served:
        """See that a model is loaded. Raises as ``lease`` does."""
        self.try_anew(name)
        (await self.lease(name)).release()
        return self.get(name)

    async def sleep(self, name: str, level: str | None = None) -> Served:
        """Let an idle model sleep (see Sleepers.sleep), by default as ``sleep_level`` says. Raises ModelNotFound."""
        served = self.get(name)
        await self.sleepers.sleep(served, self.idle.sleep_level if level is None else level)
        return served

    async def unload(self, name: str, *, force: bool = False, timeout_s: float = 30.0) -> Served:
        """Unload a model now; a load that goes on is given up. Raises ModelBusy when it is in use, without ``force``.

        ``force`` lets what runs end for up to ``timeout_s`` seconds and then cancels it.
        """
        served = self.get(name)
        if served.load is not None:
            load, served.load.is_unwanted = served.load, True
            error = LoadCancelled(f"'{served.name}' was unloaded while it was being loaded")
            self.served.refuse(served, error)
            await load.over.wait()
        if served.falling is not None:
            await asyncio.wait({served.falling.task})
        if served.state is ModelState.ASLEEP:
            await self.sleepers.discard(served)
            if served.waiters:  # they came while it was being woken in vain
                self.loads.want(served)
        resident = served.resident
        if resident is None:
            return served
        if resident.n_leases and not force:
            what = (
                f"answers {counted(served.in_use, 'request')} now"
                if served.in_use
                else "is looked at or changes its weights now"
            )
            raise ModelBusy(f"'{served.name}' {what}; unload it with force")
        # An engine that drains takes no request any more: whoever asked may leave, and it is unloaded all the same.
        await asyncio.shield(self.served.keep(self._unload(served, resident, timeout_s)))
        return served

    async def _unload(self, served: Served, resident: Resident, timeout_s: float) -> None:
        served.move(ModelState.UNLOADING)
        if resident.n_leases:
            await resident.engine.drain(timeout_s)
        await self.served.unload(served)

    def set_keep_alive(self, name: str, seconds: float) -> None:
        """Unload a model after so many idle seconds; < 0: never, 0: as soon as it is idle."""
        self.get(name).keep_alive_s = seconds
        self.idle.look()

    def memory_left(self, name: str) -> MemoryLeft | None:
        """What the memory budget leaves other weights of a model; None: there is no budget."""
        return self.budget.memory_left(self.get(name), self.all())

    # -- the end --------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """A model is served, none of the named ones has failed, every loaded one makes progress, and nobody has said
        that the server is about to end."""
        if self.is_leaving:
            return False
        named = [one for one in self.all() if not one.from_store]
        return bool(named) and all(
            one.state is not ModelState.FAILED and (one.resident is None or one.resident.engine.is_ready())
            for one in named
        )

    def leave(self) -> None:
        """The server is about to end: not ready any more, though requests are still taken until ``drain``."""
        self._is_leaving = True

    @property
    def is_leaving(self) -> bool:
        return self._is_leaving or self.served.is_ending

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests on every engine and wait up to ``seconds``. True: no request was cut."""
        self.served.is_ending = True
        self.served.changed.set()
        for one in self.served:
            self.served.refuse(one, ShuttingDown("the server is shutting down", retry_after=5))
        return all(await asyncio.gather(*(engine.drain(seconds) for engine in self.served.engines())))

    def close(self) -> None:
        """Stop every engine. Idempotent. The loop has ended, or nothing of this runs on it."""
        self.served.is_ending = True
        self.loads.close()
        self.served.close_all()
