"""Progress on stderr: a rich bar on a terminal, a line now and then in a log. rich is imported with the first step."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_LOG_SECONDS = 10.0
_DELAY_SECONDS = 0.5


class _Display:
    """Shows one step at a time. Nothing appears before the first call, nor in the first ``delay`` seconds, and the
    bar is gone at the end."""

    def __init__(self, title: str, stream: TextIO | None = None, *, delay: float = 0.0) -> None:
        self._shown_from = time.monotonic() + delay
        self._title = title
        self._stream = stream or sys.stderr
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._step = ""
        self._logged_at = 0.0
        self._step_began = (0.0, 0.0)  # when, and at which byte

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: str, done: float, total: float | None) -> None:
        if time.monotonic() < self._shown_from:
            return
        if not self._stream.isatty():
            self._log(step, done, total)
            return
        if self._bar is None:
            self._bar = self._make_bar()
            self._bar.start()
        if step != self._step or self._task is None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(f"{self._title}: {step}", total=total)
            self._step = step
        self._bar.update(self._task, completed=done, total=total)

    def _make_bar(self) -> Bar:
        from rich.console import Console
        from rich.progress import Progress

        return Progress(*self._columns(), console=Console(file=self._stream), transient=True)

    def _columns(self) -> list[Any]:
        from rich.progress import BarColumn, TextColumn

        return [TextColumn("{task.description}", markup=False), BarColumn()]

    def _log(self, step: str, done: float, total: float | None) -> None:
        now = time.monotonic()
        if step == self._step and now - self._logged_at < _LOG_SECONDS:
            return
        share = f" {100 * done / total:.0f} %{self._pace(done, total, now)}" if total and step == self._step else ""
        if step != self._step:
            self._step_began = (now, done)
        self._step, self._logged_at = step, now
        with contextlib.suppress(OSError):  # a log on a full disk, a pipe that nobody reads: no reason to stop
            print(f"{self._title}: {step}{share}", file=self._stream, flush=True)

    def _pace(self, done: float, total: float, now: float) -> str:
        """What a line of a log says beside the share."""
        return ""


class PullProgress(_Display):
    """A ``Progress`` of ``mullama.models.sources.base`` inside ``with``: each file's bytes, speed and time left."""

    def _pace(self, done: float, total: float, now: float) -> str:
        began, first = self._step_began
        if now <= began or done <= first:
            return ""
        speed = (done - first) / (now - began)
        left = int((total - done) / speed)
        return f", {speed / 1e6:.1f} MB/s, {left // 60}:{left % 60:02} left"

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.update(what, done, total)

    def _columns(self) -> list[Any]:
        from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

        return [*super()._columns(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]


class HashProgress(PullProgress):
    """The same for reading a file, which is mostly too short to be shown."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        super().__init__(title, stream, delay=_DELAY_SECONDS)


class StepProgress(_Display):
    """A bar for each step of a long measurement, with an estimate of the time it still takes."""

    def _columns(self) -> list[Any]:
        from rich.progress import TaskProgressColumn, TimeRemainingColumn

        return [*super()._columns(), TaskProgressColumn(), TimeRemainingColumn()]


class LoadProgress(_Display):
    """The ``progress`` of ``Engine.load``, shown when loading takes longer than half a second.

    After :meth:`cancel` it answers False, which makes the load raise LoadCancelled.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        super().__init__(title, stream, delay=_DELAY_SECONDS)
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def __call__(self, fraction: float) -> bool:
        self.update("loading", fraction, 1.0)
        return not self.is_cancelled
