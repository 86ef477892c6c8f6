"""What other threads ask of the engine thread, in order, and whether there still is one that could do it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from mullama.errors import EngineDead, ShuttingDown

T = TypeVar("T")


class Interruptible(Protocol):
    """What the engine thread runs."""

    def interrupt(self) -> None: ...


class Commands:
    """``lock`` is the engine's: what is submitted under it comes before what is called afterwards.

    ``draining``, ``stopping``, ``closed`` and ``failure`` (why the thread stopped by itself) are set once.
    """

    def __init__(self, core: Interruptible, name: str) -> None:
        self.lock = threading.Condition()
        self.draining = False
        self.stopping = False
        self.closed = False
        self.failure: str | None = None
        self._name = name
        self._core = core
        self._queue: deque[Callable[[], None]] = deque()
        self._calls: set[Future[Any]] = set()  # of call(), not answered yet
        self._pid = os.getpid()  # a child has neither the threads nor the right to the page's file

    def __len__(self) -> int:
        return len(self._queue)

    # -- any thread -------------------------------------------------------------------------------------

    @property
    def is_ours(self) -> bool:
        """Whether this is the process that loaded the engine, and not a child of it."""
        return os.getpid() == self._pid

    def check_open(self) -> None:
        """Raise ShuttingDown unless what was loaded is still there."""
        if self.closed:
            raise ShuttingDown(f"'{self._name}' was closed: load it again")

    def check_process(self) -> None:
        """Raise EngineDead in a child of the process that loaded the engine: its threads are not there."""
        if not self.is_ours:
            raise EngineDead(
                f"'{self._name}' was loaded by process {self._pid}, and no engine comes along when a process "
                "forks: load it after the fork"
            )

    def check_alive(self) -> None:
        """Raise EngineDead or ShuttingDown unless new work is taken."""
        self.check_process()
        self.check_open()
        if self.failure is not None:
            raise EngineDead(f"the engine of '{self._name}' stopped; the server's log says why")
        if self.stopping or self.draining:
            raise ShuttingDown(f"'{self._name}' is shutting down", retry_after=5)

    def post(self, command: Callable[[], None]) -> None:
        """Hand a command to the engine thread; the lock is held."""
        self._queue.append(command)
        self._core.interrupt()
        self.lock.notify()

    def post_quietly(self, command: Callable[[], None]) -> None:
        """Hand a command to the engine thread from another one; nothing happens when it has ended."""
        if not self.is_ours:
            return  # the lock may have been held when the process forked
        with self.lock:
            if not self.closed and self.failure is None:
                self.post(command)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread at the next step boundary. Raises EngineDead."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked has gone
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:
                # A SystemExit from here would end the event loop that waits for it.
                future.set_exception(RuntimeError(f"the engine was told to end by {type(error).__name__}"))

        self.check_process()
        with self.lock:
            if self.closed:
                raise EngineDead(f"'{self._name}' was closed: load it again")
            if self.failure is not None:
                raise EngineDead(f"the engine of '{self._name}' stopped; the server's log says why")
            self._calls.add(future)
            future.add_done_callback(self._calls.discard)
            self.post(command)
        return future

    # -- the engine thread -----------------------------------------------------------------------------------

    def take(self) -> None:
        """Do all that was asked for."""
        while self._queue:
            self._queue.popleft()()

    def wait(self, seconds: float | None = None) -> None:
        """Until there is something to do, or the engine stops, or so long. The lock is held."""
        self.lock.wait_for(lambda: self._queue or self.stopping, seconds)

    def end(self) -> None:
        """The thread ends: nobody posts any more, for close() and a failure are both seen under the lock."""
        for future in list(self._calls):
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineDead(f"the engine of '{self._name}' is not running"))
