"""What happened to cached KV: stored, reused, moved, evicted, dropped, with the requests behind it.

The engine thread writes; any number of readers follow, each at its own pace. Nobody can hold the engine up: a reader
that falls behind loses the oldest events and is told how many.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


class KvEventKind(enum.StrEnum):
    STORED = "stored"  # KV of [start, end) is in a tier where it was not
    REUSED = "reused"  # a request took [start, end) over instead of computing it
    MOVED = "moved"  # a sequence's KV went to another slot
    EVICTED = "evicted"  # [start, end) left a tier to make room
    DROPPED = "dropped"  # somebody asked for it


class KvTier(enum.StrEnum):
    DEVICE = "device"  # the context's own cells
    HOST = "host"
    DISK = "disk"


@dataclass(slots=True, frozen=True)
class KvEvent:
    seq: int  # number of the event, from 1
    time_ns: int
    kind: KvEventKind
    tier: KvTier
    start: int
    end: int
    namespace: bytes
    tokens: bytes  # the whole path [0, end) as the tree packs it
    request: str | None = None  # whose request caused it
    source: KvTier | None = None  # where it came from
    slot: int | None = None
    gone: bool = False  # no tier holds [start, end) any more


MAX_BYTES = 8 << 20  # of the events' tokens


class KvEventLog:
    """The last ``limit`` events, fewer for long prompts. ``append`` is the engine thread's, the rest anybody's."""

    def __init__(self, limit: int = 1024) -> None:
        self._events: deque[KvEvent] = deque(maxlen=limit)
        self._lock = threading.Lock()
        self._seq = 0
        self._bytes = 0
        self._wakers: list[Callable[[], None]] = []

    @property
    def last_seq(self) -> int:
        return self._seq

    def next_seq(self) -> int:
        """The number of the event that is appended next."""
        return self._seq + 1

    def append(self, event: KvEvent) -> None:
        with self._lock:
            if len(self._events) == self._events.maxlen:
                self._bytes -= len(self._events.popleft().tokens)
            self._events.append(event)
            self._bytes += len(event.tokens)
            while self._bytes > MAX_BYTES and len(self._events) > 1:
                self._bytes -= len(self._events.popleft().tokens)
            self._seq = event.seq
            wakers = tuple(self._wakers)
        for wake in wakers:
            wake()

    def since(self, seq: int) -> tuple[list[KvEvent], int]:
        """Events after number ``seq``, and how many of them are lost."""
        with self._lock:
            found = [event for event in self._events if event.seq > seq]
            lost = max((found[0].seq if found else self._seq + 1) - seq - 1, 0)
        return found, lost

    def watch(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Call ``wake`` (on the engine thread, so it must not wait) after each event; returns how to stop."""
        with self._lock:
            self._wakers.append(wake)

        def stop() -> None:
            with self._lock:
                if wake in self._wakers:
                    self._wakers.remove(wake)

        return stop
