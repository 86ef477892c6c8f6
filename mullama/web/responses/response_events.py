"""A response as an object and as events, in OpenAI's order: one ``ResponseWriter`` makes both, so they are equal."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from mullama.errors import MullamaError
from mullama.types import Finish, FinishReason
from mullama.web.openai.context_policy import context_member, shift_member
from mullama.web.openai.opening import Opened
from mullama.web.openai.usage import profile_fields, usage
from mullama.web.responses.response_bodies import ResponseBody
from mullama.web.stream.event_stream import StreamFormat, event_json

#: Events before the first text: created, in_progress; the item and its part.
N_HEAD, N_OPENING = 2, 2


class ResponseWriter:
    """The JSON object of one response, in each of its states."""

    def __init__(self, body: ResponseBody, opened: Opened, *, is_stored: bool, with_profile: bool) -> None:
        self.id = opened.group.id
        self.message_id = f"msg_{secrets.token_hex(16)}"
        self._opened = opened
        self._with_profile = with_profile
        sampling = opened.options.sampling
        self._same: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": opened.group.model,
            "instructions": body.instructions,
            "previous_response_id": body.previous_response_id,
            "background": bool(body.background),
            "store": is_stored,
            "metadata": body.metadata or {},
            "max_output_tokens": sampling.max_tokens,
            "max_tool_calls": body.max_tool_calls,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "top_logprobs": 0,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": None, "summary": None},
            "truncation": body.truncation or "disabled",
            "service_tier": "default",
            "prompt_cache_key": body.prompt_cache_key,
            "safety_identifier": body.safety_identifier,
            "user": body.user,
            **context_member(opened.dropped),
        }

    def begun(self, status: str = "in_progress") -> dict[str, Any]:
        return self._shown(status, [])

    def ended(self, text: str, finish: Finish) -> dict[str, Any]:
        """Completed, or incomplete where the tokens were used up."""
        is_cut = finish.reason is FinishReason.LENGTH
        status = "incomplete" if is_cut else "completed"
        counts = usage(self._opened.group.prompt_lengths, 1, [finish])
        more: dict[str, Any] = {
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
            **shift_member([finish.profile.context_shifted]),
            **(profile_fields([finish]) if self._with_profile else {}),
        }
        return self._shown(status, [self.message(text, status)]) | more

    def failed(self, error: MullamaError, *, is_cancelled: bool = False) -> dict[str, Any]:
        if is_cancelled:
            return self._shown("cancelled", [])
        code = "server_error" if error.status >= 500 else "invalid_prompt"  # two of the words that clients know
        return self._shown("failed", []) | {"error": {"code": code, "message": error.message}}

    def message(self, text: str | None, status: str) -> dict[str, Any]:
        """The item of the output; ``text`` None: nothing of it is there yet."""
        content = [] if text is None else [part(text)]
        return {"type": "message", "id": self.message_id, "role": "assistant", "status": status, "content": content}

    def _shown(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        is_over = status not in ("in_progress", "queued")
        return {
            **self._same,
            "status": status,
            "completed_at": int(time.time()) if is_over else None,
            "error": None,
            "incomplete_details": None,
            "output": output,
            "usage": None,
        }


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponseEvents(StreamFormat):
    """The events of a streamed response, each with the number that follows the one before it."""

    def __init__(self, writer: ResponseWriter, keep: Callable[[dict[str, Any]], None]) -> None:
        """``keep`` is given the response once it has ended."""
        self._writer = writer
        self._keep = keep
        self._texts: list[str] = []
        self._n_texts = 0
        begun = writer.begun()
        self.head = _event("response.created", 0, response=begun) + _event("response.in_progress", 1, response=begun)
        self._where = {"item_id": writer.message_id, "output_index": 0, "content_index": 0}
        start = event_json({"type": "response.output_text.delta", **self._where, "logprobs": []})
        self._around = b"event: response.output_text.delta\ndata: " + start[:-1] + b',"delta":', b"}\n\n"

    def opening(self, index: int) -> bytes:
        item = self._writer.message(None, "in_progress")
        added = _event("response.output_item.added", N_HEAD, output_index=0, item=item)
        return added + _event("response.content_part.added", N_HEAD + 1, **self._where, part=part(""))

    def text_json(self, text: str) -> bytes:
        self._texts.append(text)
        self._n_texts += 1
        return b'%b,"sequence_number":%d' % (event_json(text), N_HEAD + N_OPENING + self._n_texts - 1)

    def declined(self) -> None:
        self._texts.pop()
        self._n_texts -= 1

    def text(self, index: int, text: str) -> bytes:
        return self._around[0] + self.text_json(text) + self._around[1]

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        return self._around

    def finish(self, index: int, finish: Finish, ended: Sequence[Finish] | None, *, calls: bool = False) -> bytes:
        text = "".join(self._texts)
        response = self._writer.ended(text, finish)
        self._keep(response)
        n = N_HEAD + N_OPENING + self._n_texts
        done = _event("response.output_text.done", n, **self._where, text=text, logprobs=[])
        done += _event("response.content_part.done", n + 1, **self._where, part=part(text))
        done += _event("response.output_item.done", n + 2, output_index=0, item=response["output"][0])
        return done + _event(f"response.{response['status']}", n + 3, response=response)

    def error(self, error: MullamaError) -> bytes:
        n = N_HEAD + (N_OPENING + self._n_texts if self._n_texts else 0)
        return _event("response.failed", n, response=self._writer.failed(error))


def _event(kind: str, number: int, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), event_json({"type": kind, "sequence_number": number, **fields}))
