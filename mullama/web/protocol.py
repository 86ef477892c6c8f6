"""uvicorn's HTTP protocol with a limit on the size of a request's head (httptools itself keeps any amount of it), and
with a direct way to the response's body (``direct.py``)."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mullama.web.direct import EXTENSION, DirectBody

MAX_HEAD = 64 << 10  # bytes of an unfinished head; what arrives in one piece with its end may be a little more

_BODY = (
    b'{"error":{"message":"the head of the request is larger than %d bytes","type":"invalid_request_error",'
    b'"param":null,"code":"request_head_too_large"}}' % MAX_HEAD
)
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_BODY), _BODY)
)


class Protocol(HttpToolsProtocol):
    """Answers 431 and closes once an unfinished head has more than ``MAX_HEAD`` bytes."""

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_REFUSAL)
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
