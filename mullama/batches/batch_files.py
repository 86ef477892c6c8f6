"""A batch: its states, its lines, and what of it stands on disk.

    validating -> in_progress -> finalizing -> completed
    validating -> failed;  in_progress -> cancelling -> cancelled;  in_progress -> expired

Beside its own file a batch has two that grow line by line, the answers and the errors. They are its journal: what they
hold is done, whatever became of the server meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

MAX_LINES = 50_000
MAX_ERRORS = 20  # of a file that are told
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
UNFINISHED = frozenset(("validating", "in_progress", "finalizing", "cancelling"))
_TIMES = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class Batch(msgspec.Struct, kw_only=True):
    id: str
    tenant: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    times: dict[str, int] = msgspec.field(default_factory=dict)  # when it came into a state
    errors: list[dict[str, Any]] = msgspec.field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0

    def move(self, status: Status) -> None:
        self.status = status
        self.times[status] = int(time.time())

    def shown(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        times = {f"{name}_at": self.times.get(name) for name in _TIMES}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            **times,
            "expires_at": self.expires_at,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }


class Line(msgspec.Struct):
    """A request of a batch's file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    stream: bool | None = None


class _Done(msgspec.Struct):
    custom_id: str


_line = msgspec.json.Decoder(Line)
_body = msgspec.json.Decoder(_Body)
_done = msgspec.json.Decoder(_Done)


def read_line(data: bytes) -> Line:
    """Raises msgspec.MsgspecError, UnicodeDecodeError."""
    return _line.decode(data)


def check_lines(path: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """How many requests a file has, and what is wrong with it. Raises OSError."""
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    n = number = 0

    def wrong(code: str, message: str, param: str | None = None) -> None:
        if len(errors) < MAX_ERRORS:
            errors.append({"code": code, "message": message, "param": param, "line": number})

    with path.open("rb") as file:
        for data in file:
            number += 1
            if not data.strip():
                continue
            n += 1
            if n > MAX_LINES:
                wrong("too_many_requests", f"a batch has at most {MAX_LINES} requests")
                break
            try:
                line = read_line(data)
                body = _body.decode(line.body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                wrong("invalid_json_line", f"this line is no request: {error}")
                continue
            if line.custom_id in seen:
                wrong("duplicate_custom_id", f"'{line.custom_id[:80]}' is the custom_id of another line", "custom_id")
            if line.method != "POST":
                wrong("invalid_method", "the method must be POST", "method")
            if line.url != endpoint:
                wrong("mismatched_endpoint", f"the url must be the batch's endpoint, {endpoint}", "url")
            if body.stream:
                wrong("invalid_request", "an answer of a batch cannot be streamed", "body.stream")
            seen.add(line.custom_id)
    if not n:
        wrong("empty_file", "the file has no requests")
    return n, errors


def finished_lines(path: Path) -> Iterator[str]:
    """The ids of what a file of answers holds; a last line that was cut is taken off. Raises OSError."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = 0
        for data in file:
            if not data.endswith(b"\n"):
                file.truncate(end)
                return
            end += len(data)
            yield _done.decode(data).custom_id
