"""``--profile-log``: one JSON line for every finished request, written by a thread of its own."""

from __future__ import annotations

import enum
import logging
import queue
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from mullama.errors import ConfigError
from mullama.types import Finish

log = logging.getLogger(__name__)

_Entry = tuple[float, dict[str, Any], Finish]


class _Order(enum.Enum):
    REOPEN = enum.auto()
    CLOSE = enum.auto()


class ProfileLog:
    """Appends to a JSONL file. ``write`` only queues; a thread formats, writes and flushes.

    A disk that fails costs log lines, never a request: the failure is logged once.
    """

    def __init__(self, path: str) -> None:
        """Raises ConfigError when the file cannot be opened for appending."""
        self._path = Path(path).expanduser()
        try:
            self._file: BinaryIO = self._path.open("ab")
        except OSError as error:
            raise ConfigError(f"--profile-log: cannot write {path}: {error.strerror}", param="profile_log") from None
        self._queue: queue.SimpleQueue[_Entry | _Order] = queue.SimpleQueue()
        self._closed = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="mullama-profile-log", daemon=True)
        self._thread.start()

    def write(self, labels: dict[str, Any], finish: Finish) -> None:
        """Queue one line: the time, ``labels``, the finish reason, and the profile's fields."""
        if not self._closed:
            self._queue.put((time.time(), labels, finish))

    def reopen(self) -> None:
        """Go on in a new file of the same name, after the old one was moved away. Where that cannot be had, in the old
        one; a log that had stopped is tried again."""
        if not self._closed:
            self._queue.put(_Order.REOPEN)

    def close(self) -> None:
        """Write what is queued, flush, close. Idempotent."""
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

    def _open_anew(self) -> None:
        try:
            file = self._path.open("ab")
        except OSError as error:
            log.error("the profile log goes on in its old file: %s", error)
            return
        self._file.close()
        self._file, self._failed = file, False

    def _append(self, entries: list[_Entry]) -> None:
        if not entries or self._failed:
            return
        try:
            self._file.write(b"".join(_line(*entry) for entry in entries))
            self._file.flush()
        except OSError as error:
            self._failed = True
            log.error("the profile log stopped: %s", error)


def _line(when: float, labels: dict[str, Any], finish: Finish) -> bytes:
    record = {
        "time": round(when, 3),
        **labels,
        "finish_reason": str(finish.reason),
        "error": str(finish.error) if finish.error is not None else None,
        **finish.profile.to_dict(),
    }
    return orjson.dumps(record, default=str, option=orjson.OPT_APPEND_NEWLINE)
