"""The id of each request, taken from its client or made here and given back; with ``--log-requests`` a line for each.

The line comes when the answer has ended, also that of a stream, and of a client that left: status 499, as nginx has it.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import falcon.asgi

from mullama.logs import facts
from mullama.types import FinishReason
from mullama.web.http.request import Receive, Request

if TYPE_CHECKING:
    from mullama.web.stream.generations import Group

log = logging.getLogger("mullama.requests")

Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

HEADER = "X-Request-ID"
LEFT = 499
_GROUP = "mullama.group"  # keys of the scope, which an app and what is around it share
_ID = "mullama.request_id"
#: What clients may call their requests: it goes into headers and logs. Another name is replaced.
_WELL_FORMED = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    """Falcon middleware; the first one, so that every answer has its id, also one that another middleware gives."""

    async def process_request(self, req: Request, resp: falcon.asgi.Response) -> None:
        given = req.get_header(HEADER)
        found = given if given is not None and _WELL_FORMED.fullmatch(given) else secrets.token_hex(16)
        req.scope[_ID] = found
        resp.set_header(HEADER, found)

    async def process_response(
        self, req: Request, resp: falcon.asgi.Response, resource: object, req_succeeded: bool
    ) -> None:
        """How long it took until the answer began, as OpenAI's servers say it."""
        resp.set_header("openai-processing-ms", str((time.monotonic_ns() - req.arrival_ns) // 1_000_000))


def note_group(req: Request, group: Group) -> None:
    """The request is answered by these generations."""
    req.scope[_GROUP] = group
    group.labels["request_id"] = req.scope.get(_ID)


class RequestLog:
    """An ASGI app around ``app`` that logs each of its requests."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = LEFT

        async def note(event: dict[str, Any]) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
            await send(event)

        try:
            await self._app(scope, receive, note)
        finally:
            self._log(scope, status, (time.monotonic() - began) * 1e3)

    def _log(self, scope: dict[str, Any], status: int, ms: float) -> None:
        group: Group | None = scope.get(_GROUP)
        if group is None:
            self._write(scope, status, ms, None)
        else:  # one that was cancelled has its numbers a step later
            group.when_ended(lambda: self._write(scope, status, ms, group))

    def _write(self, scope: dict[str, Any], status: int, ms: float, group: Group | None) -> None:
        client: Sequence[Any] = scope.get("client") or ()
        found: dict[str, Any] = {"id": scope.get(_ID), "status": status, "ms": round(ms, 1)}
        if group is not None:
            found |= {
                "model": group.model,
                "prompt_tokens": sum(group.prompt_lengths),
                "completion_tokens": sum(finish.profile.completion_tokens for finish in group.finishes),
                "finish": ",".join(dict.fromkeys(str(finish.reason) for finish in group.finishes)),
            }
            if group.disconnected and any(one.reason is FinishReason.CANCELLED for one in group.finishes):
                found["status"] = LEFT
        found["client"] = ":".join(map(str, client)) or None
        log.info("%s %s", scope["method"], scope["path"], extra=facts(**found))
