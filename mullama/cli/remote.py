"""Talking to a running server: for the commands that show or change one."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mullama.errors import MullamaError
from mullama.files import STDIO
from mullama.web.http.listening import unix_path

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8080"

F = TypeVar("F", bound=Callable[..., Any])


class RemoteError(MullamaError):
    """The server could not be reached, or refused; the message is its own."""

    code = "remote_error"


def server_options(function: F) -> F:
    """``--url`` and ``--key``."""
    key = click.option(
        "--key", default=lambda: os.environ.get("MULLAMA_ADMIN_KEY", ""), help="API or admin key.", metavar="KEY"
    )
    url = click.option(
        "--url",
        default=lambda: os.environ.get("MULLAMA_URL", DEFAULT_URL),
        help="The server: http://HOST:PORT, or unix:/PATH.",
        metavar="URL",
    )
    return url(key(function))


class Server:
    """A server at ``url``, which may be a Unix socket as ``serve --host`` has it (``unix:/path``).

    Every method raises RemoteError with one line.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self._socket = unix_path(url)
        self._url = url.rstrip("/")
        self._base = self._url if self._socket is None else "http://localhost"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str) -> dict[str, Any]:
        return self._ask("GET", path)

    def post(self, path: str, body: dict[str, Any], *, timeout_s: float | None = None) -> dict[str, Any]:
        return self._ask("POST", path, body, timeout_s)

    def watch(self, path: str, body: dict[str, Any], on_progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Start something that takes long; ``on_progress`` gets what is said of it meanwhile. Returns the end."""
        import httpx

        headers = {**self._headers, "Accept": "text/event-stream"}
        found: dict[str, Any] = {}
        try:
            with (
                self._client(None) as client,
                client.stream("POST", self._base + path, json=body, headers=headers) as answer,
            ):
                if not answer.headers.get("Content-Type", "").startswith("text/event-stream"):
                    answer.read()
                    return self._checked(answer)
                kind = ""
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "data":
                        found = json.loads(value)
                        if kind == "progress":
                            on_progress(found)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(error) from None
        except ValueError:
            raise RemoteError(f"{self._url} does not answer like a mullama server") from None
        if kind != "done":
            told = found.get("error") or {}
            raise RemoteError(str(told.get("message") or f"{self._url} stopped before it was done"))
        return found

    def upload(self, path: str, name: str, data: bytes, fields: dict[str, str]) -> dict[str, Any]:
        """Send a file as a form does."""
        return self._ask("POST", path, timeout_s=None, data=fields, files={"file": (name, data)})

    def download(self, path: str, to: Path) -> None:
        """Write what a path answers to a file, or to stdout; a file is whole or not there. Raises OSError too."""
        import httpx

        part = to.with_name(f".{to.name[:200]}.part")
        try:
            with (
                self._client(None) as client,
                client.stream("GET", self._base + path, headers=self._headers) as answer,
                contextlib.ExitStack() as stack,
            ):
                if answer.status_code >= 400:
                    answer.read()
                    self._checked(answer)
                file = sys.stdout.buffer if to == STDIO else stack.enter_context(part.open("wb"))
                for data in answer.iter_bytes():
                    file.write(data)
                file.flush()
            if to != STDIO:
                part.replace(to)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(error) from None
        finally:
            if to != STDIO:
                part.unlink(missing_ok=True)

    def delete(self, path: str) -> dict[str, Any]:
        return self._ask("DELETE", path, {}, None)

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float | None = 30.0,
        **form: Any,
    ) -> dict[str, Any]:
        """``form``: httpx's ``data`` and ``files``, instead of a body."""
        import httpx

        try:
            with self._client(timeout_s) as client:
                answer = client.request(method, self._base + path, json=body, headers=self._headers, **form)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(error) from None
        return self._checked(answer)

    def _client(self, timeout_s: float | None) -> httpx.Client:
        import httpx

        if self._socket == "":
            raise RemoteError(f"'{self._url}' names no socket; it must look like unix:/path")
        transport = None if self._socket is None else httpx.HTTPTransport(uds=self._socket)
        return httpx.Client(transport=transport, timeout=timeout_s, trust_env=False)

    def _silent(self, error: Exception) -> RemoteError:
        return RemoteError(f"no server answers at {self._url}: {error}; start one with: mullama serve")

    def _checked(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            found = answer.json()
        except ValueError:
            status = f"(status {answer.status_code})"
            raise RemoteError(f"{self._url} does not answer like a mullama server {status}") from None
        if answer.status_code >= 400:
            told = found.get("error", {}) if isinstance(found, dict) else {}
            raise RemoteError(str(told.get("message") or f"{self._url} answered with status {answer.status_code}"))
        if not isinstance(found, dict):
            raise RemoteError(f"{self._url} does not answer like a mullama server")
        return found
