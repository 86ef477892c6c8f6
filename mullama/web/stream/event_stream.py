"""One stream of chunks for one request, in the words of any API.

The hot path is ``EventStream._sink`` where the server offers a direct way to the client (``direct.py``), else
``__anext__``: one JSON encoding of the new text between two constants.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Sequence
from types import TracebackType
from typing import Any, Protocol

import falcon.asgi
import orjson

from mullama.engine.client import AnswerPart
from mullama.errors import MullamaError
from mullama.types import Finish
from mullama.web.chat.answer import Answer
from mullama.web.error_responses import as_mullama_error
from mullama.web.stream.direct import DirectBody, Sink, diverts
from mullama.web.stream.generations import Event, Group, events_of

#: A comment alone: a blank line behind it would end an event without data, which some clients take for a broken one.
PING = b": ping\n"
#: The media type of server-sent events.
EVENTS = "text/event-stream; charset=utf-8"

#: Ends of lines for Python's ``str.splitlines``, and so for clients that split a stream with it (such as httpx's
#: ``iter_lines``), but not for JSON or server-sent events. The controls among them are escaped in any JSON.
_LINE_ENDS = re.compile(b"\xc2\x85|\xe2\x80[\xa8\xa9]")


def event_json(value: object) -> bytes:
    """The JSON of ``value`` for an event: no client's idea of a line ends within it."""
    data = orjson.dumps(value)
    if data.isascii() or _LINE_ENDS.search(data) is None:
        return data
    return _LINE_ENDS.sub(lambda end: b"\\u%04x" % ord(end[0].decode()), data)


class StreamFormat(Protocol):
    """The bytes of a stream in the words of one API; all that is constant is made once (PERF)."""

    head: bytes = b""  # sent at once, before anything is generated
    ping: bytes = PING  # sent when there was nothing to say for a while; empty: nothing is
    is_first_special: bool = False  # the stream's first piece is not like the others: ``first`` makes it

    def first(self, data: bytes) -> bytes:
        return data

    def opening(self, index: int) -> bytes:
        """What comes before the first text of a choice; may be empty."""

    def text(self, index: int, text: str) -> bytes: ...

    def parts(self, index: int, parts: Sequence[AnswerPart]) -> bytes:
        """What is new in an answer that is read (``Answer.read``)."""
        return b"".join([self.text(index, text) for kind, _, text, _ in parts if kind == "content"])

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        """What comes before and after a text's JSON in ``text``."""

    def text_json(self, text: str) -> bytes:
        """A text's JSON, in the order of the stream."""
        return event_json(text)

    def declined(self) -> None:
        """The last ``text_json`` was not sent; the text comes again."""
        return

    def finish(self, index: int, finish: Finish, ended: Sequence[Finish] | None, *, calls: bool = False) -> bytes:
        """What ends a choice; ``calls``: it has called functions.

        ``ended``: after the last one those of all choices; then it ends the stream as well.
        """

    def error(self, error: MullamaError) -> bytes:
        """What a client is told when the stream ends in the middle."""


class Bell:
    """What a stream waits for and any thread may ring, without waiting: one call at most is on its way to the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rang = asyncio.Event()
        self._is_ringing = False

    def ring(self) -> None:
        """From any thread."""
        if not self._is_ringing:
            self._is_ringing = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the connection
                self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._is_ringing = False  # before the waiting one looks: what comes later rings again
        self._rang.set()

    def ring_here(self) -> None:
        """On the event loop."""
        self._rang.set()

    async def wait(self) -> None:
        """Until it rings, or has rung since ``clear``."""
        await self._rang.wait()

    def clear(self) -> None:
        self._rang.clear()


class Silence:
    """Ends a wait that lasts longer than ``seconds``: ``with silence: await …`` is then simply left.

    What is awaited must lose nothing when it is cancelled. ``is_waiting`` says whether the wait goes on; who breaks the
    silence without ending it sets ``since`` to the loop's time. PERF: one timer a stream, moved only when it fires,
    where ``asyncio.timeout`` would set and cancel one for every token.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.since = 0.0
        self.is_waiting = False
        self._fired = False
        self._cancelling = 0

    async def broken_by(self, what: Awaitable[object]) -> bool:
        """Wait; whether it came in time."""
        with self:
            await what
            return True
        return False

    def __enter__(self) -> None:
        if self._task is None:
            self._task = asyncio.current_task()
            self._timer = self._loop.call_later(self._seconds, self._check)
        self.since = self._loop.time()
        self.is_waiting = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.is_waiting = False
        if not self._fired:
            return False
        self._fired = False
        assert self._task is not None
        # As in asyncio.timeout: a cancellation from elsewhere at the same time goes on.
        still_cancelled = self._task.uncancel() > self._cancelling
        return kind is asyncio.CancelledError and not still_cancelled

    def _check(self) -> None:
        assert self._task is not None
        left = self.since + self._seconds - self._loop.time() if self.is_waiting else self._seconds
        if left <= 0.001:
            self._fired = True
            self._cancelling = self._task.cancelling()
            self._task.cancel()
            left = self._seconds
        self._timer = self._loop.call_later(left, self._check)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class EventStream:
    """The body of a streaming response: an async iterator of bytes that Falcon closes in a ``finally``.

    An error after the start can no longer change the status: it is sent as an event, and the stream ends there.
    With ``body``, text that comes while the iterator waits is written there, and the wait goes on.
    """

    def __init__(
        self,
        group: Group,
        chunks: StreamFormat,
        *,
        ping_seconds: float,
        body: DirectBody | None = None,
    ) -> None:
        self._group = group
        self._chunks = chunks
        self._silence = Silence(ping_seconds)
        self._source = events_of(group)
        self._opened = [False] * len(group.generations)
        self._finishes: list[Finish | None] = [None] * len(group.generations)
        self._running = len(group.generations)
        self._ended = False
        self._head = chunks.head
        self._body = body
        # A first chunk that is not like the others goes the ordinary way, and only then the direct one is opened.
        self._is_begun = not chunks.is_first_special
        if self._is_begun:
            self._open_direct()

    def _open_direct(self) -> None:
        if self._body is not None and self._group.answers is None:
            for index, generation in enumerate(self._group.generations):
                if diverts(generation):
                    generation.sink = self._sink(index, self._body)

    def _sink(self, index: int, body: DirectBody) -> Sink:
        """What takes a choice's text while the iterator waits; the law is in ``direct.py``.

        PERF: the function that is returned is all that runs for a token of a flowing stream.
        """
        silence, source, opened = self._silence, self._source, self._opened
        dumps, now, declined = self._chunks.text_json, asyncio.get_running_loop().time, self._chunks.declined
        head, tail = self._chunks.around_text(index)
        write_first = body.writer(self._chunks.opening(index) + head, tail)
        write_later = body.writer(head, tail)

        def take(text: str) -> bool:
            if source.queued or not silence.is_waiting:
                return False
            if not text:
                return True  # it is held back
            write = write_later if opened[index] else write_first
            if not write(dumps(text)):
                declined()
                return False
            opened[index] = True
            silence.since = now()
            return True

        return take

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        """The next events, as many as are there; never empty."""
        if self._head:
            head, self._head = self._head, b""
            return head
        while not self._ended:
            try:
                events: list[Event] | None = None
                with self._silence:
                    events = await self._source.next()
                if events is None:
                    if self._chunks.ping:
                        return self._chunks.ping
                    continue
                if self._group.disconnected:
                    break
                data = (
                    self._encode(events)
                    if self._group.answers is None
                    else await self._read(self._group.answers, events)
                )
                if data:
                    return data if self._is_begun else self._begin(data)
            except Exception as error:  # logged by as_mullama_error, and the client is told
                self._ended = True
                self._group.cancel()
                return self._chunks.error(as_mullama_error(error))
        raise StopAsyncIteration

    def _begin(self, data: bytes) -> bytes:
        self._is_begun = True
        self._open_direct()
        return self._chunks.first(data)

    def _encode(self, events: list[Event]) -> bytes:
        """Raises the error of a generation that failed."""
        out = []
        for index, delta in events:
            if delta is not None and not delta.text:
                continue  # its text is held back
            if not self._opened[index]:
                self._opened[index] = True
                out.append(self._chunks.opening(index))
            out.append(self._chunks.text(index, delta.text) if delta is not None else self._finish(index))
        return out[0] if len(out) == 1 else b"".join(out)

    async def _read(self, answers: list[Answer], events: list[Event]) -> bytes:
        """The same of answers that are read. Raises the error of a generation that failed."""
        out = []
        for index, delta in events:
            answer = answers[index]
            if delta is None:
                self._group.finished(self._group.generations[index])  # an error comes before what was held back
            parts = await answer.read(None if delta is None else delta.text)
            if (parts or delta is None) and not self._opened[index]:
                self._opened[index] = True
                out.append(self._chunks.opening(index))
            if parts:
                out.append(self._chunks.parts(index, parts))
            if delta is None:
                out.append(self._finish(index, calls=bool(answer.calls)))
        return b"".join(out)

    def _finish(self, index: int, *, calls: bool = False) -> bytes:
        """What ends a choice, and after the last one the stream. Raises the error of a generation that failed."""
        finish = self._group.finished(self._group.generations[index])
        self._finishes[index] = finish
        self._running -= 1
        self._ended = not self._running
        ended = [one for one in self._finishes if one is not None] if self._ended else None
        return self._chunks.finish(index, finish, ended, calls=calls)

    async def close(self) -> None:
        """Stop whatever still runs for this stream. Idempotent."""
        self._ended = True
        for generation in self._group.generations:
            if diverts(generation):
                generation.sink = None
        self._silence.close()
        self._source.close()
        self._group.close()


def start_stream(resp: falcon.asgi.Response, stream: AsyncIterator[bytes], media_type: str = EVENTS) -> None:
    """Make ``stream`` the response's body. From here on Falcon closes it."""
    resp.content_type = media_type
    resp.set_header("Cache-Control", "no-cache")
    resp.set_header("X-Accel-Buffering", "no")  # nginx would hold the tokens back
    resp.stream = stream
