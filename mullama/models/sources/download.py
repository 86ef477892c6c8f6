"""One file over HTTP into a folder: resumed where that is safe, checked against everything the server said.

What is trusted is only what agrees: a resumed range must be the range that was asked for, of a file with the same
validator (ETag, else Last-Modified) and the same length. Where something does not agree, the download starts again
from zero, once; then the server is named as what it is.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import httpx

from mullama.errors import ReferenceNotFound, StoreError
from mullama.faults import crash_point
from mullama.models.sources.net import check_url, shown

T = TypeVar("T")

#: Called with the bytes done, and in all (None: unknown).
PartProgress = Callable[[int, int | None], None]

MAX_REDIRECTS = 10
ATTEMPTS = 5  # in a row without a new byte
LONGEST_WAIT = 60.0  # seconds that a server may ask for in Retry-After
_BACKOFF = (0.5, 1.0, 2.0, 4.0)
_BLOCK = 1 << 20
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRIED = frozenset({408, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.IGNORECASE)


@dataclass(slots=True)
class _State:
    """What is known of the file on the server; kept beside the half file, so that another process can go on."""

    url: str
    etag: str | None = None
    last_modified: str | None = None
    total: int | None = None

    @property
    def validator(self) -> str | None:
        """What makes a range safe: a strong ETag, else the time of the last change."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


@dataclass(frozen=True, slots=True)
class Downloaded:
    path: Path
    size: int
    sha256: str
    etag: str | None
    last_modified: str | None


class _Restart(Exception):
    """What is on disk cannot be gone on with; the reason is in the message."""


class _Retry(Exception):
    """A failure that may pass; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def pause(seconds: float) -> None:
    """The wait before another attempt; replaced in tests."""
    time.sleep(seconds)


class Fetcher:
    """Requests of one source: redirects, retries, who may be asked and who gets which header.

    ``headers`` are sent to ``origin`` (scheme, host, port) alone; a redirect elsewhere carries none of them.
    """

    def __init__(
        self,
        client: httpx.Client,
        *,
        allow_private: bool,
        trusted: frozenset[tuple[str, int]] = frozenset(),
        authorize: Callable[[httpx.Response], dict[str, str] | None] | None = None,
    ) -> None:
        self._client = client
        self._allow_private = allow_private
        self._trusted = trusted
        self._authorize = authorize  # answers a 401 with headers to try, or None
        self.headers: dict[str, str] = {}

    def open(self, url: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """The response to a GET behind all redirects, its body unread; the caller closes it.

        Raises StoreError (a private address, too many redirects), httpx.TransportError.
        """
        try:
            current = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise StoreError(f"'{url[:120]}' is not an address: {error}") from None
        origin, has_authorized = _origin(current), False
        for _ in range(MAX_REDIRECTS + 1):
            check_url(current, allow_private=self._allow_private, trusted=self._trusted)
            own = self.headers if _origin(current) == origin else {}
            request = self._client.build_request("GET", current, headers={**(headers or {}), **own})
            response = self._client.send(request, stream=True)
            if response.status_code in _REDIRECTS and "location" in response.headers:
                response.close()
                try:
                    current = current.join(response.headers["location"])
                except httpx.InvalidURL as error:
                    raise StoreError(f"{shown(current)} redirects to what is not an address: {error}") from None
                continue
            # SAFETY: only the registry's own word for it opens the token dance, never that of a redirect's target.
            if response.status_code == 401 and self._authorize and not has_authorized and _origin(current) == origin:
                has_authorized = True
                found = self._authorize(response)
                response.close()
                if found is not None:
                    self.headers.update(found)
                    continue
            return response
        raise StoreError(f"{shown(httpx.URL(url))} redirects more than {MAX_REDIRECTS} times")

    def get(self, url: str, headers: Mapping[str, str] | None = None, *, what: str, limit: int) -> httpx.Response:
        """A small answer, read whole. Raises ReferenceNotFound (404), StoreError (any other failure, or it is longer
        than ``limit`` bytes)."""

        def once() -> httpx.Response:
            response = self.open(url, headers)
            try:
                raise_for_status(response, what)
                data = bytearray()
                for block in response.iter_raw():
                    data += block
                    if len(data) > limit:
                        raise StoreError(f"cannot fetch {what}: the answer is longer than {limit} bytes")
                return httpx.Response(response.status_code, headers=response.headers, content=bytes(data))
            finally:
                response.close()

        return retrying(once, what)

    def download(
        self,
        url: str,
        target: Path,
        *,
        what: str,
        progress: PartProgress,
        check_space: Callable[[int], None] | None = None,
        sha256: str | None = None,
        size: int | None = None,
    ) -> Downloaded:
        """Fetch a file into ``target``, by way of ``target``.part, where a later call goes on after a failure.

        ``size`` and ``sha256`` are what it must have, where that is known. Raises ReferenceNotFound, StoreError.
        """
        return _Download(self, url, target, what, progress, check_space, sha256, size).run()


class _Download:
    def __init__(
        self,
        fetcher: Fetcher,
        url: str,
        target: Path,
        what: str,
        progress: PartProgress,
        check_space: Callable[[int], None] | None,
        sha256: str | None,
        size: int | None,
    ) -> None:
        self.fetcher = fetcher
        self.url = url
        self.target = target
        self.what = what
        self.progress = progress
        self.check_space = check_space
        self.sha256 = sha256
        self.size = size
        self.part = target.with_name(target.name + ".part")
        self.state_file = target.with_name(target.name + ".state")
        self.state = self._read_state()
        self.hash = hashlib.sha256()
        self.done = 0
        self.restarts = 0
        self._take_up()

    def run(self) -> Downloaded:
        while True:
            try:
                retrying(self._attempt, self.what, lambda: self.done)
                digest = self.hash.hexdigest()
                if self.sha256 is not None and digest != self.sha256:
                    raise _Restart(f"its sha256 is {digest}, expected {self.sha256}")
                break
            except _Restart as reason:
                # The second time it is no accident.
                if self.restarts:
                    self._forget()
                    raise StoreError(f"cannot download {self.what}: {reason}; nothing was kept") from None
                self.restarts += 1
                self._start_over()
        self.part.replace(self.target)
        self.state_file.unlink(missing_ok=True)
        return Downloaded(self.target, self.done, self.hash.hexdigest(), self.state.etag, self.state.last_modified)

    def _attempt(self) -> None:
        """One request, up to the end of the file. Raises _Retry, _Restart, StoreError, httpx.TransportError."""
        if self.done and self.done == self._total():
            return
        headers = {}
        # A half file is gone on with if a change on the server would be seen: by the validator, or by the digest.
        if self.done and (self.state.validator or self.sha256):
            headers["Range"] = f"bytes={self.done}-"
            if self.state.validator:
                headers["If-Range"] = self.state.validator
        elif self.done:
            self._start_over()
        response = self.fetcher.open(self.url, headers)
        try:
            if response.status_code == 416:
                raise _Restart(f"the server has no byte {self.done} of it")
            raise_for_status(response, self.what)
            if response.status_code == 206 and not headers:
                raise _Restart("the server sends a range where the whole file was asked for")
            if response.status_code == 206:
                self._check_range(response)
            else:
                self._start_over(_State(
                    self.url, response.headers.get("etag"), response.headers.get("last-modified"), _length(response),
                ))  # fmt: skip
            if self.size is not None and self.state.total not in (None, self.size):
                raise _Restart(f"it has {self.state.total} bytes, expected {self.size}")
            self._write_state()
            total = self._total()
            if total is not None and self.check_space is not None:
                self.check_space(total - self.done)
            with self.part.open("ab") as file:
                self._copy(response, file)
        finally:
            response.close()

    def _copy(self, response: httpx.Response, file: BinaryIO) -> None:
        total = self._total()
        self.progress(self.done, total)
        try:
            for block in response.iter_raw():
                if total is not None and self.done + len(block) > total:
                    raise _Restart(f"the server sends more than the {total} bytes it has")
                file.write(block)
                self.hash.update(block)
                self.done += len(block)
                self.progress(self.done, total)
                crash_point("pull:in-download")
        finally:
            file.flush()
            os.fsync(file.fileno())
        if total is not None and self.done < total:
            raise _Retry(f"the connection ended after {self.done} of {total} bytes")

    def _check_range(self, response: httpx.Response) -> None:
        """That the answer is the range that was asked for, of the same file. Raises _Restart."""
        text = response.headers.get("content-range", "")
        match = _CONTENT_RANGE.fullmatch(text.strip())
        if match is None:
            raise _Restart(f"the server sends a range and does not say which ('{text[:80]}')")
        first, last = int(match[1]), int(match[2])
        total = None if match[3] == "*" else int(match[3])
        if first != self.done or last < first or (total is not None and last != total - 1):
            raise _Restart(f"the server sends the range {first}-{last} where {self.done}- was asked for")
        known = self._total()
        if total is not None and known is not None and total != known:
            raise _Restart(f"its length changed from {known} to {total}")
        length = _length(response)
        if length is not None and length != last - first + 1:
            raise _Restart("the server's range and its length do not agree")
        etag = response.headers.get("etag")
        if etag is not None and self.state.etag is not None and etag != self.state.etag:
            raise _Restart("it changed on the server")
        self.state.total = total if self.state.total is None else self.state.total

    def _total(self) -> int | None:
        return self.state.total if self.state.total is not None else self.size

    # -- what is on disk

    def _take_up(self) -> None:
        """Hash what an earlier attempt left."""
        try:
            if self.state.url != self.url:
                raise FileNotFoundError
            with self.part.open("rb") as file:
                while block := file.read(_BLOCK):
                    self.hash.update(block)
                    self.done += len(block)
        except FileNotFoundError:
            self._start_over()

    def _start_over(self, state: _State | None = None) -> None:
        self.state = state or _State(self.url)
        self.hash = hashlib.sha256()
        self.done = 0
        self.part.unlink(missing_ok=True)
        self.state_file.unlink(missing_ok=True)

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.state_file.unlink(missing_ok=True)

    def _read_state(self) -> _State:
        try:
            return _State(**json.loads(self.state_file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return _State("")

    def _write_state(self) -> None:
        self.state_file.write_text(json.dumps(asdict(self.state)), encoding="utf-8")


def retrying(action: Callable[[], T], what: str, progress: Callable[[], int] = lambda: 0) -> T:
    """Call ``action`` until it succeeds; failures that may pass are repeated with growing pauses.

    The count starts again whenever ``progress()`` has grown. Raises StoreError when it does not get better.
    """
    failures, before = 0, progress()
    while True:
        try:
            return action()
        except (httpx.TransportError, _Retry) as error:
            now = progress()
            failures = 1 if now > before else failures + 1
            before = now
            reason = str(error) or type(error).__name__
            wait = getattr(error, "wait", None)
            if failures >= ATTEMPTS:
                raise StoreError(f"cannot download {what}: {reason}") from None
            if wait is not None and wait > LONGEST_WAIT:
                raise StoreError(
                    f"cannot download {what}: {reason}; it asks to come back in {wait:.0f} seconds"
                ) from None
            pause(wait if wait is not None else _BACKOFF[min(failures, len(_BACKOFF)) - 1])


def raise_for_status(response: httpx.Response, what: str) -> None:
    """Nothing for a 2xx. Raises ReferenceNotFound, StoreError, or _Retry for what may pass."""
    status = response.status_code
    if 200 <= status < 300:
        return
    host = response.request.url.host
    if status in (404, 410):
        raise ReferenceNotFound(f"{host} has no {what} (HTTP {status})")
    if status in (401, 403):
        raise StoreError(f"{host} does not give {what} to you (HTTP {status}); it may be private or need a licence")
    if status == 429:
        raise _Retry(f"{host} limits how much you may fetch (HTTP 429)", _retry_after(response))
    if status in _RETRIED:
        raise _Retry(f"{host} answers HTTP {status}", _retry_after(response))
    raise StoreError(f"cannot fetch {what}: {host} answers HTTP {status}")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, from either form of the header."""
    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _length(response: httpx.Response) -> int | None:
    """The bytes of the body as announced; None where there is no telling."""
    text = response.headers.get("content-length", "")
    if response.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise StoreError("the server compresses a file where it was asked not to")
    return int(text) if re.fullmatch(r"\d{1,19}", text) else None


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host.lower(), url.port or (443 if url.scheme == "https" else 80)
