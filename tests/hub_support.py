"""Small local servers that speak the hubs' protocols: files with ranges and validators, a model hub, a registry.

They are as strict as the real ones where clients depend on it, and they lie on request.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Seen:
    """A request as it came."""

    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case


@dataclass
class Reply:
    """An answer. ``cut`` ends the connection after so many bytes of the body; ``length`` is what the header claims.

    A header without a value is left out.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    length: int | None = None
    pieces: int = 1  # the body is written in so many pieces


Route = Callable[[Seen], Reply | None]


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is part of many tests."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class LocalServer:
    """Answers with the first route that has an answer, else 404. ``with`` starts and stops it."""

    def __init__(self, *routes: Route) -> None:
        self.routes = list(routes)
        self.seen: list[Seen] = []
        self._lock = threading.Lock()
        self._server = _Quiet(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self, method: str = "GET") -> list[str]:
        """The paths asked for, without queries."""
        return [seen.path.partition("?")[0] for seen in self.seen if seen.method == method]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        local = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer()

            def do_HEAD(self) -> None:
                self._answer()

            def _answer(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                seen = Seen(self.command, self.path, headers)
                with local._lock:
                    local.seen.append(seen)
                answers = (route(seen) for route in local.routes)
                reply = next((answer for answer in answers if answer is not None), Reply(404, body=b"nothing here"))
                self.send_response(reply.status)
                length = len(reply.body) if reply.length is None else reply.length
                for name, value in {"Content-Length": str(length), **reply.headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                body = reply.body if reply.cut is None else reply.body[: reply.cut]
                step = max(1, -(-len(body) // reply.pieces))
                for start in range(0, len(body), step):
                    self.wfile.write(body[start : start + step])
                    self.wfile.flush()
                if len(body) != length:
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


def file_reply(seen: Seen, data: bytes, etag: str | None = None, *, last_modified: str | None = None) -> Reply:
    """A file as an honest server gives it: ranges, and If-Range by its strong validator."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if etag is not None:
        headers["ETag"] = etag
    if last_modified is not None:
        headers["Last-Modified"] = last_modified
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", seen.headers.get("range", ""))
    condition = seen.headers.get("if-range")
    if wanted is None or (condition is not None and condition not in (etag, last_modified)):
        return Reply(200, headers, data)
    first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
    if first >= len(data):
        return Reply(416, {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Reply(206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1])


def serve(path: str, data: bytes, etag: str | None = '"v1"', **options: Any) -> Route:
    """The route of one file."""
    return lambda seen: file_reply(seen, data, etag, **options) if seen.path.partition("?")[0] == path else None


class Hub:
    """A model hub as ``huggingface_hub`` knows it: the model's description, and files behind a redirect to storage."""

    def __init__(self, repository: str, files: Mapping[str, bytes], *, token: str | None = None) -> None:
        self.repository = repository
        self.files = dict(files)
        self.token = token
        self.is_gated = False
        self.limited = 0  # so many requests are answered 429
        self.cut: int | None = None  # the next download ends after so many bytes
        self.lies: dict[str, bytes] = {}  # what is sent instead of a file
        self.pieces = 1

    def __call__(self, seen: Seen) -> Reply | None:
        path = urllib.parse.unquote(seen.path.partition("?")[0])
        if path.startswith("/storage/"):
            return self._storage(seen, path.removeprefix("/storage/"))
        if self.limited > 0:
            self.limited -= 1
            return Reply(429, {"Retry-After": "7"}, b"slow down")
        api = re.fullmatch(rf"/api/models/{re.escape(self.repository)}(?:/revision/(.+))?", path)
        file = re.fullmatch(rf"/{re.escape(self.repository)}/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            return _refused(401 if path.startswith("/api/models/") else 404, "RepoNotFound")
        if self.token is not None and seen.headers.get("authorization") != f"Bearer {self.token}":
            return _refused(401, "RepoNotFound")
        if self.is_gated:
            return _refused(403, "GatedRepo")
        revision = (api or file)[1]  # type: ignore[index]
        if revision not in (None, "main", "v1", COMMIT):
            return _refused(404, "RevisionNotFound")
        if api:
            return Reply(200, {"Content-Type": "application/json"}, json.dumps(self._description()).encode())
        assert file is not None
        if file[2] not in self.files:
            return _refused(404, "EntryNotFound")
        data = self.files[file[2]]
        digest = hashlib.sha256(data).hexdigest()
        return Reply(
            302,
            {
                "Location": f"http://localhost:{seen.headers['host'].rpartition(':')[2]}/storage/{file[2]}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(data)),
                "X-Linked-Etag": f'"{digest}"',
                "ETag": f'"{digest}"',
            },
        )

    def _description(self) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(data).hexdigest(),
                "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134},
            }
            for name, data in self.files.items()
        ]
        return {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": siblings, "tags": []}

    def _storage(self, seen: Seen, name: str) -> Reply:
        data = self.lies.get(name, self.files[name])
        reply = file_reply(seen, data, f'"{hashlib.sha256(data).hexdigest()}"')
        reply.pieces = self.pieces
        if seen.method == "GET" and self.cut is not None:
            reply.cut, self.cut = self.cut, None
        return reply


def _refused(status: int, code: str) -> Reply:
    return Reply(status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}")


class Registry:
    """A registry as Ollama knows it: a manifest, blobs by digest behind a redirect, a token where one is wanted."""

    def __init__(self, name: str, tag: str, layers: Mapping[str, bytes], *, wants_token: bool = False) -> None:
        self.name = name
        self.tag = tag
        self.layers = dict(layers)
        self.wants_token = wants_token
        self.blob_host = ""  # where blobs redirect to; empty: here
        self.manifest: bytes | None = None  # instead of the right one
        self.digest_header: str | None = None
        self.spoiled: dict[str, bytes] = {}  # what is sent for a layer
        self.limited = 0
        self.cut: int | None = None
        self.pieces = 1
        self.url = ""

    @staticmethod
    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def right_manifest(self) -> bytes:
        layers = [
            {
                "mediaType": f"application/vnd.ollama.image.{kind}",
                "digest": f"sha256:{self.digest(data)}",
                "size": len(data),
            }
            for kind, data in self.layers.items()
        ]
        config = {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": "sha256:" + "0" * 64,
            "size": 2,
        }
        return json.dumps({"schemaVersion": 2, "config": config, "layers": layers}).encode()

    def __call__(self, seen: Seen) -> Reply | None:
        path, _, query = seen.path.partition("?")
        if path == "/token":
            fields = urllib.parse.parse_qs(query)
            assert fields == {"service": ["local"], "scope": [f"repository:{self.name}:pull"]}
            return Reply(200, {"Content-Type": "application/json"}, b'{"token": "good"}')
        if path.startswith("/cdn/"):
            return self._blob(seen, path.removeprefix("/cdn/"))
        if not path.startswith(f"/v2/{self.name}/"):
            return Reply(404, body=b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}')
        if self.limited > 0:
            self.limited -= 1
            return Reply(429, {"Retry-After": "3"})
        if self.wants_token and seen.headers.get("authorization") != "Bearer good":
            realm = f'Bearer realm="{self.url}/token",service="local",scope="repository:{self.name}:pull"'
            return Reply(401, {"WWW-Authenticate": realm})
        if path == f"/v2/{self.name}/manifests/{self.tag}":
            assert "application/vnd.docker.distribution.manifest.v2+json" in seen.headers["accept"]
            data = self.right_manifest() if self.manifest is None else self.manifest
            headers = {"Docker-Content-Digest": self.digest_header or f"sha256:{self.digest(data)}"}
            return Reply(200, headers, data)
        blob = re.fullmatch(rf"/v2/{re.escape(self.name)}/blobs/sha256:([0-9a-f]{{64}})", path)
        return Reply(307, {"Location": f"{self.blob_host}/cdn/{blob[1]}?signature=1"}) if blob else None

    def _blob(self, seen: Seen, digest: str) -> Reply | None:
        for data in self.layers.values():
            if self.digest(data) == digest:
                reply = file_reply(seen, self.spoiled.get(digest, data), f'"{digest}"')
                reply.pieces = self.pieces
                if self.cut is not None and len(data) > self.cut:
                    reply.cut, self.cut = self.cut, None
                return reply
        return None


def split_tiny(folder: Path, stem: str, tensors_a_file: int = 8) -> list[Path]:
    """The tiny model of tests/tiny.py as a split GGUF, by the writer of llama.cpp's own package."""
    import tiny

    whole = tiny._writer.GGUFWriter

    class Splitting(whole):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, split_max_tensors=tensors_a_file, **kwargs)

    # The writer itself reads constants of the class by its name, so a subclass stands in for it.
    tiny._writer.GGUFWriter = Splitting
    try:
        tiny.build(folder / f"{stem}.gguf")
    finally:
        tiny._writer.GGUFWriter = whole
    return sorted(folder.glob(f"{stem}-*-of-*.gguf"))
