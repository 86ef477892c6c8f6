"""A served name: its states as a table, the engine behind it, and the leases that keep the engine alive.

    UNLOADED, FAILED -> LOADING -> READY -> UNLOADING -> UNLOADED
    READY <-> YIELDING                              (it takes no new requests while another model wants its memory)
    READY -> FALLING_ASLEEP -> ASLEEP -> WAKING -> READY

A move that is not in TRANSITIONS raises IllegalMove, which is a bug.
"""

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
MAX_PAUSE_S = 30.0
STEADY_S = 60.0  # an engine that stops after such a time did not stop because it was loaded


class ModelState(enum.StrEnum):
    """Where a served name is in its life."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    YIELDING = "yielding"  # it takes no new requests as long as another model wants its memory
    UNLOADING = "unloading"  # it takes no new requests; those that run end first
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"  # without weights; the next request wakes it
    WAKING = "waking"
    FAILED = "failed"  # the last load failed; the next request tries again

    @property
    def shown(self) -> str:
        """What clients are told: three of the states are the server's own affair."""
        return _SHOWN.get(self, self).value


S = ModelState

_SHOWN = {S.YIELDING: S.UNLOADING, S.FALLING_ASLEEP: S.UNLOADING, S.WAKING: S.LOADING}

TRANSITIONS: dict[ModelState, frozenset[ModelState]] = {
    S.UNLOADED: frozenset({S.LOADING, S.READY, S.FAILED}),  # READY: it was loaded before it was served
    S.LOADING: frozenset({S.READY, S.UNLOADED, S.FAILED}),
    S.READY: frozenset({S.YIELDING, S.UNLOADING, S.FALLING_ASLEEP, S.FAILED}),
    S.YIELDING: frozenset({S.READY, S.UNLOADING, S.FAILED}),
    S.UNLOADING: frozenset({S.UNLOADED, S.LOADING, S.READY, S.FAILED}),  # READY: a swap put another engine there
    S.FALLING_ASLEEP: frozenset({S.ASLEEP, S.READY}),
    S.ASLEEP: frozenset({S.WAKING, S.UNLOADED}),
    S.WAKING: frozenset({S.READY, S.ASLEEP, S.LOADING, S.UNLOADED}),  # LOADING: it could not be woken
    S.FAILED: frozenset({S.LOADING, S.UNLOADED}),
}


class IllegalMove(RuntimeError):
    """A bug in the server: a model was moved along an edge that does not exist."""


class Resident:
    """A loaded engine and how many use it. Event loop only, but for reading ``n_leases``."""

    def __init__(self, engine: EngineClient, on_return: Callable[[bool], None], loaded_at: float = 0.0) -> None:
        """``on_return`` is told of every lease that is given back, and whether it was a request's."""
        self.engine = engine
        self.loaded_at = loaded_at  # of the manager's clock
        self.cannot_sleep = False  # it was tried, and will not be tried again by itself
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
class FallingAsleep:
    """An engine that nobody can reach any more, and the task in which it falls asleep."""

    resident: Resident
    task: asyncio.Task[None]


@dataclass(slots=True, frozen=True)
class Asleep:
    """A sleeping engine, and what it holds."""

    engine: EngineClient
    level: SleepLevel
    tokens: int
    host_bytes: int
    disk_bytes: int


@dataclass(slots=True)
class Load:
    """A load, or a waking, that goes on."""

    is_unwanted: bool = False  # the model was unloaded meanwhile
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Failures:
    """Loads that failed, and when the next may be tried. ``now`` is the manager's clock."""

    n: int = 0  # one after the other
    n_deaths: int = 0  # engines that stopped soon after they were loaded, one after the other
    retry_at: float = 0.0  # before that no load is tried
    last: Exception | None = None

    def note(self, error: Exception, now: float) -> None:
        """A load failed; from the second one on the next has to wait, ever longer."""
        self.n, self.last = self.n + 1, error
        pause = min(FIRST_PAUSE_S * 2.0 ** (min(self.n, 20) - 2), MAX_PAUSE_S)
        self.retry_at = now + (pause if self.n > 1 else 0.0)

    def note_death(self, error: Exception, now: float, loaded_at: float) -> None:
        """An engine stopped by itself. One that had been at work for a while is loaded anew at once; those that
        stop soon, one after the other, wait like loads that fail."""
        self.n_deaths = 0 if now - loaded_at > STEADY_S else self.n_deaths
        self.n = self.n_deaths
        self.n_deaths += 1
        self.note(error, now)

    def check_pause(self, now: float) -> None:
        """Raise the last load's error again while it is too early for another try."""
        left = self.retry_at - now
        if self.last is None or left <= 0:
            return
        error = copy.copy(self.last).with_traceback(None)
        if isinstance(error, MullamaError):
            error.retry_after = math.ceil(left)
        raise error

    def clear(self) -> None:
        """A load has succeeded; whether the engine lasts is not known yet."""
        self.n, self.last = 0, None


@dataclass(slots=True)
class Served:
    """One name that clients may ask for. Of ``resident``, ``falling``, ``asleep`` and ``load``, its state says which
    there are: at most one of the first three, and ``load`` beside none or (WAKING) beside ``asleep``."""

    name: str
    reference: str
    keep_alive_s: float  # idle seconds after which it is unloaded; < 0: never
    from_store: bool = False  # nobody named it: it is served because the store has it
    pinned: bool = False
    state: ModelState = ModelState.UNLOADED
    resident: Resident | None = None
    falling: FallingAsleep | None = None
    asleep: Asleep | None = None
    load: Load | None = None
    error: str | None = None  # why the last load failed
    failures: Failures = field(default_factory=Failures)
    n_bytes: int = 0  # memory it takes or will take, without LoRA adapters that are loaded meanwhile; 0: unknown
    n_requests: int = 0
    last_used: float = 0.0  # of the manager's clock
    waiters: list[asyncio.Future[Lease]] = field(default_factory=list)

    def move(self, state: ModelState) -> None:
        """Change the state. Raises IllegalMove."""
        if state is not self.state and state not in TRANSITIONS[self.state]:
            raise IllegalMove(f"{self.name}: {self.state} -> {state}")
        self.state = state

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
    def n_leases(self) -> int:
        return self.resident.n_leases if self.resident is not None else 0

    @property
    def in_use(self) -> int:
        """Requests that have a lease; what only holds the engine does not count."""
        return self.resident.n_leases - self.resident.n_holds if self.resident is not None else 0

    @property
    def is_idle(self) -> bool:
        """Loaded, and nobody uses it."""
        return self.state is ModelState.READY and not self.n_leases
