"""``--profile-log``: one JSON line for every finished request, written by a thread of its own."""

from __future__ import annotations

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


class ProfileLog:
    """Appends to a JSONL file. ``write`` only queues; a thread formats, writes and flushes.

    A disk that fails costs log lines, never a request: the failure is logged once.
    """

    def __init__(self, path: str) -> None:
        """Raises ConfigError when the file cannot be opened for appending."""
        try:
            self._file: BinaryIO = Path(path).expanduser().open("ab")
        except OSError as error:
            raise ConfigError(f"--profile-log: cannot write {path}: {error.strerror}", param="profile_log") from None
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._closed = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="mullama-profile-log", daemon=True)
        self._thread.start()

    def write(self, labels: dict[str, Any], finish: Finish) -> None:
        """Queue one line: the time, ``labels``, the finish reason, and the profile's fields."""
        if not self._closed:
            self._queue.put((time.time(), labels, finish))

    def close(self) -> None:
        """Write what is queued, flush, close. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        while True:
            entries = [self._queue.get()]
            while not self._queue.empty():  # only this thread takes entries
                entries.append(self._queue.get())
            self._append([entry for entry in entries if entry is not None])
            if entries[-1] is None:
                return

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
