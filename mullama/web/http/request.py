"""The request type: Falcon's, with the arrival time and the raw ASGI ``receive``; and the bounded body reader."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import falcon.asgi

from mullama.errors import ClientLeft, InvalidRequest, PayloadTooLarge
from mullama.web.http.content_encoding import decode, encodings_of
from mullama.web.keys.key_ring import Key

T = TypeVar("T")

PERMIT = "mullama.permit"  # key of the scope: the right of a limited key to its request, given back when it has ended
_FLAGS = {"true": True, "1": True, "false": False, "0": False}

Receive = Callable[[], Awaitable[dict[str, Any]]]
#: An HTTP status and OpenAI's error object (what is under ``error``) as another API's body of an error.
SpellError = Callable[[int, dict[str, Any]], dict[str, Any]]


async def on_disconnect(receive: Receive, then: Callable[[], None]) -> None:
    """Call ``then`` when the client leaves."""
    await until_disconnect(receive)
    then()


async def until_disconnect(receive: Receive) -> None:
    """Wait until the client is gone (or has been answered: uvicorn reports both the same way)."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T], message: str) -> T:
    """What ``work`` gives; a client that leaves meanwhile cancels it. Raises ClientLeft with ``message``."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft(message)
        return await working
    finally:
        working.cancel()
        leaving.cancel()


class Request(falcon.asgi.Request):
    """``arrival_ns`` is stamped before any middleware ran (monotonic nanoseconds).

    ``receive`` is the ASGI callable: once the body is read, the only thing it still reports is a disconnect.
    """

    def __init__(self, scope: dict[str, Any], receive: Receive, *args: Any, **kwargs: Any) -> None:
        self.arrival_ns = time.monotonic_ns()
        self.receive = receive
        self.tenant: str | None = None  # set by Security where API keys tell clients apart
        self.is_operator = False  # set by Security: whether it may also change what is under /internal
        self.key: Key | None = None  # set by Security: whose key came with it
        self.spell_error: SpellError | None = None  # set by Security: how the resource's API words an error
        super().__init__(scope, receive, *args, **kwargs)
        if "//" in self.path:  # clients put a base URL with a slash at its end before a path with one
            self.path = re.sub("/{2,}", "/", self.path).rstrip("/") or "/"

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A parameter of the query that is yes or no. Raises InvalidRequest for what is neither."""
        text = self.get_param(name)
        if text is not None and text.lower() not in _FLAGS:
            raise InvalidRequest(f"{name}: {text[:40]!r} is neither true nor false", param=name)
        return default if text is None else _FLAGS[text.lower()]


async def read_body(req: Request, limit: int) -> bytes:
    """The whole request body, unpacked. Raises PayloadTooLarge beyond ``limit`` bytes, packed or not, whether or not a
    length was announced, UnsupportedMediaType and InvalidRequest for a ``Content-Encoding``.

    The rest of an oversized body is left to uvicorn, which discards it: closing at once would reset the connection
    of a client that is still sending, and it would never see the answer.
    """
    encodings = encodings_of(req.get_header("Content-Encoding"))
    data = await _raw_body(req, limit)
    return await asyncio.to_thread(decode, data, encodings, limit) if encodings and data else data


async def _raw_body(req: Request, limit: int) -> bytes:
    length = req.content_length
    if length is not None:
        if length > limit:
            raise _too_large(limit)
        return await req.stream.readall()
    chunks: list[bytes] = []
    total = 0
    async for chunk in req.stream:
        total += len(chunk)
        if total > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the request body is larger than {limit} bytes, the limit set by --max-body-bytes")
