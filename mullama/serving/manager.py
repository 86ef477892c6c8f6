"""Many names, few of them loaded: loading on demand, one at a time, within a budget; idle models make room.

The laws:

- An engine that somebody has a lease on is neither unloaded nor freed.
- Requests for a model that is not loaded wait in the order of their arrival; a model whose place is wanted takes no
  new requests meanwhile, so that nobody waits for ever.
- Every waiter is answered: with a lease, or with the error of the load.

Everything belongs to one event loop, but for ``add_loaded`` and ``add`` before it runs, and ``close`` after it;
``start`` tells that it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import cast

from mullama.engine.client import EngineClient
from mullama.errors import (
    AdapterLost,
    ConfigError,
    EngineDead,
    LoadCancelled,
    MemoryTooSmall,
    ModelBusy,
    ModelNotFound,
    ModelNotLoaded,
    MullamaError,
    QueueFull,
    ShuttingDown,
)
from mullama.files import counted
from mullama.serving.budget import Budget
from mullama.serving.idle import IdleMethods
from mullama.serving.making_room import RoomMethods
from mullama.serving.model_eviction import POLICIES, ModelPolicy
from mullama.serving.states import Lease, ModelState, Resident, Served
from mullama.types import Room, SleepLevel

log = logging.getLogger(__name__)

#: Load a model: (name, reference, progress) -> engine. Blocks; runs in a thread. ``progress`` returns False to cancel.
Loader = Callable[[str, str, Callable[[float], bool]], EngineClient]
FOR_EVER = -1.0


class ModelManager(IdleMethods, RoomMethods):
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keep_alive_s = keep_alive_s
        self.sleep_after_s = sleep_after_s  # idle seconds after which a model sleeps; < 0: never
        self.sleep_level = sleep_level
        self._load_engine = load
        self.budget = Budget(max_models, memory_budget)
        self._max_waiting = max_waiting
        self._policy: ModelPolicy = cast(ModelPolicy, POLICIES.load(policy)())
        self._find = find
        self._others = others
        self._estimate = estimate
        self._clock = clock
        self._served: dict[str, Served] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wanted: list[Served] = []  # to be loaded, in this order
        self._changed = asyncio.Event()  # somebody went idle, or came
        self._worker: asyncio.Task[None] | None = None
        self._reaper: asyncio.Task[None] | None = None
        self._is_leaving = False
        self._is_ending = False
        self._lock = threading.RLock()  # names come from the threads that parse bodies, engines from those that load
        self._is_closed = False
        self._arriving: list[EngineClient] = []  # loaded by a thread, and not taken over by the loop yet
        self.watchers: list[Callable[[str, EngineClient | None], None]] = []  # told of engines that come and go
        for name, engine in engines:
            self.add_loaded(name, engine)

    def start(self) -> None:
        """Requests may come from now on, on the running loop: the idle time of what is loaded begins."""
        for one in self._served.values():
            if one.resident is not None:
                one.last_used = self._clock()
        self._watch_idle()

    # -- names ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._served)

    def add(self, name: str, reference: str, *, from_store: bool = False) -> Served:
        """Serve a name, loaded on demand. Raises ConfigError when it is taken."""
        with self._lock:
            if name in self._served:
                raise ConfigError(f"two models are served as '{name}'; give one another name with NAME=REFERENCE")
            served = Served(name, reference, self.keep_alive_s, from_store=from_store)
            self._served = {**self._served, name: served}  # another one: somebody may be iterating
        return served

    def add_loaded(self, name: str, engine: EngineClient, reference: str = "") -> Served:
        """Serve an engine that is there. Raises ConfigError when the name is taken."""
        served = self.add(name, reference)
        if reference:  # as when it is loaded later: the weights are not all that it takes
            served.n_bytes = self._estimate(reference) or 0
        self._install(served, engine)
        return served

    def _install(self, served: Served, engine: EngineClient) -> Resident:
        served.resident = Resident(engine, lambda was_request: self._returned(served, was_request))
        served.state, served.error, served.gives_way = ModelState.READY, None, False
        served.asleep, served.cannot_sleep = None, False
        served.n_failures, served.failure = 0, None
        served.loaded_at = served.last_used = self._clock()
        served.n_bytes = served.n_bytes or engine.info.size_bytes
        self._tell(served, engine)
        self._watch_idle()
        return served.resident

    def _tell(self, served: Served, engine: EngineClient | None) -> None:
        for watcher in self.watchers:
            watcher(served.name, engine)

    def get(self, name: str | None) -> Served:
        """What is served as ``name``, or the first model when it is None. Raises ModelNotFound."""
        if name is None:
            for first in self._served.values():
                return first
            raise ModelNotFound("no model is served", param="model")
        served = self._served.get(name) or self._in_any_case(name)
        if served is not None:
            return served
        if len(name) <= 200 and (reference := self._find(name)) is not None:
            with self._lock:
                return self._in_any_case(name) or self.add(name.lower(), reference, from_store=True)
        known = ", ".join(self._served) or "none"
        raise ModelNotFound(f"the model '{name[:200]}' is not served here; served models: {known}", param="model")

    def _in_any_case(self, name: str) -> Served | None:
        """What is served as ``name`` but for its capitals; the lower-case one of several."""
        folded = name.lower()
        found = [one for served, one in self._served.items() if served.lower() == folded]
        return self._served.get(folded) or (found[0] if found else None)

    def resolve(self, name: str | None) -> tuple[str, EngineClient]:
        """The served name and its engine. Raises ModelNotFound, ModelNotLoaded.

        For a look that does not outlast the moment, or that may fail when the engine is closed under it: native code
        is never reached by a closed engine. What needs the model to stay takes a lease.
        """
        served = self.get(name)
        self._bury(served)
        if served.resident is None:
            raise ModelNotLoaded(f"'{served.name}' is not loaded now (it is {served.state})", param="model")
        return served.name, served.resident.engine

    def now(self) -> float:
        """The clock that ``last_used`` and ``loaded_at`` are of, in seconds."""
        return self._clock()

    def all(self) -> list[Served]:
        """Every name that was added or asked for, as it is now: engines that have stopped are given up."""
        found = list(self._served.values())
        for one in found:
            self._bury(one)
        return found

    def others(self) -> list[tuple[str, str]]:
        """(name, reference) of what could be loaded as well, and nobody has asked for yet."""
        if self._others is None:
            return []
        return [(name, reference) for name, reference in self._others() if self._in_any_case(name) is None]

    @property
    def has_others(self) -> bool:
        """Whether there is somewhere to look for them; ``others`` reads the disk."""
        return self._others is not None

    def items(self) -> list[tuple[str, EngineClient]]:
        """The loaded ones."""
        return [(one.name, one.resident.engine) for one in self._served.values() if one.resident is not None]

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

    # -- leases ---------------------------------------------------------------------------------------------------

    def try_lease(self, name: str | None) -> Lease | None:
        """A lease at once, where the model is loaded and may take requests; else None. Raises ModelNotFound."""
        served = self.get(name)
        self._bury(served)
        if served.state is not ModelState.READY or served.resident is None or self._is_ending:
            return None
        return self._grant(served, served.resident)

    def _grant(self, served: Served, resident: Resident) -> Lease:
        served.n_requests += 1
        served.last_used = self._clock()
        return resident.lease(served.name)

    def hold(self, name: str | None) -> Lease | None:
        """As ``try_lease``, for what is no request: it is not counted as one, and does not make the model look used."""
        served = self.get(name)
        self._bury(served)
        if served.state is not ModelState.READY or served.resident is None or self._is_ending:
            return None
        return served.resident.lease(served.name, is_hold=True)

    def borrow(self, name: str | None) -> Lease:
        """A hold on an engine in whatever state, for a look or a change that does not take long: it is closed after
        that. Raises ModelNotFound, ModelNotLoaded."""
        name, _ = self.resolve(name)
        resident = self._served[name].resident
        assert resident is not None
        return resident.lease(name, is_hold=True)

    async def lease(self, name: str | None) -> Lease:
        """A lease, once the model is loaded. Cancel to give up waiting.

        Raises ModelNotFound, QueueFull, ShuttingDown, and what loading it raised.
        """
        lease = self.try_lease(name)
        if lease is not None:
            return lease
        if self._is_ending:
            raise ShuttingDown("the server is shutting down", retry_after=5)
        served = self.get(name)
        if sum(len(one.waiters) for one in self._served.values()) >= self._max_waiting:
            raise QueueFull(f"{self._max_waiting} requests wait for models already", retry_after=1)
        served.check_pause(self._clock())
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        served.waiters.append(waiter)
        self._want(served)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().release()  # it came in the same moment
            raise
        finally:
            with contextlib.suppress(ValueError):
                served.waiters.remove(waiter)
                self._changed.set()  # the room may not be wanted any more

    def _want(self, served: Served) -> None:
        if served not in self._wanted:
            self._wanted.append(served)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())
        self._changed.set()

    def _returned(self, served: Served, was_request: bool) -> None:
        if was_request:
            served.last_used = self._clock()  # idle time begins with the end of the last answer
        if not self._n_leases(served):
            self._changed.set()

    # -- the worker: one load at a time -----------------------------------------------------------------------------

    async def _work(self) -> None:
        while self._wanted:
            served = self._wanted[0]
            try:
                if served.resident is None and served.waiters:  # else all who wanted it have left
                    await self._bring(served)
                elif served.resident is not None and served.state is ModelState.READY:
                    self._answer(served)
                # One that is being unloaded is wanted again when that is done: _unload sees to it.
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._fail(served, error)
            finally:
                if served in self._wanted:
                    self._wanted.remove(served)
                is_down = served.state in (ModelState.UNLOADED, ModelState.ASLEEP)
                if served.waiters and is_down and not self._is_ending:
                    self._wanted.append(served)  # they came after the load had been given up

    async def _bring(self, served: Served) -> None:
        """Make room and load. Raises what the loader raised."""
        if served.dozing is not None:
            await asyncio.wait({served.dozing})
            if served.resident is not None:  # it does not sleep after all
                self._answer(served)
                return
        if self._load_engine is None and served.asleep is None:
            raise ModelNotLoaded(f"'{served.name}' is not loaded, and nothing here loads models", param="model")
        expected: int | None = await asyncio.to_thread(self._estimate, served.reference)
        served.n_bytes = expected or served.n_bytes
        await self._make_room(served)
        if self._is_ending:
            raise ShuttingDown("the server is shutting down", retry_after=5)
        if not served.waiters:
            return  # all who wanted it have left
        served.state, served.is_unwanted, served.load_over = ModelState.LOADING, False, asyncio.Event()
        try:
            await self._load(served)
        finally:
            served.load_over.set()
            served.load_over = None

    async def _load(self, served: Served) -> None:
        began = self._clock()
        while True:
            try:
                engine = await self._wake(served)
                if engine is None:
                    engine = await self._load_anew(served)
                break
            except MemoryTooSmall as error:
                if not await self._free_memory(served, error.missing):
                    raise
        if self._is_ending:
            await asyncio.to_thread(engine.close)
            raise ShuttingDown("the server is shutting down", retry_after=5)
        if served.is_unwanted:
            served.asleep = None
            await asyncio.to_thread(engine.close)
            raise LoadCancelled(_unwanted(served))
        self._install(served, engine)
        log.info("%s: loaded in %.2f s", served.name, self._clock() - began)
        self._answer(served)

    async def _load_anew(self, served: Served) -> EngineClient:
        if self._load_engine is None:
            raise ModelNotLoaded(f"'{served.name}' could not be woken, and nothing here loads models", param="model")
        engine = await asyncio.to_thread(self._load_now, self._load_engine, served)
        self._arriving.remove(engine)
        return engine

    def _load_now(self, load: Loader, served: Served) -> EngineClient:
        """In a thread, which may outlive the loop that asked: then ``close`` closes the engine, or it is done here."""
        engine = load(served.name, served.reference, lambda fraction: not served.is_unwanted)
        with self._lock:
            if not self._is_closed:
                self._arriving.append(engine)
                return engine
        engine.close()
        raise ShuttingDown("the server is shutting down", retry_after=5)

    def _answer(self, served: Served) -> None:
        assert served.resident is not None
        waiters, served.waiters = served.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(self._grant(served, served.resident))

    def _fail(self, served: Served, error: Exception) -> None:
        if served.resident is None:
            # That there is no room now says nothing of the model.
            is_ours = isinstance(error, ModelBusy | MemoryTooSmall | AdapterLost | ShuttingDown) or served.is_unwanted
            served.state = ModelState.UNLOADED if is_ours else ModelState.FAILED
            if served.asleep is not None:
                served.state = ModelState.ASLEEP
            if not is_ours:
                served.note_failure(error, self._clock())
            served.error = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
            if served.is_unwanted:
                served.is_unwanted, served.error = False, None
                log.info("%s", error)
                return  # who waited has been told
        log.warning("%s could not be loaded: %s", served.name, error)
        waiters, served.waiters = served.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)

    def _n_leases(self, one: Served) -> int:
        return one.resident.n_leases if one.resident is not None else 0

    async def _unload(self, served: Served, *, wait: bool = True) -> None:
        """Take no new requests, wait for those that run, close. Who asks meanwhile waits for it to be loaded again.

        Without ``wait`` the engine is closed while the caller goes on.
        """
        while (resident := served.resident) is not None:
            served.state, served.gives_way = ModelState.UNLOADING, False
            await resident.idle()
            if served.resident is resident:  # else a swap has put another engine there meanwhile
                break
        else:
            return
        served.resident = None
        self._tell(served, None)
        closing = self._close(resident.engine, served.n_bytes)
        try:
            if wait:
                await closing
        finally:
            if served.state is ModelState.UNLOADING and served.resident is None:  # it may be loading again already
                served.state = ModelState.UNLOADED
            if served.waiters:
                self._want(served)

    def _close(self, engine: EngineClient, n_bytes: int) -> asyncio.Future[None]:
        """In a thread; what it takes counts until it is done."""
        closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
        self.budget.closing[closing] = n_bytes
        closing.add_done_callback(self.budget.closing.pop)
        return closing

    # -- by hand --------------------------------------------------------------------------------------------------

    def try_anew(self, name: str) -> None:
        """No pause after loads that failed: whoever asks by hand has mended something."""
        self.get(name).retry_at = 0.0

    async def load(self, name: str) -> Served:
        """See that a model is loaded. Raises as ``lease`` does."""
        self.try_anew(name)
        (await self.lease(name)).release()
        return self.get(name)

    async def unload(self, name: str, *, force: bool = False, timeout_s: float = 30.0) -> Served:
        """Unload a model now; a load that goes on is given up. Raises ModelBusy when it is in use, without ``force``.

        ``force`` lets what runs end for up to ``timeout_s`` seconds and then cancels it.
        """
        served = self.get(name)
        if served.load_over is not None:
            over, served.is_unwanted = served.load_over, True
            self._end_waiters(served, LoadCancelled(_unwanted(served)))
            await over.wait()
        if served.dozing is not None:
            await asyncio.wait({served.dozing})
        if served.state is ModelState.ASLEEP:
            await self._discard(served)
            if served.waiters:  # they came while it was being woken in vain
                self._want(served)
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
        task = asyncio.get_running_loop().create_task(self._unload_now(served, resident, timeout_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)
        return served

    async def _unload_now(self, served: Served, resident: Resident, timeout_s: float) -> None:
        served.state, served.gives_way = ModelState.UNLOADING, False
        if resident.n_leases:
            await resident.engine.drain(timeout_s)
        await self._unload(served)

    def set_keep_alive(self, name: str, seconds: float) -> None:
        """Unload a model after so many idle seconds; < 0: never, 0: as soon as it is idle."""
        self.get(name).keep_alive_s = seconds
        self._watch_idle()

    def replace(self, name: str, engine: EngineClient, *, reference: str = "") -> Resident:
        """New leases get another engine from now on. Returns the one before, which its leases keep alive.

        The caller lets it end: ``await resident.idle()``, then ``retire``.
        """
        served = self.get(name)
        old = served.resident
        if old is None:
            raise ModelNotLoaded(f"'{name}' is not loaded", param="model")
        self.budget.left[old] = served.n_bytes
        # What a model takes beside its weights is taken to stay.
        served.n_bytes = max(served.n_bytes - old.engine.info.size_bytes, 0) + engine.info.size_bytes
        served.reference = reference or served.reference
        self._install(served, engine)
        return old

    def room(self, name: str) -> Room | None:
        """What the memory budget leaves other weights of a model; None: there is no budget."""
        return self.budget.room(self.get(name), self.all())

    def give_up(self, name: str, error: MullamaError) -> None:
        """An engine has lost its weights for good: it is closed when nobody uses it; the next request loads anew."""
        served = self.get(name)
        resident = served.resident
        if resident is None:
            return
        served.resident = None
        served.state, served.error = ModelState.FAILED, error.message
        served.note_death(error, self._clock())
        self.budget.left[resident] = served.n_bytes
        self._tell(served, None)
        task = asyncio.get_running_loop().create_task(self.retire(resident))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _bury(self, served: Served) -> None:
        """Give up an engine that has stopped by itself. On the event loop, by whoever looks at the model."""
        resident = served.resident
        why = resident.engine.death if resident is not None else None
        if served.state is not ModelState.READY or why is None:
            return
        log.error("the engine of '%s' stopped: %s; the next request loads it anew", served.name, why)
        told = f"the engine of '{served.name}' stopped; the server's log says why, and the next request loads it anew"
        self.give_up(served.name, EngineDead(told))
        served.error = f"the engine stopped: {why}"

    async def retire(self, resident: Resident) -> None:
        """Close an engine that was replaced and that nobody uses any more."""
        await resident.idle()
        n_bytes = self.budget.left.pop(resident, 0)
        closing = self._close(resident.engine, n_bytes)
        self._changed.set()  # its room is free as soon as it is closed
        await closing

    # -- the end --------------------------------------------------------------------------------------------------

    def engines(self) -> list[EngineClient]:
        """Every engine that is not closed, also those that were replaced."""
        falling = [one.falling.engine for one in self._served.values() if one.falling is not None]
        asleep = [engine for _, engine in self.asleep()]
        return [*(engine for _, engine in self.items()), *(one.engine for one in self.budget.left), *falling, *asleep]

    def leave(self) -> None:
        """The server is about to end: not ready any more, though requests are still taken until ``drain``."""
        self._is_leaving = True

    @property
    def is_leaving(self) -> bool:
        return self._is_leaving or self._is_ending

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests on every engine and wait up to ``seconds``. True: no request was cut."""
        self._is_ending = True
        self._changed.set()
        for one in self._served.values():
            self._end_waiters(one, ShuttingDown("the server is shutting down", retry_after=5))
        return all(await asyncio.gather(*(engine.drain(seconds) for engine in self.engines())))

    def _end_waiters(self, served: Served, error: MullamaError) -> None:
        waiters, served.waiters = served.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)

    def close(self) -> None:
        """Stop every engine. Idempotent. The loop has ended, or nothing of this runs on it."""
        self._is_ending = True
        with self._lock:
            self._is_closed = True
            arriving, self._arriving = self._arriving, []
        for engine in [*self.engines(), *arriving]:
            engine.close()
        for one in self._served.values():
            one.resident = one.asleep = None
        self.budget.left.clear()


def _unwanted(served: Served) -> str:
    return f"'{served.name}' was unloaded while it was being loaded"
