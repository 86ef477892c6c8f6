"""The chunks of a streamed chat or completion, as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mullama.engine.client import AnswerPart
from mullama.errors import MullamaError
from mullama.types import Finish, FinishReason
from mullama.web.openai.context_policy import shift_member
from mullama.web.openai.usage import usage
from mullama.web.stream.event_stream import StreamFormat, event_json
from mullama.web.stream.generations import Group

DONE = b"data: [DONE]\n\n"


class ChunkFormat(StreamFormat):
    """The bytes of a stream's chunks; all that is constant is made once (PERF).

    ``echoes`` are the texts a completion repeats before its own, one a choice; None for a chat, whose choices open
    with the role. ``at_end`` makes further members of the last chunk that has any, ``only_first`` are those of the
    stream's first chunk, whatever that is.
    """

    def __init__(
        self,
        group: Group,
        *,
        created: int,
        is_chat: bool,
        include_usage: bool,
        at_end: Callable[[Sequence[Finish]], dict[str, Any]] = lambda finishes: {},
        echoes: Sequence[str] | None = None,
        only_first: dict[str, Any] | None = None,
    ) -> None:
        self._group = group
        self._include_usage = include_usage
        self._at_end = at_end
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        members = {"id": group.id, "object": kind, "created": created, "model": group.model}
        head = event_json(members | {"system_fingerprint": group.fingerprint})
        self._is_chat = is_chat
        self._echoes = echoes
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._first_head = b"data: " + head[:-1] + _members(only_first or {}) + b',"choices":['
        self.is_first_special = self._first_head != self._head
        self._end = b'],"usage":null' if include_usage else b"]"
        body = b'{"index":%d,"delta":{"content":' if is_chat else b'{"index":%d,"text":'
        self._text_heads = [self._head + body % i for i in range(len(group.generations))]
        ending = b'},"logprobs":null,"finish_reason":null}' if is_chat else b',"logprobs":null,"finish_reason":null}'
        self._text_tail = ending + self._end + b"}\n\n"

    def first(self, data: bytes) -> bytes:
        """The same chunks with the members that the stream's first one has beyond the others'."""
        return self._first_head + data.removeprefix(self._head)

    def text(self, index: int, text: str) -> bytes:
        return self._text_heads[index] + event_json(text) + self._text_tail

    def parts(self, index: int, parts: Sequence[AnswerPart]) -> bytes:
        """A chunk for each: clients put arguments together by the index of the call, and know its name by then."""
        return b"".join([self._delta(index, _delta(*part)) for part in parts])

    def _delta(self, index: int, delta: dict[str, Any]) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._head + event_json(choice) + self._end + b"}\n\n"

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        """What comes before and after a text's JSON."""
        return self._text_heads[index], self._text_tail

    def opening(self, index: int) -> bytes:
        """What comes before the first text of a choice: the role, or the echoed prompt; may be empty."""
        if self._is_chat:
            choice = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            return self._head + choice % index + self._end + b"}\n\n"
        return self.text(index, self._echoes[index]) if self._echoes else b""

    def finish(self, index: int, finish: Finish, ended: Sequence[Finish] | None, *, calls: bool = False) -> bytes:
        """The chunk with the finish reason; after the last choice also the usage chunk and the end of the stream."""
        context, reason = shift_member([finish.profile.context_shifted]), reason_of(finish, calls=calls)
        if ended is None:
            return self._last(index, reason, context)
        extra = self._at_end(ended)
        if not self._include_usage:
            return self._last(index, reason, context | extra) + DONE
        counts = {"usage": usage(self._group.prompt_lengths, self._group.n, ended), **extra}
        return self._last(index, reason, context) + self._head + b"]" + _members(counts) + b"}\n\n" + DONE

    def _last(self, index: int, reason: str, extra: dict[str, Any]) -> bytes:
        """``extra`` are further members of the chunk."""
        text: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        choice = event_json({"index": index, **text, "logprobs": None, "finish_reason": reason})
        return self._head + choice + self._end + _members(extra) + b"}\n\n"

    def error(self, error: MullamaError) -> bytes:
        return b"data: " + event_json(error.to_openai()) + b"\n\n"


def reason_of(finish: Finish, *, calls: bool) -> str:
    """OpenAI's word for why a choice ended; ``calls``: it has called functions."""
    return "tool_calls" if calls and finish.reason is FinishReason.STOP else str(finish.reason)


def _delta(kind: str, index: int, text: str, call_id: str) -> dict[str, Any]:
    """What is new in an answer as a delta."""
    if kind == "content":
        return {"content": text}
    if kind == "reasoning":
        return {"reasoning_content": text, "reasoning": text}
    if kind == "call":
        function = {"name": text, "arguments": ""}
        return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _members(extra: dict[str, Any]) -> bytes:
    """Further members of an open JSON object."""
    return b"," + event_json(extra)[1:-1] if extra else b""
