"""uvicorn's HTTP protocol, and what clients meet that it leaves out.

A limit on the size of a request's head (httptools itself keeps any amount of it), clients that shut their sending half,
HTTP/1.0, errors as OpenAI's objects, and a direct way to the response's body (``direct.py``).
"""

from __future__ import annotations

from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mullama.web.direct import EXTENSION, DirectBody
from mullama.web.half_closed import HalfClosed

MAX_HEAD = 64 << 10  # bytes of an unfinished head; what arrives in one piece with its end may be a little more


def _refusal(status: bytes, message: str, code: str | None) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = orjson.dumps({"error": error})
    return (b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b") % (
        status,
        len(body),
        body,
    )


_TOO_LARGE = _refusal(
    b"431 Request Header Fields Too Large",
    f"the head of the request is larger than {MAX_HEAD} bytes",
    "request_head_too_large",
)
_NOT_HTTP = _refusal(b"400 Bad Request", "this is no valid HTTP request", None)


class Protocol(HttpToolsProtocol):
    """Answers 431 and closes once an unfinished head has more than ``MAX_HEAD`` bytes.

    A client that has sent all of its request and the end of its stream gets its answer, and then the connection ends.
    """

    _in_head = True
    _head_bytes = 0
    _half_closed: HalfClosed | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_TOO_LARGE)
            self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """True: the connection stays, for an answer is owed."""
        last = self.cycle
        if last is None or last.response_complete or last.more_body:
            return False
        last.keep_alive = False  # there will be no other request
        self._half_closed = HalfClosed(self.transport, self.transport.abort)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._half_closed is not None:
            self._half_closed.close()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_NOT_HTTP)
        self.transport.close()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
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
