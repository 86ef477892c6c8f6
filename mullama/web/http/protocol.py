"""uvicorn's HTTP protocol, and what clients meet that it leaves out.

A limit on the size of a request's head (httptools itself keeps any amount of it) and on the time it may take, clients
that are too many (``connections.py``), clients that shut their sending half, HTTP/1.0, offers of other
protocols, errors as OpenAI's objects, and a direct way to the response's body (``direct.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mullama.web.http.connections import SLOWEST, Limits
from mullama.web.http.half_closed import HalfClosed
from mullama.web.stream.direct import EXTENSION, DirectBody

_OFFERS = (b"upgrade", b"http2-settings")  # headers that offer another protocol, and what Connection calls them
MAX_HEAD = 64 << 10  # bytes of an unfinished head; what arrives in one piece with its end may be a little more


def _refusal(
    status: bytes, message: str, code: str | None, kind: str = "invalid_request_error", header: bytes = b""
) -> bytes:
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = orjson.dumps({"error": error})
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%bconnection: close\r\n\r\n"
    return head % (status, len(body), header) + body


_TOO_LARGE = _refusal(
    b"431 Request Header Fields Too Large",
    f"the head of the request is larger than {MAX_HEAD} bytes",
    "request_head_too_large",
)
_TOO_MANY = _refusal(
    b"503 Service Unavailable",
    "as many connections are open as the server may have; try again",
    "too_many_connections",
    "overloaded_error",
    b"retry-after: 1\r\n",
)
_TOO_SLOW = _refusal(
    b"408 Request Timeout", "the request did not come in time (--request-timeout of the server)", "request_timeout"
)
_NOT_HTTP = _refusal(b"400 Bad Request", "this is not a valid HTTP request", None)


class Protocol(HttpToolsProtocol):
    """Answers 431 and closes once an unfinished head has more than ``MAX_HEAD`` bytes, 408 when a request does not come
    to its end, 503 when there are too many connections.

    A client that has sent all of its request and the end of its stream gets its answer, and then the connection ends.
    """

    _in_head = True
    _head_bytes = 0
    _half_closed: HalfClosed | None = None
    _limits: Limits | None = None
    _is_refused = False
    _awaited_since: float | None = None  # a request that has not come whole
    _has_begun = False
    _n_received = 0  # bytes of its body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limits = getattr(self.server_state, "limits", None)
        self._awaited_since = now = self.loop.time()
        if self._limits is None:
            return
        verdict = self._limits.refuses(self, len(self.connections), now)
        if verdict is None:
            transport.abort()
        elif verdict:
            # What the client has sent is read and dropped: a socket that is closed with something unread resets the
            # connection, and the answer with it.
            self._is_refused = True
            transport.write(_TOO_MANY)
            if transport.can_write_eof():
                transport.write_eof()

    def is_late(self, now: float, limits: Limits) -> bool:
        """Whether its request should be here by now."""
        since = self._awaited_since
        if since is None or now - since < limits.request_timeout + self._n_received / SLOWEST:
            return False
        # Not while an answer before it is under way, nor while it is we who do not read.
        return (not self._in_head or self._is_idle) and not self.flow.read_paused

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def give_up(self, limits: Limits) -> None:
        """End the connection; a client that has begun a request is told why."""
        if self.transport.is_closing():
            return
        if self._in_head:
            if self._has_begun:
                self.transport.write(_TOO_SLOW)
        elif self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.response_started:
                self.transport.write(_TOO_SLOW)
            self.cycle.disconnected = True  # whoever waits for the rest of the body
            self.cycle.message_event.set()
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        left = data
        try:
            while left:
                try:
                    self.parser.feed_data(left)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    left = self._without_offer() + left[upgrade.args[0] :]
        except httptools.HttpParserError:
            self.send_400_response("")
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_TOO_LARGE)
            self.transport.close()

    def _without_offer(self) -> bytes:
        """The head of a request that offers another protocol, as Java's client does with HTTP/2, without the offer.

        A server may go on with this one, but the parser gives up the body: it is told again. Raises HttpParserError.
        """
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("this server is not a proxy")
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(t for t in map(bytes.strip, value.split(b",")) if t.lower() not in _OFFERS)
            if name not in _OFFERS:
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # as uvicorn sets it, from httptools 0.6.3 on
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"".join([*head, b"\r\n"])

    def eof_received(self) -> bool:  # type: ignore[override]
        """True: the connection stays, for an answer is owed."""
        last = self.cycle
        if last is None or last.response_complete or last.more_body:
            return False
        last.keep_alive = False  # there will be no other request
        self._half_closed = HalfClosed(self.transport, self.transport.abort)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._awaited_since = None
        if self._limits is not None:
            self._limits.lost(self)
        if self._half_closed is not None:
            self._half_closed.close()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_NOT_HTTP)
        self.transport.close()

    def on_message_begin(self) -> None:
        self._in_head = self._has_begun = True
        self._head_bytes = self._n_received = 0
        self._awaited_since = self.loop.time()
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._n_received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._awaited_since = None
        self._has_begun = False
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # it comes again
        self._in_head = False
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # its task runs later, so the app finds the extension
            self.scope["extensions"] = {EXTENSION: {"body": DirectBody(self.cycle)}}

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = Unchunked(cycle, app)
        super()._start_asgi_task(cycle, app)


class Unchunked:
    """An ASGI app for a client that speaks HTTP/1.0: it knows neither chunks nor interim responses.

    A body whose length is not known ends with the connection, which uvicorn closes after every response to 1.0.
    """

    def __init__(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._cycle = cycle
        self._app = app
        self._ends_by_close = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._cycle.waiting_for_100_continue = False

        async def send_plain(message: Any) -> None:
            if message["type"] == "http.response.start":
                if all(name.lower() != b"content-length" for name, _ in message.get("headers", ())):
                    self._ends_by_close = True
                    self._cycle.chunked_encoding = False
            elif self._ends_by_close:
                # uvicorn holds the body against the length that was announced: here it is each piece's own.
                self._cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, send_plain)
