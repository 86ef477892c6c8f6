"""Work on long texts in threads, for clients who may leave and must not stand in each other's way.

Laws:

1. A client has at most ``PER_CLIENT`` threads at a time, and whoever has none is served before one who has some.
2. Work is done in short pieces, with a ``checkpoint`` between two: there it makes room for streams, and there it ends
   when the client has left or the server ends. The request itself does not wait for that.
3. A thread counts as its client's until its work has really ended.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from mullama.errors import ClientLeft, ShuttingDown
from mullama.web.http.request import Receive, until_disconnect

T = TypeVar("T")

THREADS = 8
PER_CLIENT = 2
#: What tokenising a long text may take of a core while others are answered.
SHARE_BESIDE_STREAMS = 0.1


class GivenUp(Exception):
    """Nobody waits for the work any more. Raised by ``checkpoint``, inside of it."""


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


class Workers:
    """The threads, and who has them. Event loop only, but for ``close``."""

    def __init__(self, *, threads: int = THREADS, per_client: int = PER_CLIENT) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mullama-web")
        self._n_threads = threads
        self._per_client = per_client
        self._running: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}
        self._errands: set[Errand] = set()
        self.is_ending = False

    async def enter(self, client: Hashable) -> None:
        """Wait for the right to a thread; ``leave`` gives it back."""
        if not self._may_run(client) or self._waiting.get(client):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(client, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self.leave(client)  # it came in the same moment
                raise
            return
        self._running[client] += 1

    def leave(self, client: Hashable) -> None:
        """Give a thread back: the next one is whose client has the fewest, the longest wait first."""
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]
        while ready := [one for one in self._waiting if self._may_run(one)]:
            chosen = min(ready, key=lambda one: self._running[one])
            turns = self._waiting.pop(chosen)
            turn = turns.popleft()
            if turns:
                self._waiting[chosen] = turns  # behind the others
            if not turn.done():
                self._running[chosen] += 1
                turn.set_result(None)

    def _may_run(self, client: Hashable) -> bool:
        return self._running[client] < self._per_client and self._running.total() < self._n_threads

    def start(self, client: Hashable, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run the work of a client that has entered; its thread is given back when the work has really ended."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, without_exits, work)
        future.add_done_callback(lambda done: self._ended(client, done))
        return future

    def _ended(self, client: Hashable, done: asyncio.Future[Any]) -> None:
        self.leave(client)
        if not done.cancelled():
            done.exception()  # whoever has gone does not ask for it

    def note(self, errand: Errand, *, is_over: bool) -> None:
        (self._errands.discard if is_over else self._errands.add)(errand)

    def end(self) -> None:
        """The server ends: all work ends at its next checkpoint, and who waits for it is told. On the event loop."""
        self.is_ending = True
        for errand in list(self._errands):
            errand.end()

    def close(self) -> None:
        """Wait for the threads, whose work ends at its next checkpoint. Idempotent. Any thread."""
        self.is_ending = True
        self._pool.shutdown(wait=True, cancel_futures=True)


class Errand:
    """The work of one request. On the event loop, but for ``checkpoint``."""

    def __init__(
        self, workers: Workers, client: Hashable, receive: Receive | None, is_busy: Callable[[], bool]
    ) -> None:
        """``receive`` reports that the client leaves (its body was read); None: nobody can."""
        self._workers = workers
        self._client = client
        self._receive = receive
        self._is_busy = is_busy
        self._pace = Pace(is_busy)
        self._is_given_up = False
        self._over: asyncio.Future[None] | None = None

    def checkpoint(self) -> None:
        """Call it between two short pieces of the work, in its thread. Raises GivenUp."""
        if self._is_given_up or self._workers.is_ending:
            raise GivenUp
        self._pace()
        if self._is_given_up or self._workers.is_ending:  # it may have slept
            raise GivenUp

    def end(self) -> None:
        self._is_given_up = True
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    async def run(self, is_large: bool, work: Callable[[], T]) -> T:
        """Do the work here, or in a thread when it is large enough to hold up the event loop.

        Raises what it raises, ClientLeft as soon as the client has left, ShuttingDown as soon as the server ends.
        """
        if not is_large:
            return work()
        if self._workers.is_ending:
            raise _ending()
        self._pace = Pace(self._is_busy)  # another thread's clock
        self._over = asyncio.get_running_loop().create_future()
        doing = asyncio.ensure_future(self._do(work))
        leaving = None if self._receive is None else asyncio.ensure_future(until_disconnect(self._receive))
        self._workers.note(self, is_over=False)
        try:
            ends: set[asyncio.Future[Any]] = {doing, self._over}
            await asyncio.wait(
                ends | ({leaving} if leaving is not None else set()), return_when=asyncio.FIRST_COMPLETED
            )
            if doing.done():
                return doing.result()
            raise (
                _ending() if self._workers.is_ending else ClientLeft("the client left before its prompt was worked out")
            )
        except GivenUp:
            raise _ending() from None
        finally:
            self._workers.note(self, is_over=True)
            if leaving is not None:
                leaving.cancel()
            if not doing.done():
                self._is_given_up = True
                doing.cancel()

    async def _do(self, work: Callable[[], T]) -> T:
        await self._workers.enter(self._client)
        # The thread goes on when this is cancelled, to its next checkpoint.
        return await asyncio.shield(self._workers.start(self._client, work))


def _ending() -> ShuttingDown:
    return ShuttingDown("the server is shutting down", retry_after=5)


def without_exits(work: Callable[[], T]) -> T:
    """A SystemExit (of a plugin, say) would end the event loop that waits for the work."""
    try:
        return work()
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"the work was told to end by {type(error).__name__}") from error
