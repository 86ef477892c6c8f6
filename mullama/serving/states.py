"""A served name, the engine behind it, and the leases that keep the engine alive."""

from __future__ import annotations

import asyncio
import copy
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from mullama.engine.client import EngineClient
from mullama.errors import MullamaError
from mullama.types import SleepLevel

FIRST_PAUSE_S = 0.5  # after the second failed load in a row; it doubles with each
MOST_PAUSE_S = 30.0
STEADY_S = 60.0  # an engine that stops after such a time did not stop because it was loaded


class ModelState(enum.StrEnum):
    """Where a served name is in its life."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"  # it takes no new requests; those that run end first
    ASLEEP = "asleep"  # without weights; the next request wakes it
    FAILED = "failed"  # the last load failed; the next request tries again


class Resident:
    """A loaded engine and how many use it. Event loop only, but for reading ``n_leases``."""

    def __init__(self, engine: EngineClient, on_return: Callable[[bool], None]) -> None:
        """``on_return`` is told of every lease that is given back, and whether it was a request's."""
        self.engine = engine
        self.n_leases = 0
        self.n_holds = 0  # leases that stand for no request
        self._on_return = on_return
        self._idle = asyncio.Event()

    def lease(self, name: str, *, is_hold: bool = False) -> Lease:
        self.n_leases += 1
        self.n_holds += is_hold
        return Lease(name, self, is_hold=is_hold)

    def give_back(self, *, is_hold: bool = False) -> None:
        self.n_leases -= 1
        self.n_holds -= is_hold
        if self.n_leases == 0:
            self._idle.set()
        self._on_return(not is_hold)

    async def idle(self) -> None:
        """Wait until nobody uses it."""
        while self.n_leases:
            self._idle.clear()
            await self._idle.wait()


class Lease:
    """The right to use an engine: while it is held, the engine is neither unloaded nor freed."""

    __slots__ = ("_is_hold", "_resident", "engine", "name")

    def __init__(self, name: str, resident: Resident, *, is_hold: bool = False) -> None:
        self.name = name
        self._is_hold = is_hold
        self.engine = resident.engine
        self._resident: Resident | None = resident

    def release(self) -> None:
        """Give it back. Idempotent. On the event loop."""
        resident, self._resident = self._resident, None
        if resident is not None:
            resident.give_back(is_hold=self._is_hold)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


@dataclass(slots=True, frozen=True)
class Asleep:
    """A sleeping engine, and what it holds."""

    engine: EngineClient
    level: SleepLevel
    tokens: int
    host_bytes: int
    disk_bytes: int


@dataclass(slots=True)
class Served:
    """One name that clients may ask for."""

    name: str
    reference: str
    keep_alive_s: float  # idle seconds after which it is unloaded; < 0: never
    state: ModelState = ModelState.UNLOADED
    resident: Resident | None = None
    asleep: Asleep | None = None
    dozing: asyncio.Task[None] | None = None  # while it falls asleep
    falling: Resident | None = None  # the engine that does
    is_unwanted: bool = False  # it was unloaded while it is being loaded
    load_over: asyncio.Event | None = None  # of the load that goes on
    n_failures: int = 0  # loads that failed, one after the other
    n_deaths: int = 0  # engines that stopped soon after they were loaded, one after the other
    retry_at: float = 0.0  # of the manager's clock: before that no load is tried
    failure: Exception | None = None  # of the last one
    cannot_sleep: bool = False  # it was tried, and will not be tried again by itself before the next load
    error: str | None = None  # why the last load failed
    pinned: bool = False
    gives_way: bool = False  # UNLOADING, but only as long as another model wants its room
    n_bytes: int = 0  # memory it takes or will take, without adapters that are loaded meanwhile; 0: unknown
    n_requests: int = 0
    last_used: float = 0.0  # of the manager's clock
    loaded_at: float = 0.0
    from_store: bool = False  # nobody named it: it is served because the store has it
    waiters: list[asyncio.Future[Lease]] = field(default_factory=list)

    def note_failure(self, error: Exception, now: float) -> None:
        """A load failed; from the second one on the next has to wait, ever longer."""
        self.n_failures, self.failure = self.n_failures + 1, error
        pause = min(FIRST_PAUSE_S * 2.0 ** (min(self.n_failures, 20) - 2), MOST_PAUSE_S)
        self.retry_at = now + (pause if self.n_failures > 1 else 0.0)

    def note_death(self, error: Exception, now: float) -> None:
        """Its engine stopped by itself. One that had been at work for a while is loaded anew at once; those that
        stop soon, one after the other, wait like loads that fail."""
        self.n_deaths = 0 if now - self.loaded_at > STEADY_S else self.n_deaths
        self.n_failures = self.n_deaths
        self.n_deaths += 1
        self.note_failure(error, now)

    def check_pause(self, now: float) -> None:
        """Raise the last load's error again while it is too early for another try."""
        left = self.retry_at - now
        if self.state is not ModelState.FAILED or self.failure is None or left <= 0:
            return
        error = copy.copy(self.failure).with_traceback(None)
        if isinstance(error, MullamaError):
            error.retry_after = math.ceil(left)
        raise error

    @property
    def engine(self) -> EngineClient | None:
        return self.resident.engine if self.resident is not None else None

    @property
    def held_bytes(self) -> int:
        """Memory that it takes now, its LoRA adapters included, or what it takes when it is loaded."""
        engine = self.engine
        return self.n_bytes + (sum(one["size_bytes"] for one in engine.weights.loras()) if engine is not None else 0)

    @property
    def memory_bytes(self) -> int:
        """Memory that it takes now, or is about to while it is loaded; 0 for one that is not."""
        if self.asleep is not None:
            return self.asleep.host_bytes
        return 0 if self.state in (ModelState.UNLOADED, ModelState.FAILED) else self.held_bytes

    @property
    def in_use(self) -> int:
        """Requests that have a lease; what only holds the engine does not count."""
        return self.resident.n_leases - self.resident.n_holds if self.resident is not None else 0
