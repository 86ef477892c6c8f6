"""``POST /completion``, llama-server's own: a text goes on, and the answer says how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import falcon.asgi

from mullama.errors import MullamaError
from mullama.types import Finish, FinishReason
from mullama.web.http.request import Request
from mullama.web.openai.completions import open_completion
from mullama.web.openai.opening import Opened
from mullama.web.openai.responding import deliver, wants_profile
from mullama.web.openai.schemas import CompletionBody, parse_completion
from mullama.web.openai.usage import profile_fields, timings
from mullama.web.openapi.operation import PROFILE, Operation
from mullama.web.security import Access
from mullama.web.services import Services
from mullama.web.stream.event_stream import EVENTS, StreamFormat, event_json
from mullama.web.stream.generations import Reply


class LlamaCompletion:
    access = Access.CLIENT
    operations = {
        "POST": Operation(
            "Continue a text, as llama-server does", body=CompletionBody, streams=EVENTS, parameters=(PROFILE,)
        )
    }

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        call = await services.parse(req, partial(parse_completion, models=services.models))
        call.body.echo = True  # the answer has the prompt, in a member of its own
        opened = await open_completion(services, req, call, endpoint="completion")
        pieces = CompletionPieces(opened, with_profile=wants_profile(req))

        def whole(replies: list[Reply]) -> Any:
            answers = [pieces.last(i, reply.text, reply.finish) for i, reply in enumerate(replies)]
            return answers[0] if len(answers) == 1 else answers

        await deliver(req, resp, services, opened, streams=opened.options.stream, chunks=lambda: pieces, whole=whole)


class CompletionPieces(StreamFormat):
    def __init__(self, opened: Opened, *, with_profile: bool) -> None:
        self._opened = opened
        self._with_profile = with_profile

    def opening(self, index: int) -> bytes:
        return b""

    def text(self, index: int, text: str) -> bytes:
        head, tail = self.around_text(index)
        return head + event_json(text) + tail

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        return b'data: {"index":%d,"tokens":[],"stop":false,"id_slot":-1,"content":' % index, b"}\n\n"

    def finish(self, index: int, finish: Finish, ended: Sequence[Finish] | None, *, calls: bool = False) -> bytes:
        return b"data: " + event_json(self.last(index, "", finish)) + b"\n\n"

    def last(self, index: int, text: str, finish: Finish) -> dict[str, Any]:
        """The object that ends an answer. Which slot it had is not told: it may have had several."""
        opened, profile = self._opened, finish.profile
        word = finish.stop_string
        kinds = {FinishReason.STOP: "eos" if word is None else "word", FinishReason.LENGTH: "limit"}
        settings = asdict(opened.options.sampling)
        return {
            "index": index,
            "content": text,
            "tokens": [],
            "id_slot": -1,
            "stop": True,
            "model": opened.group.model,
            "tokens_predicted": profile.completion_tokens,
            "tokens_evaluated": profile.prompt_tokens,
            "generation_settings": {**settings, "n_predict": settings["max_tokens"] or -1},
            "prompt": opened.echoes[index] if opened.echoes else "",
            "has_new_line": "\n" in text,
            "truncated": bool(profile.context_shifted) or any(opened.dropped),
            "stop_type": kinds.get(finish.reason, "none"),
            "stopping_word": word or "",
            "tokens_cached": profile.prompt_tokens + profile.completion_tokens,
            "timings": timings([finish]),
            **(profile_fields([finish]) if self._with_profile else {}),
        }

    def error(self, error: MullamaError) -> bytes:
        return b"data: " + event_json(error.to_openai()) + b"\n\n"
