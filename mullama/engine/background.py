"""Who computes beside whom: engines take turns, and work that can wait (loading weights, hashing) steps back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mullama.child import step_back

T = TypeVar("T")

#: About a quarter of a core beside a busy compute thread: weights that fit the page cache come within a second, and
#: the running streams lose less than that quarter.
NICE = 3
#: For weights that somebody waits for, or that end a state which costs memory twice.
NICE_URGENT = 1


def share_cores(policy: str) -> None:
    """How the engines of this process take turns: round_robin, weighted, priority. Raises InvalidRequest."""
    from mullama._core import arbiter

    arbiter.policy = policy


def in_background(work: Callable[[], T], *, nice: int = NICE) -> T:
    """Run ``work`` in a thread of low priority and wait for it. Raises what it raises.

    A thread for each: on Linux a thread may lower its priority, but not raise it again.
    """
    done: Future[T] = Future()

    def run() -> None:
        step_back(nice)
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="mullama-background", daemon=True)
    thread.start()
    try:
        return done.result()
    finally:
        if done.done():
            thread.join()
