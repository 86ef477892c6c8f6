"""What the endpoints share: configuration, models, a small thread pool, the profile log, the publisher of KV events."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from mullama.config import ServeConfig
from mullama.engine.client import EngineClient
from mullama.errors import ClientLeft, InvalidRequest
from mullama.observe.kv_publisher import KvPublisher
from mullama.serving.durations import parse_duration
from mullama.serving.manager import ModelManager
from mullama.serving.states import Lease
from mullama.serving.swap import Swaps
from mullama.types import SamplingParams
from mullama.web.listening import is_loopback
from mullama.web.profile_log import ProfileLog
from mullama.web.request import Request, read_body, until_disconnect
from mullama.web.security import Security

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Bodies above this many bytes are parsed in the pool.
LARGE_BODY = 256 << 10
#: Texts above this many characters are rendered and tokenised in the pool: below, it takes less than a millisecond.
LARGE_TEXT = 2000
POOL_THREADS = 2
#: More entries of a logit_bias than this are checked in the pool.
FEW_BIASES = 300
#: What tokenising a long text may take of a core while others are answered.
SHARE_BESIDE_STREAMS = 0.1


class Endless(Protocol):
    """A response that goes on until somebody ends it."""

    def end(self) -> None: ...


class Pace:
    """Called between short pieces of work: the thread sleeps so long that it takes a small share of a core.

    PERF: not a low priority. A thread that waits for a core while it holds the GIL would hold up everything, and one
    that is given a core for a whole slice of the system's scheduler would hold up both threads of a decode.
    """

    def __init__(
        self,
        is_busy: Callable[[], bool],
        *,
        clock_ns: Callable[[], int] = time.thread_time_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``is_busy``: whether there is anybody to make room for. ``clock_ns``: CPU time of the thread."""
        self._is_busy = is_busy
        self._clock_ns = clock_ns
        self._sleep = sleep
        self._since_ns: int | None = None

    def __call__(self) -> None:
        if self._since_ns is not None and self._is_busy():
            spent = (self._clock_ns() - self._since_ns) / 1e9
            self._sleep(spent * (1 / SHARE_BESIDE_STREAMS - 1))
        self._since_ns = self._clock_ns()


class Services:
    """Built once by ``create_app``, when the models are there; also the app's lifespan hook.

    ``ping_seconds`` is the silence after which a stream sends a comment. Raises ConfigError when the profile log
    cannot be opened or the KV events' endpoint cannot be had.
    """

    def __init__(
        self, config: ServeConfig, models: ModelManager, swaps: Swaps | None = None, *, ping_seconds: float = 15.0
    ) -> None:
        self.config = config
        self.models = models
        self.swaps = swaps or Swaps(models, _no_target, _no_engine)
        self.ping_seconds = ping_seconds
        self.profile_log = ProfileLog(config.profile_log) if config.profile_log else None
        self.security: Security | None = None  # of the app that serves them
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="mullama-web")
        self._tasks: set[asyncio.Task[Any]] = set()
        self.n_open = 0  # requests that an engine works on
        self._endless: weakref.WeakSet[Endless] = weakref.WeakSet()
        self.kv_publisher: KvPublisher | None = None
        self._is_ending = False
        try:
            if config.kv_events_endpoint:
                self.kv_publisher = _start_publisher(config, models)
        except BaseException:
            self.close()
            raise

    async def offload(self, is_large: bool, work: Callable[[], T]) -> T:
        """Run ``work`` here, or in the pool when it is large enough to hold up the event loop."""
        if not is_large:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, _without_exits, work)

    async def prepared(self, engine: EngineClient, sampling: SamplingParams) -> Any:
        """What opening a request costs, in the pool where that is more than nothing (see EngineClient.prepare)."""
        if sampling.dry_multiplier <= 0 and len(sampling.logit_bias) <= FEW_BIASES:
            return None
        return await self.offload(True, partial(engine.prepare, sampling))

    def pace(self) -> Pace:
        """For one piece of work in the pool that is done in pieces."""
        return Pace(lambda: self.n_open > 0)

    async def parse(self, req: Request, parse: Callable[[bytes], T]) -> T:
        """Read the body and parse it. Raises PayloadTooLarge and what ``parse`` raises.

        NOTE: the JSON decoder itself keeps the GIL; what the pool takes off the loop is the checking behind it.
        """
        data = await read_body(req, self.config.max_body_bytes)
        return await self.offload(len(data) > LARGE_BODY, lambda: parse(data))

    async def lease(self, req: Request, name: str) -> Lease:
        """The right to use a model, loaded if need be. Raises what ``ModelManager.lease`` raises.

        A client that leaves while the model is loaded gives its place up.
        """
        lease = self.models.try_lease(name)
        if lease is not None:
            return lease
        waiting = asyncio.ensure_future(self.models.lease(name))
        leaving = asyncio.ensure_future(until_disconnect(req.receive))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientLeft("the client left while the model was loaded")
            return await waiting
        finally:
            waiting.cancel()
            leaving.cancel()

    def keep_alive(self, name: str, value: float | str | None) -> None:
        """What a request says of how long its model stays loaded. Raises InvalidRequest."""
        if value is not None:
            self.models.set_keep_alive(name, parse_duration(value))

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a short background task until it is done (the event loop itself holds only weak references)."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end_at_shutdown(self, response: Endless) -> None:
        """See that a response without an end of its own does not hold the shutdown up. On the event loop."""
        self._endless.add(response)
        if self._is_ending:
            response.end()

    def end_responses(self) -> None:
        """End those responses, and those that still come. On the event loop."""
        self._is_ending = True
        for response in list(self._endless):
            response.end()

    async def settle(self) -> None:
        """Wait for the background tasks."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def process_startup(self, scope: dict[str, Any], event: dict[str, Any]) -> None:
        self.models.start()

    async def process_shutdown(self, scope: dict[str, Any], event: dict[str, Any]) -> None:
        await self.settle()
        self.close()

    def close(self) -> None:
        """Stop the pool and the publisher, and flush the profile log. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.kv_publisher is not None:
            self.kv_publisher.close()
        if self.profile_log is not None:
            self.profile_log.close()


def _without_exits(work: Callable[[], T]) -> T:
    """A SystemExit (of a plugin, say) would end the event loop that waits for the work."""
    try:
        return work()
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"the work was told to end by {type(error).__name__}") from error


def _no_target(to: str, *_: Any) -> Any:
    raise InvalidRequest("this server cannot look for other weights", param="to")


def _no_engine(*_: Any) -> Any:
    raise InvalidRequest("this server cannot load models", param="to")


def _start_publisher(config: ServeConfig, models: ModelManager) -> KvPublisher:
    """A publisher that follows every model's KV events. Raises ConfigError."""
    endpoint = config.kv_events_endpoint
    publisher = KvPublisher(endpoint, topic=config.kv_events_topic, block_size=config.kv_events_block_size)
    try:
        publisher.start({name: engine.kv_events for name, engine in models.items()})
        models.watchers.append(lambda name, engine: publisher.follow(name, engine.kv_events if engine else None))
    except BaseException:
        publisher.close()
        raise
    host = urlsplit(endpoint).hostname
    if host is not None and not is_loopback(host):
        log.warning("%s is open to other machines: who connects there is sent the tokens of all prompts", endpoint)
    return publisher
