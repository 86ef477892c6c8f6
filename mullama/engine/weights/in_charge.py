"""The weights of one engine: whether there are any now, and who may change them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from mullama.errors import ModelBusy

if TYPE_CHECKING:
    from mullama._core import Vacancy


class Boundary(Protocol):
    """What goes on between the engine's steps (see WeightChange)."""

    def at_boundary(self, *, busy: bool, quiet: bool) -> bool: ...

    def abort(self, error: BaseException) -> None: ...


class Weights:
    """``change`` and ``vacancy`` belong to the engine thread; any thread may read ``are_away``."""

    def __init__(self) -> None:
        self.change: Boundary | None = None  # that has come to the engine thread
        self.vacancy: Vacancy | None = None  # the KV that waits in host memory while there are no weights
        self.are_away = False  # there are none: unloaded for a change, or for a sleep
        self.comparing = threading.Lock()  # held while the model is read beside the engine
        self._one = threading.Lock()  # a change at a time

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See that the weights stay those that they are. Raises ModelBusy while they are being changed."""
        if not self._one.acquire(blocking=False):
            raise ModelBusy("the weights of this model are being changed now", retry_after=1)
        try:
            yield
        finally:
            self._one.release()

    @property
    def is_changing(self) -> bool:
        """Whether a change goes on, during which the disk tier leaves for a moment. Any thread."""
        return self._one.locked()

    @property
    def saved_bytes(self) -> int:
        """Of KV that waits in host memory outside the tier. Engine thread."""
        return self.vacancy.n_bytes if self.vacancy is not None else 0

    def close(self) -> None:
        """Wait for who compares, and has seen that the engine stops."""
        with self.comparing:
            pass
