"""Talking to a running server: for the commands that show or change one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from mullama.errors import MullamaError

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
            raise RemoteError(f"no server answers at {self._url}: {error}; start one with: mullama serve") from None
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
