"""The chunks of a streamed chat or completion, as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mullama.engine.client import AnswerPart
from mullama.errors import MullamaError
from mullama.types import Finish, FinishReason, TokenScore
from mullama.web.openai.context_policy import shift_member
from mullama.web.openai.usage import usage
from mullama.web.stream.event_stream import StreamFormat, event_json
from mullama.web.stream.generations import Group
from mullama.web.stream.told_tokens import NOTHING, TokenWish, ended_by, width

DONE = b"data: [DONE]\n\n"


class ChunkFormat(StreamFormat):
    """The bytes of a stream's chunks; all that is constant is made once (PERF).

    ``echoes`` are the texts a completion repeats before its own, one a choice; None for a chat, whose choices open
    with the role. ``wish``: what is told of tokens. ``at_end`` makes further members of the last chunk that has any,
    ``only_first`` are those of the stream's first chunk, whatever that is.
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
        wish: TokenWish = NOTHING,
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
        self._wish = wish
        self._offsets = [0] * len(group.generations)  # where the next token begins in the text
        self._undo = 0, 0  # a choice, and its offset before its last text
        self.is_opening_late = wish.any_of_prompt
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._first_head = b"data: " + head[:-1] + _members(only_first or {}) + b',"choices":['
        self.is_first_special = self._first_head != self._head
        self._end = b'],"usage":null' if include_usage else b"]"
        body = b'{"index":%d,"delta":{"content":' if is_chat else b'{"index":%d,"text":'
        self._text_heads = [self._head + body % i for i in range(len(group.generations))]
        self._text_end = b"}" if is_chat else b""
        ending = b"" if wish.any_of_text else self._text_end + b',"logprobs":null'
        self._text_tail = ending + b',"finish_reason":null}' + self._end + b"}\n\n"
        self.token_json = self._token_json if wish.any_of_text else None

    def first(self, data: bytes) -> bytes:
        """The same chunks with the members that the stream's first one has beyond the others'."""
        return self._first_head + data.removeprefix(self._head)

    def text(self, index: int, text: str) -> bytes:
        return self._text_heads[index] + event_json(text) + self._text_tail

    def _token_json(self, index: int, text: str, tokens: Sequence[TokenScore]) -> bytes:
        if self._is_chat:
            told = self._wish.of_chat(tokens)
        else:
            told = self._wish.of_text(tokens, self._offsets[index])
            self._undo = index, self._offsets[index]
            self._offsets[index] += width(tokens)
        return event_json(text) + self._text_end + _members(told)

    def parts(self, index: int, parts: Sequence[AnswerPart]) -> bytes:
        """A chunk for each: clients put arguments together by the index of the call, and know its name by then."""
        return b"".join([self._delta(index, _delta(*part)) for part in parts])

    def _delta(self, index: int, delta: dict[str, Any]) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._head + event_json(choice) + self._end + b"}\n\n"

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        """What comes before and after a text's JSON."""
        return self._text_heads[index], self._text_tail

    def declined(self) -> None:
        index, offset = self._undo
        self._offsets[index] = offset

    def opening(self, index: int) -> bytes:
        """What comes before the first text of a choice: the role, or the echoed prompt; may be empty."""
        if self._is_chat:
            choice = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            return self._head + choice % index + self._end + self._about_prompt(index) + b"}\n\n"
        if not self._echoes and not self._wish.any_of_prompt:
            return b""
        told: dict[str, Any] = {"logprobs": None}
        if self._wish.echoes and self._wish.n_top is not None:
            scores = self._group.prompt_scores(index)
            told = self._wish.of_text((), 0, scores)
            self._offsets[index] = width(scores)
        echo = event_json(self._echoes[index] if self._echoes else "")
        end = self._about_prompt(index) + b',"finish_reason":null}' + self._end + b"}\n\n"
        return self._text_heads[index] + echo + _members(told) + end

    def _about_prompt(self, index: int) -> bytes:
        """Members about the prompt: of a chat's chunk, or of a completion's choice."""
        if not self._wish.any_of_prompt or (self._is_chat and index):
            return b""
        scores = self._group.prompt_scores(index) if self._wish.n_prompt is not None else []
        return _members(self._wish.of_prompt(scores, self._group.prompt_of(index)))

    def finish(self, index: int, finish: Finish, ended: Sequence[Finish] | None, *, calls: bool = False) -> bytes:
        """The chunk with the finish reason; after the last choice also the usage chunk and the end of the stream."""
        context, reason = shift_member([finish.profile.context_shifted]), reason_of(finish, calls=calls)
        if ended is None:
            return self._last(index, reason, finish, context)
        extra = self._at_end(ended)
        if not self._include_usage:
            return self._last(index, reason, finish, context | extra) + DONE
        counts = {"usage": usage(self._group.prompt_lengths, self._group.n, ended), **extra}
        return self._last(index, reason, finish, context) + self._head + b"]" + _members(counts) + b"}\n\n" + DONE

    def _last(self, index: int, reason: str, finish: Finish, extra: dict[str, Any]) -> bytes:
        """``extra`` are further members of the chunk."""
        text: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        choice = event_json({"index": index, **text, "logprobs": None, "finish_reason": reason, **ended_by(finish)})
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
