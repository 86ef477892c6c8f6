"""``--kv-events-endpoint``: KV events for prefix-aware routers, over ZeroMQ, in the form of vLLM's.

A message has three parts: the topic, the number of the message in that topic (8 bytes, big-endian, from 0), and an
``EventBatch`` in MessagePack. One thread follows the logs of all models; it is rung by the engine threads and never
holds one up. What goes wrong is mended by beginning anew with an ``AllBlocksCleared``:

- Somebody subscribes, late or again: the topic is told all blocks that there are. What it gets before that is of no
  use. A subscriber that is too slow loses messages (ZeroMQ drops them), sees a gap in the numbers, and may subscribe
  again.
- This thread is too slow and the log has lost events: it can no longer know which blocks are held, so it forgets them
  all and goes on with what comes. A router then knows too few blocks, never too many.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from mullama.errors import ConfigError
from mullama.kv.events import KvEventLog
from mullama.observe.kv_blocks import AllBlocksCleared, BlockIndex, BlockRemoved, BlockStored, EventBatch

log = logging.getLogger(__name__)

GATHER_SECONDS = 0.005  # events of so long go into one message, and the thread takes the GIL no more often
SNAPSHOT_SECONDS = 1.0  # at least so long between two times that everything is told
QUEUED_MESSAGES = 10_000  # for each subscriber that does not keep up
LINGER_MS = 200  # what the last messages get when the server stops
SUBSCRIBE = b"\x01"

_encoder = msgspec.msgpack.Encoder()


class _Source:
    """One model's events."""

    def __init__(self, name: str, topic: bytes, events: KvEventLog, block_size: int) -> None:
        self.name = name
        self.topic = topic
        self.events = events
        self.index = BlockIndex(block_size)
        self.seq = 0  # of the last event that was read
        self.number = 0  # of the next message
        self.unwatch: Callable[[], None] = lambda: None


class KvPublisher:
    """Binds a ZeroMQ socket; ``start`` begins to publish, ``close`` ends it.

    ``topic`` may hold ``{model}``, which becomes the served name. ``n_messages`` and ``n_lost`` (events that the logs
    had dropped before they were read) may be read from any thread.
    """

    def __init__(self, endpoint: str, *, topic: str = "", block_size: int = 16) -> None:
        """Raises ConfigError when pyzmq is not there or the endpoint cannot be bound."""
        port = endpoint.rpartition(":")[2]
        if endpoint.startswith("tcp://") and port != "*" and not (port.isdecimal() and int(port) < 1 << 16):
            raise _cannot_bind(endpoint, "a port is a number up to 65535, or *")  # ZeroMQ would take it modulo 2^16
        try:
            import zmq
        except ImportError:
            raise ConfigError(
                "--kv-events-endpoint needs pyzmq: pip install 'mullama[router]'", param="kv_events_endpoint"
            ) from None
        self.n_messages = 0
        self.n_lost = 0
        self._zmq = zmq
        self._topic = topic
        self._block_size = block_size
        self._sources: list[_Source] = []
        self._changes: deque[tuple[str, KvEventLog | None]] = deque()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._is_rung = False
        self._context = zmq.Context()
        # XPUB is PUB that hears of subscriptions; VERBOSE: of every one.
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.IPV6, 1 if "[" in endpoint else 0)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise _cannot_bind(endpoint, f"{error.strerror} (a host is an IP address or *)") from None
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)

    def start(self, logs: Mapping[str, KvEventLog]) -> None:
        """Publish what is in these logs and what comes, by the model's served name. Once.

        Raises ConfigError when there are several models and the topic cannot tell them apart.
        """
        assert self._thread is None, "started twice"
        if len(logs) > 1 and "{model}" not in self._topic:
            message = "--kv-events-topic: it must hold {model} where several models are served"
            raise ConfigError(message, param="kv_events_topic")
        for name, events in logs.items():
            self._join(name, events)
        self._thread = threading.Thread(target=self._run, name="mullama-kv-publisher", daemon=True)
        self._thread.start()
        self._ring()

    def follow(self, name: str, events: KvEventLog | None) -> None:
        """Publish another log under a name from now on, instead of the one before; None: the model is gone. Any thread.

        Subscribers are told that what they knew of the name is not cached any more.
        """
        self._changes.append((name, events))
        self._is_rung = False
        self._ring()

    def _join(self, name: str, events: KvEventLog) -> None:
        topic = self._topic.replace("{model}", name).encode()
        source = _Source(name, topic, events, self._block_size)
        source.unwatch = events.watch(self._ring)
        self._sources.append(source)

    def _follow_changes(self) -> None:
        while self._changes:
            name, events = self._changes.popleft()
            for source in [one for one in self._sources if one.name == name]:
                source.unwatch()
                self._sources.remove(source)
                self._send(source, [AllBlocksCleared()])
            if events is None:
                continue
            if self._sources and "{model}" not in self._topic:
                log.warning("KV events of %s are not published: --kv-events-topic does not hold {model}", name)
                continue
            self._join(name, events)

    def close(self) -> None:
        """Tell subscribers that nothing is cached here any more, and stop. Idempotent."""
        for source in list(self._sources):
            source.unwatch()
        if not self._closing.is_set():
            self._closing.set()
            if self._thread is None:
                self._release()
            self._is_rung = False
            self._ring()
        if self._thread is not None:
            self._thread.join()

    def _ring(self) -> None:
        """Wake the thread, from any other, without waiting."""
        if not self._is_rung:
            self._is_rung = True
            try:
                self._rope.send(b"\0")
            except OSError:  # closed, or so many are unread that one more changes nothing
                return

    def _run(self) -> None:
        try:
            self._serve()
            for source in self._sources:
                self._send(source, [AllBlocksCleared()])
        except Exception:
            log.exception("the publisher of KV events stopped")
        finally:
            self._release()

    def _serve(self) -> None:
        poller = self._zmq.Poller()
        poller.register(self._socket, self._zmq.POLLIN)
        poller.register(self._bell, self._zmq.POLLIN)
        asked: set[bytes] = set()
        next_snapshot = 0.0
        while not self._closing.is_set():
            wait_ms = math.ceil(max(next_snapshot - time.monotonic(), 0) * 1000) if asked else None
            ready = dict(poller.poll(wait_ms))
            asked |= self._subscriptions()
            if self._bell.fileno() in ready:
                self._closing.wait(GATHER_SECONDS)
                self._bell.recv(64)
                self._is_rung = False  # before the logs are read: what comes later rings again
                self._follow_changes()
                for source in self._sources:
                    self._publish(source)
            if asked and time.monotonic() >= next_snapshot:
                for source in self._sources:
                    if any(source.topic.startswith(prefix) for prefix in asked):
                        self._send(source, [AllBlocksCleared(), *source.index.stored()])
                asked.clear()
                next_snapshot = time.monotonic() + SNAPSHOT_SECONDS

    def _subscriptions(self) -> set[bytes]:
        """Topics (or beginnings of topics) that somebody has subscribed to since the last call."""
        found = set()
        while self._socket.poll(0):
            message = self._socket.recv()
            if message.startswith(SUBSCRIBE):
                found.add(message[1:])
        return found

    def _publish(self, source: _Source) -> None:
        events, lost = source.events.since(source.seq)
        told: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
        if lost:
            self.n_lost += lost
            log.warning("%d KV events of %s were lost; routers are told to forget its blocks", lost, source.name)
            source.index.clear()
            source.seq += lost
            told.append(AllBlocksCleared())
        for event in events:
            change = source.index.apply(event)
            if change is not None:
                told.append(change)
            source.seq = event.seq
        if told:
            self._send(source, told)

    def _send(self, source: _Source, events: list[BlockStored | BlockRemoved | AllBlocksCleared]) -> None:
        batch = _encoder.encode(EventBatch(time.time(), events))
        parts: list[Any] = [source.topic, source.number.to_bytes(8, "big"), batch]
        self._socket.send_multipart(parts, self._zmq.NOBLOCK)
        source.number += 1
        self.n_messages += 1

    def _release(self) -> None:
        self._bell.close()
        self._rope.close()
        self._socket.close()
        self._context.term()


def _cannot_bind(endpoint: str, reason: str) -> ConfigError:
    return ConfigError(f"--kv-events-endpoint: cannot bind {endpoint}: {reason}", param="kv_events_endpoint")
