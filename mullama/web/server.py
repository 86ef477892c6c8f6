"""Running the app: one process, one event loop, uvicorn with uvloop and httptools.

``bind`` comes first, before the slow model load, so that a port in use is known at once. SIGTERM and SIGINT end the
server in four steps: it is not ready any more (``--drain-delay``); it refuses new requests with 503, on new connections
as on old ones, while running ones end (``--drain-timeout``); it closes the listener; clients get their last bytes. A
second SIGINT does not wait. SIGHUP reads the keys again and opens the profile log anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn

from mullama.config import ServeConfig
from mullama.serving.hot_swap import Swaps
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.http import connections
from mullama.web.http.connections import Limits
from mullama.web.http.listening import BACKLOG, Listener, bind, is_loopback, url_of
from mullama.web.http.protocol import Protocol
from mullama.web.http.request_log import RequestLog
from mullama.web.reload import Reload
from mullama.web.services import Services

__all__ = ["Server", "bind", "run_server", "url_of"]

log = logging.getLogger(__name__)

T = TypeVar("T")

KEEP_ALIVE = 75  # seconds; longer than clients keep an idle connection, so that they close it and not we
CLOSE = (b"connection", b"close")
GRACE = 5  # seconds after the drain in which clients may still take their last bytes


def run_server(
    config: ServeConfig,
    models: ModelManager,
    sock: Listener | None = None,
    swaps: Swaps | None = None,
    read_config: Callable[[], ServeConfig] | None = None,
) -> None:
    """Serve until a signal comes, then drain and return. Blocks; call from the main thread.

    ``read_config`` reads the configuration again (default: it never changes). Prints one line when clients are
    answered. Raises ConfigError before anything is started when the port, the profile log or the KV events' endpoint
    cannot be had. The caller closes ``models``.
    """
    sock = sock or bind(config)
    connections.raise_limit()
    if not is_loopback(config.host) and not config.allowed_host:
        log.warning(
            "clients must name this server by an IP address or as localhost; other names, such as a container's or a "
            "domain, are refused until --allowed-host names them (.example.org: a domain and all below it)"
        )
    try:
        services = Services(config, models, swaps)
    except BaseException:
        sock.close()
        raise
    try:
        server = Server(config, services, sock, Reload(services, read_config or (lambda: config)))
        server.run(sockets=sock.all)
    finally:
        sock.close()
        services.close()


def _announce(line: str) -> None:
    """Print a line. A full disk behind stdout, or nobody at the other end of it, is no reason not to serve."""
    try:
        print(line, flush=True)
    except OSError as error:
        log.warning("%s (stdout: %s)", line, error.strerror)
        # What is left in the buffer would fail once more at the end, and make the exit status 120.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Server(uvicorn.Server):
    """uvicorn's server, with our signals, our ready line, and the engines' drain at the end."""

    def __init__(self, config: ServeConfig, services: Services, sock: Listener, reload: Reload | None = None) -> None:
        fast = importlib.util.find_spec("uvloop") is not None  # there is none for Windows
        app: Any = create_app(config, services.models, services)
        super().__init__(
            uvicorn.Config(
                RequestLog(app) if config.log_requests else app,
                loop="uvloop" if fast else "asyncio",
                http=Protocol,
                ws="none",
                lifespan="off",  # run_server closes what lifespan would
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE,
                # Never reached: what is left after GRACE is aborted (uvicorn would log a traceback for each).
                timeout_graceful_shutdown=math.ceil(config.drain_timeout) + 2 * GRACE,
            )
        )
        self._drain_delay = config.drain_delay
        self._drain_timeout = config.drain_timeout
        self._reload = reload
        self._loop: asyncio.AbstractEventLoop | None = None
        self._services = services
        self._url = url_of(config, sock)
        self._limits = Limits(config.request_timeout, connections.room())
        self.server_state.limits = self._limits  # type: ignore[attr-defined]  # where each connection finds them

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._services.start()
        log.info("listening on %s", self._url)
        _announce(f"mullama ready on {self._url}")

    async def _serve_during(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Go on with what uvicorn does ten times a second until ``work`` is done. None: nobody wants to wait for it."""
        task = asyncio.get_running_loop().create_task(work)
        counter = 0
        while not self.force_exit:
            await self.on_tick(counter)
            done, _ = await asyncio.wait({task}, timeout=0.1)
            if done:
                return task.result()
            counter += 1
        task.cancel()
        return None

    async def on_tick(self, counter: int) -> bool:
        """Once it is about to end, every answer asks its client to connect anew, to whoever is there then."""
        is_over = await super().on_tick(counter)
        if counter % 5 == 0:  # twice a second
            self._limits.look(self.server_state.connections, asyncio.get_running_loop().time())
        if self._services.models.is_leaving and CLOSE not in self.server_state.default_headers:
            self.server_state.default_headers.append(CLOSE)
        return is_over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain while new connections are still answered; close the listener; let clients have their last bytes."""
        await self._drain()
        # The task starts at the first await of uvicorn's own shutdown: after the listener was closed.
        ending = asyncio.get_running_loop().create_task(self._end_connections(0.5 if self.force_exit else GRACE))
        try:
            await super().shutdown(sockets)
            await ending
            await self._services.settle()
        finally:
            ending.cancel()

    async def _drain(self) -> None:
        self._services.models.leave()
        if self._drain_delay:
            await self._serve_during(asyncio.sleep(self._drain_delay))
        self._services.end_work()
        if await self._serve_during(self._services.models.drain(self._drain_timeout)) is False:
            log.warning("requests were cut after %g s of draining", self._drain_timeout)

    async def _end_connections(self, grace: float) -> None:
        """What still runs is cut; clients that do not take what is theirs, or do not finish what they were sending,
        are left after ``grace`` seconds."""
        await self._services.models.drain(0.0)
        self._services.end_responses()
        tasks = self.server_state.tasks
        if tasks:
            await asyncio.wait(list(tasks), timeout=grace)
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        if tasks:
            await asyncio.wait(list(tasks), timeout=1.0)

    def _hang_up(self, *_: object) -> None:
        """SIGHUP, in whatever the main thread does just now."""
        if self._reload is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._reload)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signal again after its shutdown, which would end the process with a signal, not 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGHUP"):
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._hang_up)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
