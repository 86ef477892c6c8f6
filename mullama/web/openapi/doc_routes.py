"""``GET /openapi.json``, and ``GET /docs``: a page that renders it, whole in itself."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import falcon
import falcon.asgi
import orjson

from mullama.web.http.request import Request
from mullama.web.openapi.document import Route, build
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access
from mullama.web.services import Services


class OpenApi:
    """The document holds nothing of this server but its version, so that everybody may read it."""

    access = Access.OPEN
    operations = {"GET": Operation("This document")}

    def __init__(self, routes: Sequence[Route], services: Services) -> None:
        self._routes = routes
        self._services = services

    @cached_property
    def _document(self) -> bytes:
        return orjson.dumps(build(self._routes))

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        resp.data = await self._services.offload(True, lambda: self._document, req)


class Docs:
    access = Access.OPEN
    operations = {"GET": Operation("This document as a page", answer=falcon.MEDIA_HTML)}

    def __init__(self) -> None:
        self._page = (Path(__file__).parent / "docs.html").read_bytes()
        script, style = (
            base64.b64encode(hashlib.sha256(found).digest()).decode()
            for tag in (b"script", b"style")
            for found in re.findall(b"<%b>(.*?)</%b>" % (tag, tag), self._page, re.DOTALL)
        )
        self._policy = (
            f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.set_header("Content-Security-Policy", self._policy)
        resp.data = self._page
