"""Pulls in threads of their own, watched by any number of callers and shared between those who want the same."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from mullama.child import step_back
from mullama.errors import PullCancelled, QueueFull, StoreError
from mullama.models.reference import Reference
from mullama.models.store.entry import Entry
from mullama.models.store.pulling import pull
from mullama.models.store.store import Store

log = logging.getLogger(__name__)

MAX_PULLS = 4
_NICE = 10  # hashing must not take a core from running decodes


@dataclass(frozen=True, slots=True)
class State:
    """How far a pull is. ``done`` and ``total`` are bytes of the step."""

    step: str
    done: int = 0
    total: int | None = None


class RunningPull:
    """One pull. Read ``state``, ``entry`` and ``error`` from any thread."""

    def __init__(
        self, store: Store, reference: Reference, *, force: bool, ended: Callable[[RunningPull], None]
    ) -> None:
        self.reference = reference
        self.was_there = store.find(reference.key) is not None and not force
        self.state = State("starting")
        self.entry: Entry | None = None
        self.error: BaseException | None = None
        self.is_finished = False
        self._store = store
        self._force = force
        self._ended = ended
        self._watchers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._thread = threading.Thread(target=self._run, name="mullama-pull", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def watch(self, ring: Callable[[], None]) -> Callable[[], None]:
        """Call ``ring`` in the pull's thread whenever something changed, until what is returned is called. When
        nobody watches any more, an unfinished pull is cancelled."""
        with self._lock:
            self._watchers.append(ring)

        def leave() -> None:
            with self._lock:
                if ring in self._watchers:
                    self._watchers.remove(ring)
                if not self._watchers and not self.is_finished:
                    self._is_cancelled = True

        return leave

    def join(self, seconds: float | None = None) -> None:
        """Wait for the end of its thread."""
        self._thread.join(seconds)

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def _run(self) -> None:
        step_back(_NICE)
        try:
            self.entry = pull(self._store, self.reference, self._progress, force=self._force)
        except BaseException as error:  # the watchers raise it
            self.error = error
            if not isinstance(error, StoreError):
                log.info("the pull of %s failed: %s", self.reference.key, error)
        self._ended(self)
        self.is_finished = True
        self._ring()

    def _progress(self, what: str, done: int, total: int | None) -> None:
        if self._is_cancelled:
            raise PullCancelled(f"the pull of {self.reference.key} was cancelled: nobody waits for it any more")
        self.state = State(what, done, total)
        self._ring()

    def _ring(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for ring in watchers:
            ring()


class Pulls:
    """The pulls that run, by what they fetch."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._running: dict[tuple[str, bool], RunningPull] = {}
        self._lock = threading.Lock()

    def start(
        self, reference: Reference, ring: Callable[[], None], *, force: bool = False
    ) -> tuple[RunningPull, Callable[[], None]]:
        """A pull of the reference, begun or joined, and how to leave it (``RunningPull.watch``). Raises QueueFull."""
        name = (reference.key, force)
        with self._lock:
            pull = self._running.get(name)
            # One that was cancelled is on its way out, and a new one waits for its lock.
            if pull is not None and not pull.is_cancelled:
                leave = pull.watch(ring)
                if not pull.is_cancelled:
                    return pull, leave
                leave()
            if sum(not running.is_cancelled for running in self._running.values()) >= MAX_PULLS:
                raise QueueFull(f"{MAX_PULLS} pulls are running already; try again when one is done", retry_after=10)
            pull = RunningPull(self.store, reference, force=force, ended=self._ended)
            self._running[name] = pull
        leave = pull.watch(ring)
        pull.start()
        return pull, leave

    def running(self) -> list[RunningPull]:
        with self._lock:
            return list(self._running.values())

    def _ended(self, pull: RunningPull) -> None:
        with self._lock:
            for name, running in list(self._running.items()):
                if running is pull:
                    del self._running[name]
