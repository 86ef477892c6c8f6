"""Talking to a running server: for the commands that show or change one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mullama.errors import MullamaError

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
        "--url", default=lambda: os.environ.get("MULLAMA_URL", DEFAULT_URL), help="The server.", metavar="URL"
    )
    return url(key(function))


class Server:
    """A server at ``url``. Every method raises RemoteError with one line."""

    def __init__(self, url: str, key: str = "") -> None:
        self._url = url.rstrip("/")
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
            with httpx.stream(
                "POST", self._url + path, json=body, headers=headers, timeout=None, trust_env=False
            ) as answer:
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

    def delete(self, path: str) -> dict[str, Any]:
        return self._ask("DELETE", path, {}, None)

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float | None = 30.0
    ) -> dict[str, Any]:
        import httpx

        try:
            answer = httpx.request(
                method, self._url + path, json=body, headers=self._headers, timeout=timeout_s, trust_env=False
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(error) from None
        return self._checked(answer)

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
