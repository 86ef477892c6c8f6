"""``GET /internal/kv/events``: what happens to cached KV, as server-sent events.

The engine thread only rings (one ``call_soon_threadsafe`` at a time, however many events there are); everything else
is done on the event loop, at the pace of the client. One that falls behind by more than the log holds misses events,
and is told how many. When the model is unloaded, or another engine takes its place, an event ``reset`` says that
nothing of what was told before is cached any more, and the stream goes on with the engine that comes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mullama.kv.events import KvEvent, KvEventLog
from mullama.kv.index.namespaces import short_namespace
from mullama.kv.index.tree import TOKEN_BYTES, unpack
from mullama.web.http.request import Receive, on_disconnect
from mullama.web.stream.event_stream import PING, Bell, Silence, event_json

MAX_PIECE = 64 << 10  # bytes after which a piece of the body ends


class KvEventStream:
    """The body of a response: an async iterator of bytes that Falcon closes in a ``finally``.

    Construct on the event loop. It follows the events after number ``since`` until ``end`` is called or the client
    leaves, which ``receive`` reports. ``on_close`` is called once.
    """

    def __init__(
        self,
        log: KvEventLog,
        *,
        since: int,
        with_tokens: bool,
        ping_seconds: float,
        receive: Receive,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._log = log
        # A number that is still to come is one of an engine that was here before; this one's events are all new.
        self._seq = since if since <= log.last_seq else 0
        self._with_tokens = with_tokens
        self._unix_ns = time.time_ns() - time.monotonic_ns()
        self._events: deque[KvEvent] = deque()
        self._bell = Bell()
        self._ended = False
        self._is_reset = False
        self._on_close: Callable[[], None] | None = on_close
        self._silence = Silence(ping_seconds)
        self._watcher = asyncio.ensure_future(on_disconnect(receive, self.end))
        self._unwatch = log.watch(self._bell.ring)

    def follow(self, log: KvEventLog | None) -> None:
        """Go on with the log of another engine; None: the model is not loaded now. On the event loop."""
        self._unwatch()
        self._log = KvEventLog() if log is None else log
        self._unwatch = self._log.watch(self._bell.ring)
        self._seq = 0
        self._events.clear()
        self._is_reset = True
        self._bell.ring_here()

    def __aiter__(self) -> KvEventStream:
        return self

    async def __anext__(self) -> bytes:
        """The next events, as many as fit in a piece; never empty."""
        while not self._ended:
            self._bell.clear()
            if piece := self._piece():
                return piece
            if not await self._silence.broken_by(self._bell.wait()):
                return PING
        raise StopAsyncIteration

    def _piece(self) -> bytes:
        out: list[bytes] = []
        size = 0
        if self._is_reset:
            self._is_reset = False
            out.append(_event(0, "reset", {"seq": 0}))
        if not self._events:
            events, lost = self._log.since(self._seq)
            self._events.extend(events)
            if lost:
                self._seq += lost
                out.append(_event(self._seq, "lost", {"seq": self._seq, "lost": lost}))
        while self._events and size < MAX_PIECE:
            event = self._events.popleft()
            self._seq = event.seq
            out.append(_event(event.seq, event.kind, self._fields(event)))
            size += len(out[-1])
        return b"".join(out)

    def _fields(self, event: KvEvent) -> dict[str, Any]:
        fields = {
            "seq": event.seq,
            "unix_ms": round((event.time_ns + self._unix_ns) / 1e6, 3),
            "kind": event.kind,
            "tier": event.tier,
            "source": event.source,
            "start": event.start,
            "end": event.end,
            "request": event.request,
            "slot": event.slot,
            "gone": event.gone,
            "namespace": short_namespace(event.namespace),
        }
        if self._with_tokens:
            fields["tokens"] = unpack(event.tokens[: event.end * TOKEN_BYTES])
        return fields

    def end(self) -> None:
        """Let the response end. On the event loop; idempotent."""
        self._ended = True
        self._bell.ring_here()

    async def close(self) -> None:
        """Stop following. Idempotent."""
        self.end()
        self._unwatch()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
        self._silence.close()
        self._watcher.cancel()


def _event(seq: int, kind: str, fields: dict[str, Any]) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (seq, kind.encode(), event_json(fields))
