"""Chats of one model: their prompts, and how the answers are read. Any thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from mullama.engine.client import AnswerForm, OpenedChat
from mullama.engine.requests.chat_text import ControlTokens, Render, continuing
from mullama.engine.requests.generic_tools import with_functions
from mullama.errors import InvalidRequest
from mullama.types import ChatAsk, ToolChoice

if TYPE_CHECKING:
    from mullama._core import Model
    from mullama._core.chat.parsing import AnswerFormat

#: A text that no template takes for anything but content, unless it reads every answer in a form of its own.
_PLAIN = " a <b> {c} [d] </e>\n"
_QUESTION = b'[{"role":"user","content":"hi"}]'
_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Chats:
    def __init__(self, model: Model, *, parses_special: bool) -> None:
        """``parses_special``: control tokens that messages spell are control tokens."""
        self.model = model
        self._control = None if parses_special else ControlTokens(model.control_tokens())
        self._lock = threading.Lock()
        self._is_plain: bool | None = None  # found for the first chat

    def render(self, messages_json: bytes, *, add_generation_prompt: bool, continue_final_message: bool) -> str:
        """The prompt of a chat without functions. Raises InvalidRequest."""
        render: Render = partial(self.model.render_chat, add_generation_prompt=add_generation_prompt)
        if continue_final_message:
            render = continuing(self.model.render_chat)
        return self._shielded(render, messages_json)

    def open(self, messages_json: bytes, ask: ChatAsk, *, add_generation_prompt: bool) -> OpenedChat:
        """See ``EngineClient.open_chat``."""
        is_plain = not ask.tools and self.is_plain
        if is_plain and not ask.arguments and b'"tool' not in messages_json:
            prompt = self.render(
                messages_json, add_generation_prompt=add_generation_prompt, continue_final_message=False
            )
            return OpenedChat(prompt, None)
        formats: list[AnswerFormat] = []

        def render(data: bytes) -> str:
            prompt, found = self._open(data, ask, add_generation_prompt)
            formats.append(found)
            return prompt

        parts = (
            b'{"messages":',
            messages_json,
            b',"tools":',
            ask.tools or b"[]",
            b',"arguments":',
            ask.arguments or b"{}",
        )
        prompt = self._shielded(render, b"".join((*parts, b"}")))
        if is_plain:
            return OpenedChat(prompt, None)
        form = formats[0]  # of what was asked as it was asked; later ones are of changed texts
        stops, shown, ends = (tuple(form.facts[name]) for name in ("stops", "shown", "thinking_ends"))
        return OpenedChat(prompt, AnswerForm(form.parser, stops, shown, ends))

    def _open(self, data: bytes, ask: ChatAsk, add_generation_prompt: bool) -> tuple[str, AnswerFormat]:
        parts = _raw.decode(data)
        messages, tools = bytes(parts["messages"]), bytes(parts["tools"]) if ask.tools else b""
        is_generic = bool(tools) and not self.model.chat_caps()["supports_tools"]
        if is_generic or (not tools and b'"tool' in messages and not self.model.chat_caps()["supports_tool_calls"]):
            shown = with_functions(json.loads(messages), json.loads(tools or b"[]"), ask.choice)
            messages = json.dumps(shown, ensure_ascii=False).encode()
        return self.model.open_chat(
            messages,
            tools=tools,
            parameters=ask.parameters,
            arguments=bytes(parts["arguments"]) if ask.arguments else b"",
            add_generation_prompt=add_generation_prompt,
            thinks=ask.thinks,
            splits=ask.splits,
            may_call=ask.choice is not ToolChoice.NONE,
            must_call=ask.choice is ToolChoice.REQUIRED,
            parallel=ask.parallel,
            is_generic=is_generic,
        )

    def _shielded(self, render: Callable[[bytes], str], data: bytes) -> str:
        return render(data) if self._control is None else self._control.render(render, data)

    @property
    def is_plain(self) -> bool:
        """Whether an answer without functions is nothing but its text."""
        with self._lock:
            if self._is_plain is None:
                self._is_plain = self._find_plain()
            return self._is_plain

    def _find_plain(self) -> bool:
        try:
            _, found = self.model.open_chat(_QUESTION)
        except InvalidRequest:
            return True  # it takes other chats alone; their answers are texts
        parser: Any = found.parser()
        told = [*parser.feed(_PLAIN), *parser.finish()]
        is_text = all(kind == "content" for kind, *_ in told) and "".join(part[2] for part in told) == _PLAIN
        return is_text and not found.facts["supports_thinking"] and not found.facts["stops"]
