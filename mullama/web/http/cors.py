"""Web pages of other origins that may ask (``--cors-origin``): Falcon's middleware, with what mullama adds to it."""

from __future__ import annotations

import re
from typing import Any

import falcon
import falcon.asgi

from mullama.errors import ConfigError
from mullama.web.security import Access

#: Headers of our responses that a page may read, beyond those that it always may.
EXPOSED = (
    *("Retry-After", "WWW-Authenticate", "X-Context-Dropped", "X-Request-ID", "openai-processing-ms"),
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@,]+", re.IGNORECASE)


class Cors(falcon.CORSMiddleware):  # type: ignore[type-arg]
    """Falcon middleware: which origins may read the answers, and what preflights are told."""

    def __init__(self, origins: list[str]) -> None:
        """Raises ConfigError for what is no origin."""
        names = [origin.strip().rstrip("/").lower() for origin in origins]
        for name in names:
            if name not in ("*", "null") and not _ORIGIN.fullmatch(name):
                raise ConfigError(
                    f"--cors-origin: '{name}' is not an origin; it must look like https://chat.example.org",
                    param="cors_origin",
                )
        super().__init__(allow_origins="*" if "*" in names else names, expose_headers=EXPOSED)

    async def process_response_async(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, resource: object, req_succeeded: bool
    ) -> None:
        # SAFETY: where no key is asked for, any page could otherwise change the server that its visitor runs.
        if self.allow_origins == "*" and getattr(resource, "access", None) not in (Access.OPEN, Access.CLIENT, None):
            return
        if self.allow_origins != "*":
            resp.append_header("Vary", "Origin")  # a cache must not give one origin's answer to another
        await super().process_response_async(req, resp, resource, req_succeeded)


def middleware_of(origins: list[str]) -> list[Any]:
    """For ``create_app``: nothing where no origin is named."""
    return [Cors(origins)] if origins else []
