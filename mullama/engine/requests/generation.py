"""The reader's end of a request: text as it becomes final, then how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from mullama.errors import EngineDead
from mullama.types import Delta, Finish, TokenScore

#: Offered every text with its tokens, where those are asked for. False: it is not taken.
Sink = Callable[[str, Sequence[TokenScore]], bool]

log = logging.getLogger("mullama.engine")


class Attachable(Protocol):
    """What delivers the texts of an engine (see Reader)."""

    def attach_loop(self, loop: asyncio.AbstractEventLoop) -> None: ...

    def attach_thread(self) -> None: ...


class BaseGeneration:
    """What both kinds share. ``deliver``, ``note_prompt`` and ``end`` are called by the engine's reader only.

    ``prompt_logprobs``, where they are asked for: the prompt's tokens but the first; all are there with the first text.
    """

    def __init__(self, request_id: str, handle: int, cancel: Callable[[int], None]) -> None:
        self.id = request_id
        self.handle = handle
        self.finish: Finish | None = None
        self.prompt_logprobs: list[TokenScore] = []
        self._cancel = cancel
        self._is_cancelled = False

    def cancel(self) -> None:
        """Stop it from any thread. Harmless when it has ended."""
        if self.finish is None:
            self._is_cancelled = True
            self._cancel(self.handle)

    def belongs_to(self, handle: int, cancel: Callable[[int], None]) -> None:
        """Another engine generates from now on, by the name ``handle``. A cancel that was on its way goes there."""
        self.handle, self._cancel = handle, cancel
        if self._is_cancelled:
            cancel(handle)

    def attach_to(self, reader: Attachable) -> None:
        """See that ``reader``, another engine's, reads for this one's loop or thread. Any thread."""
        raise NotImplementedError

    def note_prompt(self, score: TokenScore) -> None:
        # Any thread: who reads looks only when it has a text, which comes after.
        self.prompt_logprobs.append(score)

    def deliver(self, text: str, n_tokens: int, tokens: tuple[TokenScore, ...] = ()) -> None:
        raise NotImplementedError

    def end(self, finish: Finish) -> None:
        raise NotImplementedError


class AsyncGeneration(BaseGeneration):
    """Read on one event loop. Deltas that pile up while nobody reads are merged.

    ``sink``, if set, is offered every text on that loop in the moment of its delivery, unless another one is queued.
    What it takes (it returns True) is not queued and wakes no reader. It must not wait, and may be changed any time.
    """

    def __init__(
        self, request_id: str, handle: int, cancel: Callable[[int], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(request_id, handle, cancel)
        self.sink: Sink | None = None
        self._loop = loop
        self._thread = threading.get_ident()
        self._parts: list[str] = []
        self._tokens: list[TokenScore] = []
        self._n_tokens = 0
        self._ending: Finish | None = None
        self._waiter: asyncio.Future[None] | None = None

    def deliver(self, text: str, n_tokens: int, tokens: tuple[TokenScore, ...] = ()) -> None:
        if threading.get_ident() == self._thread:
            self._put(text, n_tokens, tokens)
        else:
            self._call(self._put, text, n_tokens, tokens)

    def end(self, finish: Finish) -> None:
        if threading.get_ident() == self._thread:
            self._finish(finish)
        else:
            self._call(self._finish, finish)

    def attach_to(self, reader: Attachable) -> None:
        self._call(reader.attach_loop, self._loop)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            return  # the loop is closed: nobody reads any more

    def _put(self, text: str, n_tokens: int, tokens: tuple[TokenScore, ...]) -> None:
        if self.sink is not None and not self._parts:
            try:
                if self.sink(text, tokens):
                    return
            except Exception:  # the other requests' records must not suffer
                log.exception("request %s: its sink failed and is left out from here on", self.id)
                self.sink = None
        self._parts.append(text)
        self._tokens += tokens
        self._n_tokens += n_tokens
        self._wake()

    def _finish(self, finish: Finish) -> None:
        self._ending = finish
        self.finish = finish
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            with contextlib.suppress(RuntimeError):  # the loop was closed while somebody waited
                self._waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._parts:
            if self._ending is not None:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        delta = Delta("".join(self._parts), self._n_tokens, tuple(self._tokens))
        self._parts.clear()
        self._tokens.clear()
        self._n_tokens = 0
        return delta


class Inbox(BaseGeneration):
    """The reader's end of a SyncGeneration: what was delivered and is not read yet."""

    def __init__(self, request_id: str, handle: int, cancel: Callable[[int], None]) -> None:
        super().__init__(request_id, handle, cancel)
        self.items: queue.SimpleQueue[Delta | Finish] = queue.SimpleQueue()

    def deliver(self, text: str, n_tokens: int, tokens: tuple[TokenScore, ...] = ()) -> None:
        self.items.put(Delta(text, n_tokens, tokens))

    def end(self, finish: Finish) -> None:
        self.items.put(finish)

    def attach_to(self, reader: Attachable) -> None:
        reader.attach_thread()


class SyncGeneration:
    """Read by one thread. One that nobody refers to any more is cancelled: its slot is free for others.

    Iterating gives ``Delta``; ``finish`` is set when the iteration has ended. Raises EngineDead in another process than
    the one that submitted it.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox  # the reader knows this alone, so that it does not keep the generation alive
        self._pid = os.getpid()

    @property
    def id(self) -> str:
        """The request's."""
        return self._inbox.id

    @property
    def handle(self) -> int:
        """The engine's number of it."""
        return self._inbox.handle

    @property
    def finish(self) -> Finish | None:
        """How it ended; None while it has not been read to its end."""
        return self._inbox.finish

    @property
    def prompt_logprobs(self) -> list[TokenScore]:
        """Of the prompt's tokens but the first, where they are asked for; all are there with the first text."""
        return self._inbox.prompt_logprobs

    def cancel(self) -> None:
        """Stop it from any thread. Harmless when it has ended."""
        self._inbox.cancel()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        inbox = self._inbox
        if inbox.finish is not None:
            raise StopIteration
        if os.getpid() != self._pid:
            raise EngineDead("a generation cannot be read in another process than the one that submitted it")
        item = inbox.items.get()
        if isinstance(item, Delta):
            return item
        inbox.finish = item
        raise StopIteration

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # also while the interpreter ends
            self._inbox.cancel()
