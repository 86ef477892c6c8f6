"""``POST /api/chat`` and ``/api/generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import falcon.asgi
import orjson

from mullama.engine.client import AnswerPart
from mullama.errors import MullamaError
from mullama.serving.durations import parse_duration
from mullama.serving.manager import ModelManager
from mullama.types import Finish
from mullama.web.chat.answer import Answer, Call
from mullama.web.http.request import Request
from mullama.web.ollama.ollama_bodies import (
    NAMES,
    GenerateBody,
    OllamaCall,
    OllamaChatBody,
    parse_chat_messages,
    parse_generate,
)
from mullama.web.openai.chat_completions import open_chat
from mullama.web.openai.completions import open_completion
from mullama.web.openai.opening import Opened, in_words_of
from mullama.web.openai.responding import deliver, wants_profile
from mullama.web.openai.schemas import ChatCall
from mullama.web.openai.usage import profile_fields
from mullama.web.openapi.answer_types import OllamaAnswer
from mullama.web.openapi.operation import PROFILE, Operation
from mullama.web.security import Access
from mullama.web.services import Services
from mullama.web.stream.event_stream import StreamFormat, event_json
from mullama.web.stream.generations import Reply

LINES = "application/x-ndjson"


def spell_error(status: int, error: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's error object as Ollama's clients parse it."""
    return {"error": error["message"]}


class OllamaRoute:
    """What the routes under ``/api`` share."""

    access = Access.CLIENT
    spell_error = staticmethod(spell_error)

    def __init__(self, services: Services) -> None:
        self._services = services


class Answers(OllamaRoute):
    """Both endpoints; ``is_chat`` says which, and where in an answer its text is."""

    def __init__(self, services: Services, *, is_chat: bool) -> None:
        super().__init__(services)
        self._is_chat = is_chat
        self._parse: Callable[[bytes, ModelManager], OllamaCall] = parse_chat_messages if is_chat else parse_generate
        self._name = "api.chat" if is_chat else "api.generate"
        body = OllamaChatBody if is_chat else GenerateBody
        does = "Answer a chat" if is_chat else "Answer a prompt"
        self.operations = {"POST": Operation(does, body, OllamaAnswer, streams=LINES, parameters=(PROFILE,))}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        with in_words_of(NAMES):
            asked = await services.parse(req, lambda data: self._parse(data, services.models))
            if asked.call is None:
                resp.data = await self._load(req, asked)
                resp.content_type = LINES if asked.streams else resp.content_type
                return
            if isinstance(asked.call, ChatCall):
                opened = await open_chat(services, req, asked.call, endpoint=self._name)
            else:
                opened = await open_completion(services, req, asked.call, endpoint=self._name)
        lines = AnswerLines(opened, is_chat=self._is_chat, with_profile=wants_profile(req))

        def whole(replies: list[Reply]) -> dict[str, Any]:
            (reply,) = replies
            return lines.last(reply.text, reply.finish, reply.answer)

        await deliver(
            req, resp, services, opened, streams=asked.streams, chunks=lambda: lines, whole=whole, media_type=LINES
        )

    async def _load(self, req: Request, asked: OllamaCall) -> bytes:
        """A request without a prompt loads its model, or with ``keep_alive`` 0 unloads it when it is idle."""
        seconds = None if asked.keep_alive is None else parse_duration(asked.keep_alive)
        if seconds != 0:
            (await self._services.lease(req, asked.model)).release()
        self._services.keep_alive(asked.model, seconds)
        done = {"done": True, "done_reason": "unload" if seconds == 0 else "load"}
        head = {"model": asked.model, "created_at": now()}
        return orjson.dumps(head | _text_of("", is_chat=self._is_chat) | done) + b"\n"


class AnswerLines(StreamFormat):
    """The lines of a streamed answer. A silent one stays silent: there is no line that says nothing."""

    ping = b""

    def __init__(self, opened: Opened, *, is_chat: bool, with_profile: bool) -> None:
        self._opened = opened
        self._is_chat = is_chat
        self._with_profile = with_profile
        self._n_calls = 0  # that have had their line
        self._common = {"model": opened.group.model, "created_at": now()}
        head = event_json(self._common)[:-1]
        around = (
            b',"message":{"role":"assistant","content":%b},"done":false}\n'
            if is_chat
            else (b',"response":%b,"done":false}\n')
        )
        before, after = around.split(b"%b")
        self._around = head + before, after

    def opening(self, index: int) -> bytes:
        return b""

    def text(self, index: int, text: str) -> bytes:
        return self._around[0] + event_json(text) + self._around[1]

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        return self._around

    def parts(self, index: int, parts: Sequence[AnswerPart]) -> bytes:
        """A line for each text; a call has one when all of it is there."""
        out = []
        for kind, at, text, _ in parts:
            if kind == "call":
                out.append(self._calls(at))
            elif kind != "arguments":
                said = _text_of(text, is_chat=self._is_chat) if kind == "content" else self._thought(text)
                out.append(self._line(said))
        return b"".join(out)

    def _thought(self, text: str) -> dict[str, Any]:
        found = _text_of("", is_chat=self._is_chat)
        (found["message"] if self._is_chat else found)["thinking"] = text
        return found

    def _calls(self, end: int) -> bytes:
        """The line of the calls before the one at ``end`` that had none yet."""
        answers = self._opened.group.answers
        calls = answers[0].calls[self._n_calls : end] if answers else []
        self._n_calls = end
        if not calls or not self._is_chat:
            return b""
        return self._line({"message": {"role": "assistant", "content": "", "tool_calls": _calls(calls)}})

    def _line(self, said: dict[str, Any]) -> bytes:
        return event_json({**self._common, **said, "done": False}) + b"\n"

    def finish(self, index: int, finish: Finish, ended: Sequence[Finish] | None, *, calls: bool = False) -> bytes:
        answers = self._opened.group.answers
        ended_calls = self._calls(len(answers[0].calls)) if answers else b""
        return ended_calls + event_json(self.last("", finish)) + b"\n"

    def last(self, text: str, finish: Finish, answer: Answer | None = None) -> dict[str, Any]:
        """The object that ends an answer, with its counts and times (nanoseconds); ``answer``: what was read in it."""
        profile = finish.profile
        said = _text_of(text if answer is None else answer.content, is_chat=self._is_chat)
        if answer is not None:
            inner = said["message"] if self._is_chat else said
            inner |= {"thinking": answer.reasoning} if answer.reasoning else {}
            inner |= {"tool_calls": _calls(answer.calls)} if answer.calls and self._is_chat else {}
        return {
            **self._common,
            **said,
            "done": True,
            "done_reason": str(finish.reason),
            "total_duration": _ns(profile.total_ms),
            "load_duration": self._opened.load_ns,
            "prompt_eval_count": profile.prompt_tokens,
            "prompt_eval_duration": _ns(profile.prefill_ms),
            "eval_count": profile.completion_tokens,
            "eval_duration": _ns(profile.decode_ms),
            **(profile_fields([finish]) if self._with_profile else {}),
        }

    def error(self, error: MullamaError) -> bytes:
        return event_json(spell_error(error.status, error.to_openai()["error"])) + b"\n"


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _text_of(text: str, *, is_chat: bool) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}} if is_chat else {"response": text}


def _calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [{"id": call.id, "function": {"name": call.name, "arguments": call.values()}} for call in calls]


def _ns(ms: float) -> int:
    return round(ms * 1e6)
