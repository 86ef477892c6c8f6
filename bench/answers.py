"""From packets to outcomes: HTTP bodies, server-sent events, and what both servers put into them.

All of it runs after the last byte arrived, on stored packets with their arrival times; nothing here does I/O.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Packet = tuple[int, bytes]  # arrival (monotonic ns), bytes


@dataclass(slots=True)
class RawCall:
    """One exchange as it came off the wire. ``error`` is set when it did not end in order."""

    started_ns: int
    packets: list[Packet] = field(default_factory=list)
    ended_ns: int = 0
    error: str | None = None


@dataclass(slots=True)
class Outcome:
    """One request as the client saw it. ``chunk_ns`` are the arrivals of the chunks that carry text."""

    started_ns: int
    ended_ns: int
    status: int = 0
    chunk_ns: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # llama-server's, of answers not streamed
    profile: dict[str, Any] | None = None  # mullama's, with X-Profile
    timings: dict[str, Any] | None = None  # llama-server's
    error: str | None = None

    @property
    def ttft_ms(self) -> float | None:
        return (self.chunk_ns[0] - self.started_ns) / 1e6 if self.chunk_ns else None

    @property
    def itl_ms(self) -> list[float]:
        return [(b - a) / 1e6 for a, b in itertools.pairwise(self.chunk_ns)]

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second from the second token on; None with fewer than three chunks."""
        if len(self.chunk_ns) < 3:
            return None
        return (self.completion_tokens - 1) / ((self.chunk_ns[-1] - self.chunk_ns[0]) / 1e9)


def headers_of(head: bytes) -> dict[str, str]:
    """Header fields of an answer's head, in lower case."""
    headers: dict[str, str] = {}
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return headers


def body_parts(packets: Sequence[Packet]) -> tuple[int, dict[str, str], list[Packet]]:
    """``(status, headers, parts)``: the body with the time at which each part was complete (HTTP chunks where chunked).

    Raises ValueError for bytes that are not an HTTP answer. A body cut short yields the parts that came.
    """
    buffer, status, chunked, in_body = b"", 0, False, False
    headers: dict[str, str] = {}
    parts: list[Packet] = []
    for arrived, data in packets:
        buffer += data
        if not in_body:
            head, blank, rest = buffer.partition(b"\r\n\r\n")
            if not blank:
                continue
            status_line = head.split(b"\r\n", 1)[0].split()
            if len(status_line) < 2 or not status_line[0].startswith(b"HTTP/") or not status_line[1].isdigit():
                raise ValueError(f"not an HTTP answer: {head[:80]!r}")
            status = int(status_line[1])
            headers = headers_of(head)
            chunked = "chunked" in headers.get("transfer-encoding", "")
            buffer, in_body = rest, True
        if not chunked:
            if buffer:
                parts.append((arrived, buffer))
            buffer = b""
            continue
        while (end := buffer.find(b"\r\n")) >= 0:
            size = int(buffer[:end].split(b";")[0], 16)
            if len(buffer) < end + 2 + size + 2:
                break
            if size:
                parts.append((arrived, buffer[end + 2 : end + 2 + size]))
            buffer = buffer[end + 2 + size + 2 :]
    return status, headers, parts


def sse_events(parts: Sequence[Packet]) -> Iterator[Packet]:
    """``(arrival, data)`` of every complete server-sent event; comments (pings) and other fields are skipped."""
    buffer = b""
    for arrived, data in parts:
        buffer += data.replace(b"\r\n", b"\n")
        while (end := buffer.find(b"\n\n")) >= 0:
            event, buffer = buffer[:end], buffer[end + 2 :]
            lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield arrived, b"\n".join(lines)


def parse(call: RawCall) -> Outcome:
    """The outcome of one exchange, whatever happened to it."""
    out = Outcome(call.started_ns, call.ended_ns, error=call.error)
    try:
        out.status, headers, parts = body_parts(call.packets)
        if headers.get("content-type", "").startswith("text/event-stream"):
            for arrived, data in sse_events(parts):
                if data != b"[DONE]":
                    _absorb(out, arrived, json.loads(data))
        elif parts:
            _absorb(out, parts[-1][0], json.loads(b"".join(data for _, data in parts)))
    except ValueError as error:
        out.error = out.error or f"malformed answer: {error}"
    if out.error is None and out.status != 200:
        out.error = f"status {out.status}" if out.status else "no answer"
    return out


def _absorb(out: Outcome, arrived: int, message: dict[str, Any]) -> None:
    """Take what one JSON object of either server says."""
    for choice in message.get("choices") or ():
        delta = choice.get("delta") or choice.get("message") or {}
        text = choice.get("text") or delta.get("content") or ""
        if text:
            out.chunk_ns.append(arrived)
            out.text += text
        out.finish_reason = choice.get("finish_reason") or out.finish_reason
        out.logprobs += (choice.get("logprobs") or {}).get("content") or []
    if usage := message.get("usage"):
        out.prompt_tokens = usage.get("prompt_tokens", 0)
        out.completion_tokens = usage.get("completion_tokens", 0)
        out.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    out.profile = message.get("profile") or out.profile
    out.timings = message.get("timings") or out.timings
    if problem := message.get("error"):
        out.error = str(problem.get("message") if isinstance(problem, dict) else problem)
