"""Running the app: one process, one event loop, uvicorn with uvloop and httptools.

``bind`` comes first, before the slow model load, so that a port in use is known at once. SIGTERM and SIGINT stop
accepting, let running requests end (``--drain-timeout``), and return; a second SIGINT does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import math
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from mullama.config import ServeConfig
from mullama.serving.manager import ModelManager
from mullama.serving.swap import Swaps
from mullama.web.app import create_app
from mullama.web.listening import BACKLOG, Listener, bind, is_loopback, url_of
from mullama.web.protocol import Protocol
from mullama.web.services import Services

__all__ = ["Server", "bind", "run_server", "url_of"]

log = logging.getLogger(__name__)

KEEP_ALIVE = 75  # seconds; longer than clients keep an idle connection, so that they close it and not we
GRACE = 5  # seconds after the drain in which clients may still take their last bytes


def run_server(
    config: ServeConfig, models: ModelManager, sock: Listener | None = None, swaps: Swaps | None = None
) -> None:
    """Serve until a signal comes, then drain and return. Blocks; call from the main thread.

    Prints one line when clients are answered. Raises ConfigError before anything is started when the port, the
    profile log or the KV events' endpoint cannot be had. The caller closes ``models``.
    """
    sock = sock or bind(config)
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
        server = Server(config, services, sock)
        server.run(sockets=sock.all)
    finally:
        sock.close()
        services.close()


class Server(uvicorn.Server):
    """uvicorn's server, with our signals, our ready line, and the engines' drain at the end."""

    def __init__(self, config: ServeConfig, services: Services, sock: socket.socket) -> None:
        fast = importlib.util.find_spec("uvloop") is not None  # there is none for Windows
        super().__init__(
            uvicorn.Config(
                create_app(config, services.models, services),
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
        self._drain_timeout = config.drain_timeout
        self._services = services
        self._url = url_of(config, sock)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._services.models.start()
        print(f"mullama ready on {self._url}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, drain the engines, wait for the connections to have their last bytes."""
        # The task starts at the first await of uvicorn's own shutdown: after the listener was closed.
        ending = asyncio.get_running_loop().create_task(self._end_requests(self._drain_timeout, GRACE))
        try:
            await super().shutdown(sockets)
            if self.force_exit:
                ending.cancel()
                await self._end_requests(0.0, 0.5)
            elif not await ending:
                log.warning("requests were cut after %g s of draining", self._drain_timeout)
            await self._services.settle()
        finally:
            ending.cancel()

    async def _end_requests(self, drain_timeout: float, grace: float) -> bool:
        """Let requests end, cut them after ``drain_timeout``; clients that do not take what is theirs, or do not
        finish what they were sending, are left after ``grace`` seconds more. True: no request was cut."""
        drained = await self._services.models.drain(drain_timeout)
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
        return drained

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signal again after its shutdown, which would end the process with a signal, not 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [signal.SIGINT, signal.SIGTERM]
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
