"""What the endpoints share: configuration, models, threads, the profile log, the publisher of KV events."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from mullama.batches.batch_runner import BatchRunner
from mullama.config import ServeConfig
from mullama.engine.client import EngineClient
from mullama.errors import InvalidRequest
from mullama.observe.kv_publisher import KvPublisher
from mullama.serving.hot_swap import Swaps
from mullama.serving.manager import ModelManager
from mullama.serving.states import Lease
from mullama.types import SamplingParams
from mullama.web.http.listening import is_loopback
from mullama.web.http.request import Request, read_body, unless_left
from mullama.web.openai.sampling import SamplingDefaults
from mullama.web.profile_log import ProfileLog
from mullama.web.security import Security
from mullama.web.work import Errand, Workers

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Bodies above this many bytes are parsed in the pool.
LARGE_BODY = 256 << 10
#: Texts above this many characters are rendered and tokenised in the pool: below, it takes less than a millisecond.
LARGE_TEXT = 2000
#: More entries of a logit_bias than this are checked in the pool.
FEW_BIASES = 300


class Endless(Protocol):
    """A response that goes on until somebody ends it."""

    def end(self) -> None: ...


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
        self.defaults = SamplingDefaults(config)
        self.profile_log = ProfileLog(config.profile_log) if config.profile_log else None
        self.security: Security | None = None  # of the app that serves them
        self.batches: BatchRunner | None = None  # of the app that serves them
        self.workers = Workers()
        self.n_left = 0  # requests whose client left before it was answered
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

    def errand(self, req: Request | None = None) -> Errand:
        """The work on long texts of one request, in a thread where it is large; None: the server's own."""
        if req is None:
            return Errand(self.workers, None, None, self._is_busy)
        address = req.scope.get("client") or (None, None)
        return Errand(self.workers, (req.tenant, address[0]), req.receive, self._is_busy)

    def _is_busy(self) -> bool:
        return self.n_open > 0

    async def offload(self, is_large: bool, work: Callable[[], T], req: Request | None = None) -> T:
        """Run ``work`` here, or in a thread when it is large enough to hold up the event loop (see Errand.run)."""
        return await self.errand(req).run(True, work) if is_large else work()

    async def prepared(self, errand: Errand, engine: EngineClient, sampling: SamplingParams) -> Any:
        """What opening a request costs, in the pool where that is more than nothing (see EngineClient.prepare)."""
        is_cheap = sampling.dry_multiplier <= 0 and sampling.constraint is None
        if is_cheap and len(sampling.logit_bias) <= FEW_BIASES:
            return None
        return await errand.run(True, partial(engine.prepare, sampling))

    async def parse(self, req: Request, parse: Callable[[bytes], T]) -> T:
        """Read the body and parse it. Raises PayloadTooLarge and what ``parse`` raises.

        NOTE: the JSON decoder itself keeps the GIL; what the pool takes off the loop is the checking behind it.
        """
        data = await read_body(req, self.config.max_body_bytes)
        return await self.offload(len(data) > LARGE_BODY, lambda: parse(data), req)

    async def lease(self, req: Request, name: str) -> Lease:
        """The right to use a model, loaded if need be. Raises what ``ModelManager.lease`` raises.

        A client that leaves while the model is loaded gives its place up.
        """
        lease = self.models.try_lease(name)
        if lease is not None:
            return lease
        return await unless_left(req.receive, self.models.lease(name), "the client left while the model was loaded")

    def keep_alive(self, name: str, seconds: float | None) -> None:
        """Carry out what a request says of how long its model stays loaded; for one that was not refused."""
        if seconds is not None:
            self.models.set_keep_alive(name, seconds)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a short background task until it is done (the event loop itself holds only weak references)."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end_at_shutdown(self, response: Endless) -> None:
        """See that a response without an end of its own does not hold the shutdown up. On the event loop."""
        self._endless.add(response)
        if self._is_ending:
            response.end()

    def end_work(self) -> None:
        """The server ends, and no engine takes requests any more: nobody needs the prompts being worked out, and
        batches go on with the next server."""
        self.workers.end()
        if self.batches is not None:
            self.batches.stop()

    def end_responses(self) -> None:
        """End those responses, and those that still come. On the event loop."""
        self._is_ending = True
        for response in list(self._endless):
            response.end()

    def start(self) -> None:
        """Requests may come from now on, on the running loop; batches that were interrupted go on."""
        self.models.start()
        if self.batches is not None:
            self.keep(asyncio.get_running_loop().create_task(self.batches.resume()))

    async def settle(self) -> None:
        """Wait for the background tasks."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.batches is not None and self._is_ending:
            await self.batches.stopped()

    async def process_startup(self, scope: dict[str, Any], event: dict[str, Any]) -> None:
        self.start()

    async def process_shutdown(self, scope: dict[str, Any], event: dict[str, Any]) -> None:
        self.end_work()
        self.end_responses()
        await self.settle()
        self.close()

    def close(self) -> None:
        """Stop the pool and the publisher, and flush the profile log. Idempotent."""
        self.workers.close()
        if self.batches is not None:
            self.batches.store.close()
        if self.kv_publisher is not None:
            self.kv_publisher.close()
        if self.profile_log is not None:
            self.profile_log.close()


def _no_target(to: str, *_: Any) -> Any:
    raise InvalidRequest("this server cannot look for other weights", param="to")


def _no_engine(*_: Any) -> Any:
    raise InvalidRequest("this server cannot load models", param="to")


def _start_publisher(config: ServeConfig, models: ModelManager) -> KvPublisher:
    """A publisher that follows every model's KV events. Raises ConfigError."""
    endpoint = config.kv_events_endpoint
    publisher = KvPublisher(endpoint, topic=config.kv_events_topic, block_size=config.kv_events_block_size)
    try:
        publisher.start({name: engine.kv.events for name, engine in models.items()})
        models.watchers.append(lambda name, engine: publisher.follow(name, engine.kv.events if engine else None))
    except BaseException:
        publisher.close()
        raise
    host = urlsplit(endpoint).hostname
    if host is not None and not is_loopback(host):
        log.warning("%s is open to other machines: who connects there is sent the tokens of all prompts", endpoint)
    return publisher
