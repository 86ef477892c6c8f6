"""Ctrl-C and SIGTERM as a request to stop something, instead of an exception at an arbitrary place."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

#: Seconds in which what is being done may end by itself.
PATIENCE = 0.7
#: The exit status when a signal ends a server that is not ready: SIGTERM is how servers are ended, and no failure.
STATUS = {signal.SIGTERM: 0, signal.SIGINT: 130}


class Interrupt:
    """Whether a signal came, and which."""

    number: int | None = None

    def check(self) -> None:
        """End if one came. Raises KeyboardInterrupt, SystemExit."""
        if self.number is not None:
            _end(self.number)


@contextlib.contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C calls ``action`` and the second raises KeyboardInterrupt.

    SIGTERM does the same where it has a handler (``ends_by_signal``). ``action`` runs on the main thread between two
    bytecodes and should only set a flag or cancel. Off the main thread, where Python delivers no signals, nothing
    changes.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        interrupt.check()
        interrupt.number = number
        action()

    numbers = [signal.SIGINT, *([signal.SIGTERM] if callable(signal.getsignal(signal.SIGTERM)) else [])]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ending:
    """The time in which SIGTERM and SIGINT end the process within a second, whatever it does.

    As process 1 of a container a signal without a handler is lost; and a handler of Python waits for the main thread,
    which may be in the middle of a load for minutes. So a thread is told of the signal as well; when the main thread
    has not ended the process after ``PATIENCE`` seconds, it does. Nothing is lost by that but what was being loaded.
    """

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="mullama-signals", daemon=True)
        self._thread.start()

    def over(self) -> None:
        """From here on the main thread looks after signals in time. Idempotent. Not after a signal: that one counts."""
        if self._theirs.fileno() < 0:
            return
        signal.set_wakeup_fd(self._before)
        self._theirs.close()
        self._thread.join()
        self._ours.close()

    def _watch(self) -> None:
        while numbers := self._ours.recv(1):
            status = STATUS.get(signal.Signals(numbers[0]))
            if status is not None and signal.getsignal(numbers[0]) is not signal.SIG_IGN:
                self._ours.settimeout(PATIENCE)
                with contextlib.suppress(TimeoutError):
                    if not self._ours.recv(1):
                        return
                os._exit(status)  # a second signal is not patient


@contextlib.contextmanager
def ends_by_signal() -> Iterator[Ending | None]:
    """Inside, SIGTERM and SIGINT end the process, until ``over()`` within a second. Main thread; else nothing changes.

    SIGTERM raises SystemExit with status 0, SIGINT KeyboardInterrupt. A signal that is ignored stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    before = {
        number: signal.signal(number, lambda number, frame: _end(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    ending = Ending()
    try:
        yield ending
    except (KeyboardInterrupt, SystemExit):
        raise  # the thread waits on: cleaning up has to end as well
    except BaseException:
        ending.over()
        raise
    else:
        ending.over()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int) -> NoReturn:
    """Raises KeyboardInterrupt, SystemExit."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(STATUS[signal.SIGTERM])
