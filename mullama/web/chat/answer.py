"""One answer to a chat, read as it comes: thoughts, content and calls, for every API.

A streamed answer and a whole one are read by the same object, so they say the same.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from mullama.engine.client import AnswerParser, AnswerPart

#: An answer whose next piece may make the parser read so many bytes again is read in a thread.
LARGE_ANSWER = 8_000


@dataclass(slots=True)
class Call:
    """A call of a function."""

    id: str
    name: str
    arguments: str = ""

    def values(self) -> dict[str, Any]:
        """The arguments; none where the answer was cut within them."""
        try:
            found = orjson.loads(self.arguments)
        except orjson.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}

    def to_openai(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(slots=True)
class Answer:
    """What has been read of an answer so far. ``shows_thoughts``: whether the client wants them."""

    parser: AnswerParser
    shows_thoughts: bool = True
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    async def read(self, text: str | None) -> list[AnswerPart]:
        """What is new with the next piece of text; None: the answer has ended. A call always has an id."""
        work: Callable[[], Any] = self.parser.finish if text is None else lambda: self.parser.feed(text)
        is_large = self.parser.size + len(text or "") > LARGE_ANSWER
        return self._take(await asyncio.to_thread(work) if is_large else work())

    def _take(self, parts: list[AnswerPart]) -> list[AnswerPart]:
        taken: list[AnswerPart] = []
        for kind, index, text, call_id in parts:
            if kind == "content":
                self.content += text
            elif kind == "reasoning":
                if not self.shows_thoughts:
                    continue
                self.reasoning += text
            elif kind == "call":
                call_id = call_id or new_call_id()
                self.calls.append(Call(call_id, text))
            else:
                self.calls[index].arguments += text
            taken.append((kind, index, text, call_id))
        return taken

    def message(self) -> dict[str, Any]:
        """The members of OpenAI's message beside its role."""
        found: dict[str, Any] = {"content": self.content or (None if self.calls else "")}
        if self.reasoning:
            found |= {"reasoning_content": self.reasoning, "reasoning": self.reasoning}
        if self.calls:
            found["tool_calls"] = [call.to_openai() for call in self.calls]
        return found


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
