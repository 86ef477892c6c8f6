"""How many connections there may be, and how long a client may take to send its request. Event loop.

A process that is out of descriptors can do nothing: it accepts no client, reads no model, starts no child. So the limit
is raised as far as the system allows (``raise_limit``), some are kept for the server's own work, and a client that
comes when all others are taken is told so, in an answer, instead of being reset.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from typing import Any, Protocol

log = logging.getLogger(__name__)

OWN = 64  # descriptors that are kept for models, files, downloads and children
MOST = 1 << 20  # the soft limit is not raised further: some programs look at every descriptor there may be
FALTERING = 16  # refused connections that are still open, for the client to read its answer
FALTERING_S = 2.0  # and for how long
SLOWEST = 16 << 10  # bytes of a body in a second; who sends fewer is given up when its time is over
_LOG_S = 60.0


def raise_limit() -> None:
    """Raise the soft limit of open files to the hard one. Never raises."""
    try:
        import resource
    except ImportError:  # Windows has no such limit for sockets
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:  # macOS has another limit below the hard one
            log.debug("the limit of open files stays %d: %s", soft, error)


def room() -> int | None:
    """Connections that may be open at a time. None: there is no limit."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    left = soft - _n_open() - FALTERING
    return max(left - min(OWN, max(left, 0) // 2), 1)


def _n_open() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder))  # noqa: PTH208 - it counts without making paths
        except OSError:
            continue
    return 64


class Connection(Protocol):
    """What is asked of a connection (``protocol.py``)."""

    @property
    def transport(self) -> Any: ...

    def is_late(self, now: float, limits: Limits) -> bool: ...

    def give_up(self, limits: Limits) -> None: ...


class Limits:
    """The limits of one server."""

    def __init__(self, request_timeout: float, most: int | None) -> None:
        """``most``: connections at a time; None: any number."""
        self.request_timeout = request_timeout
        self.most = most
        self.n_refused = 0  # connections that came when there were as many as there may be
        self.n_late = 0  # requests that were given up
        self._refused: dict[Connection, float] = {}  # connections that still read their refusal, and until when
        self._told = 0.0

    def refuses(self, connection: Connection, n_open: int, now: float) -> bool | None:
        """Whether a new connection is one too many of ``n_open``. None: so many that it is not even told."""
        if self.most is None or n_open - len(self._refused) <= self.most:
            return False
        self.n_refused += 1
        if time.monotonic() - self._told >= _LOG_S:
            self._told = time.monotonic()
            log.warning("refused a connection: %d are open, the most that the limit of open files allows", self.most)
        if len(self._refused) >= FALTERING:
            return None
        self._refused[connection] = now + FALTERING_S
        return True

    def lost(self, connection: Connection) -> None:
        """A connection has ended."""
        self._refused.pop(connection, None)

    def look(self, connections: Iterable[Any], now: float) -> None:
        """Give up what takes too long. Once a second or so."""
        for refused, until in list(self._refused.items()):
            if now >= until:
                refused.transport.abort()
        for connection in list(connections):
            if connection not in self._refused and connection.is_late(now, self):
                self.n_late += 1
                connection.give_up(self)
