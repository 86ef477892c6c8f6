"""Requests to an app with a fake engine: no 5xx, an error object for what is refused, and then nothing is changed.

An input is ``METHOD PATH?QUERY``, lines of headers, an empty line, the body.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
import tempfile
from contextlib import ExitStack
from typing import Any
from unittest import mock
from urllib.parse import quote

import falcon.testing
from mutating import GENERATION, VALID, changed, error_of, mutant
from web.conftest import Client, Result
from web.test_mutated import Whole, state_of

from mullama.config import ServeConfig
from mullama.errors import ModelNotFound
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.services import Services

METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
#: Answered without end, or by other machines.
LEFT_OUT = ("pull", "events")


class OneLoop(Client):
    """All requests on one event loop."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.loop = asyncio.new_event_loop()

    def send(self, scope: dict[str, Any], data: bytes) -> Result:
        return self.loop.run_until_complete(self._call(scope, data))


class Target:
    words = sorted({name.encode() for name in GENERATION} | {path.encode() for _, path, _, _ in VALID})

    def __init__(self) -> None:
        self._undo = ExitStack()
        logging.disable(logging.WARNING)
        self._undo.callback(logging.disable, logging.NOTSET)
        home = self._undo.enter_context(tempfile.TemporaryDirectory())
        self._undo.enter_context(mock.patch.dict(os.environ, {"MULLAMA_HOME": home}))
        self._undo.enter_context(mock.patch.object(socket, "getaddrinfo", _nobody))
        engine = Whole()
        engine.reply = ["a"]
        config = ServeConfig(max_body_bytes=1 << 20, store_models=False)
        models = ModelManager([("fake", engine)])
        models.idle._watch = _no_watch  # type: ignore[method-assign]
        self._services = Services(config, models)
        self._services.swaps._find = _find_nothing
        self._client = OneLoop(create_app(config, models, self._services), self._services)

    def __call__(self, data: bytes) -> None:
        head, _, body = data.partition(b"\n\n")
        first, *lines = head.decode("latin-1").split("\n")
        method, _, target = first.partition(" ")
        path, _, query = target.partition("?")
        if method not in METHODS or not path.startswith("/") or any(word in path for word in LEFT_OUT):
            return
        headers = {"Host": "127.0.0.1:8080", "Content-Type": "application/json", "Content-Length": str(len(body))}
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.strip().title(), value.strip()
            if name.replace("-", "").isascii() and name.replace("-", "").isalnum() and name != "Content-Length":
                if not (value.isascii() and value.isprintable()):
                    return
                headers[name] = value
        scope = falcon.testing.create_scope(
            path=quote(path, safe="/%;"), method=method, headers=headers, query_string=quote(query, safe="=&%+,;:/"),
            include_server=False,
        )  # fmt: skip
        scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in headers.items() if value]
        engine: Any = self._services.models.get("fake").engine
        engine.requests.clear()
        engine.generations.clear()
        engine.prepared.clear()
        before = state_of(self._client)
        result = self._client.send(scope, body)
        told = f"{result.status} {result.body[:300]!r}"
        if result.status >= 400 and result.body and method != "HEAD":
            message, code = error_of(result.body)
            assert message, told
            assert method == "GET" or state_of(self._client) == before, told
            if (result.status, code) == (503, "queue_full") or result.status == 501:  # 501: a route that is not built
                return
        assert result.status < 500, told

    def change(self, rng: random.Random, data: bytes) -> bytes:
        """Another request that is nearly right, or this one with its JSON changed."""
        head, _, body = data.partition(b"\n\n")
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if value is None or rng.random() < 0.3:
            one = mutant(rng, "fake")
            lines = "".join(f"\n{name}: {value}" for name, value in one.headers.items())
            target = f"{one.path}?{one.query}" if one.query else one.path
            return f"{one.method} {target}{lines}".encode("utf-8", "replace") + b"\n\n" + (one.body or b"")
        return head + b"\n\n" + json.dumps(changed(rng, value)).encode()

    def close(self) -> None:
        self._services.close()
        self._client.loop.close()
        self._undo.close()


async def _no_watch() -> None:
    """What watches idle models is no part of a request."""


def _nobody(*args: Any, **kwargs: Any) -> Any:
    raise OSError("there is no network here")


def _find_nothing(to: str, *rest: Any) -> Any:
    raise ModelNotFound(f"there is no model '{to[:40]}'")
