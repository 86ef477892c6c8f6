"""How a batch asks: its lines go through the app like any client's request, for the tenant whose batch it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from mullama.batches.batch_runner import Answer
from mullama.web.security import INSIDE
from mullama.web.services import Services

App = Callable[[dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class Asking:
    """Given to a ``BatchRunner``. Cancelling a question cancels its generation."""

    def __init__(self, app: Any, services: Services) -> None:
        self._app: App = app
        self._services = services

    async def __call__(self, tenant: str | None, endpoint: str, body: bytes) -> Answer:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": endpoint,
            "raw_path": endpoint.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
            "client": None,
            "server": None,
            INSIDE: (tenant,),
        }
        events: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
        ended = asyncio.Event()
        status, headers, found = 500, {}, bytearray()

        async def receive() -> dict[str, Any]:
            if events:
                return events.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(event: dict[str, Any]) -> None:
            nonlocal status, headers
            if event["type"] == "http.response.start":
                status = event["status"]
                headers = {bytes(name).lower(): bytes(value).decode("latin-1") for name, value in event["headers"]}
            elif event["type"] == "http.response.body":
                found.extend(event.get("body", b""))

        try:
            await self._app(scope, receive, send)
        finally:
            ended.set()
        retry = headers.get(b"retry-after", "")
        return Answer(status, bytes(found), headers.get(b"x-request-id", ""), float(retry) if retry.isdigit() else None)

    def has_room(self, n: int) -> bool:
        """Whether one more line may run beside ``n`` of them: somebody who asks now shall find a free slot."""
        n_others = max(0, self._services.n_open - n)
        n_slots = max((engine.info.n_parallel for _, engine in self._services.models.items()), default=1)
        return n + n_others < max(1, n_slots - 1)
