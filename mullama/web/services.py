"""What the endpoints share: configuration, models, a small thread pool, the profile log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mullama.config import ServeConfig
from mullama.web.models import Models
from mullama.web.profile_log import ProfileLog
from mullama.web.request import Request, read_body

T = TypeVar("T")

#: Bodies above this many bytes are parsed in the pool.
LARGE_BODY = 256 << 10
#: Texts above this many characters are rendered and tokenised in the pool: below, it takes less than a millisecond.
LARGE_TEXT = 2000
POOL_THREADS = 2
POOL_NICE = 10  # about a tenth of a core's time beside a busy compute thread


def _step_back() -> None:
    """Run this thread at low priority: one that tokenises a long text must not take a core from running decodes."""
    if sys.platform == "linux":  # elsewhere priorities belong to processes
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), POOL_NICE)


class Services:
    """Built once by ``create_app``; also the app's lifespan hook.

    ``ping_seconds`` is the silence after which a stream sends a comment. Raises ConfigError when the profile log
    cannot be opened.
    """

    def __init__(self, config: ServeConfig, models: Models, *, ping_seconds: float = 15.0) -> None:
        self.config = config
        self.models = models
        self.ping_seconds = ping_seconds
        self.profile_log = ProfileLog(config.profile_log) if config.profile_log else None
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="mullama-web", initializer=_step_back)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def offload(self, is_large: bool, work: Callable[[], T]) -> T:
        """Run ``work`` here, or in the pool when it is large enough to hold up the event loop."""
        if not is_large:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def parse(self, req: Request, parse: Callable[[bytes], T]) -> T:
        """Read the body and parse it. Raises PayloadTooLarge and what ``parse`` raises.

        NOTE: the JSON decoder itself keeps the GIL; what the pool takes off the loop is the checking behind it.
        """
        data = await read_body(req, self.config.max_body_bytes)
        return await self.offload(len(data) > LARGE_BODY, lambda: parse(data))

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a short background task until it is done (the event loop itself holds only weak references)."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait for the background tasks."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def process_shutdown(self, scope: dict[str, Any], event: dict[str, Any]) -> None:
        await self.settle()
        self.close()

    def close(self) -> None:
        """Stop the pool and flush the profile log. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.profile_log is not None:
            self.profile_log.close()
