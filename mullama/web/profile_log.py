"""``--profile-log``: one JSON line for every finished request, written by a thread of its own."""

from __future__ import annotations

import enum
import logging
import queue
import threading
import time
from io import FileIO
from typing import Any

import orjson

from mullama.errors import ConfigError
from mullama.home import expand
from mullama.types import Finish

log = logging.getLogger(__name__)

_Entry = tuple[float, dict[str, Any], Finish]


class _Order(enum.Enum):
    REOPEN = enum.auto()
    CLOSE = enum.auto()


class ProfileLog:
    """Appends to a JSONL file. ``write`` only queues; a thread formats and writes.

    A disk that fails costs lines, never a request: the failure is logged once, and how many lines it cost when the disk
    takes some again. Lines are whole: the first one after a failure begins on a line of its own.
    """

    def __init__(self, path: str) -> None:
        """Raises ConfigError when the file cannot be opened for appending."""
        self._path = expand(path)
        try:
            self._file = self._open()
        except OSError as error:
            raise ConfigError(f"--profile-log: cannot write {path}: {error.strerror}", param="profile_log") from None
        self._queue: queue.SimpleQueue[_Entry | _Order] = queue.SimpleQueue()
        self._closed = False
        self._lost = 0  # lines, since the disk last took some
        self._torn = False  # whether the file ends within a line
        self._thread = threading.Thread(target=self._run, name="mullama-profile-log", daemon=True)
        self._thread.start()

    def write(self, labels: dict[str, Any], finish: Finish) -> None:
        """Queue one line: the time, ``labels``, the finish reason, and the profile's fields."""
        if not self._closed:
            self._queue.put((time.time(), labels, finish))

    def reopen(self) -> None:
        """Go on in a new file of the same name, after the old one was moved away. Where that cannot be had, in the old
        one."""
        if not self._closed:
            self._queue.put(_Order.REOPEN)

    def close(self) -> None:
        """Write what is queued, close. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(_Order.CLOSE)
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        while True:
            entries: list[_Entry] = []
            order: _Order | None = None
            while order is None and (not entries or not self._queue.empty()):  # only this thread takes entries
                item = self._queue.get()
                if isinstance(item, _Order):
                    order = item
                else:
                    entries.append(item)
            self._append(entries)
            if order is _Order.CLOSE:
                return
            if order is _Order.REOPEN:
                self._open_anew()

    def _open(self) -> FileIO:
        # Unbuffered: what the disk has not taken is not tried again behind our back, in part and out of place.
        return self._path.open("ab", buffering=0)

    def _open_anew(self) -> None:
        try:
            file = self._open()
        except OSError as error:
            log.error("the profile log goes on in its old file: %s", error)
            return
        self._file.close()
        self._file, self._torn = file, False

    def _append(self, entries: list[_Entry]) -> None:
        if not entries:
            return
        data = b"\n" * self._torn + b"".join(_line(*entry) for entry in entries)
        done = 0
        try:
            while done < len(data):
                done += self._file.write(data[done:]) or 0
        except OSError as error:
            if not self._lost:
                log.error("the profile log loses lines: %s", error)
            self._lost += len(entries) - data.count(b"\n", self._torn, done)
        else:
            if self._lost:
                log.warning("the profile log goes on; %d lines were lost", self._lost)
            self._lost = 0
        if done:
            self._torn = data[done - 1 : done] != b"\n"


def _line(when: float, labels: dict[str, Any], finish: Finish) -> bytes:
    record = {
        "time": round(when, 3),
        **labels,
        "finish_reason": str(finish.reason),
        "error": str(finish.error) if finish.error is not None else None,
        **finish.profile.to_dict(),
    }
    return orjson.dumps(record, default=str, option=orjson.OPT_APPEND_NEWLINE)
