"""A conversation with an engine, without a terminal: messages, sampling settings, one reply at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mullama.cli.settings import parse_setting
from mullama.errors import ComputeFailed, ContextLengthExceeded, InvalidRequest, MullamaError
from mullama.types import Finish, FinishReason, Request, SamplingParams
from mullama.web.openai.sampling import sampler_values, seed_of

if TYPE_CHECKING:
    from mullama.engine.client import EngineClient, SyncGeneration


class ChatSession:
    """Messages and settings; :meth:`ask` adds a turn.

    One thread asks; :meth:`cancel` may be called from any other, or from a signal handler.
    """

    def __init__(
        self, engine: EngineClient, *, system: str | None = None, settings: Mapping[str, int | float] | None = None
    ) -> None:
        self.engine = engine
        self.system = system
        self.settings = dict(settings or {})
        self.turns: list[dict[str, str]] = []
        self.last: Finish | None = None  # of the newest reply
        self._generation: SyncGeneration | None = None
        self._is_cancelled = False
        self._ids = itertools.count(1)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as OpenAI messages, the system message first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def ask(self, text: str) -> Iterator[str]:
        """Yield the reply as it comes; afterwards ``last`` is its Finish and the turn is part of the messages.

        A reply that was cancelled (or whose reader went away) stays as far as it came; without any text the turn is
        forgotten. Raises InvalidRequest, ContextLengthExceeded, ComputeFailed, and then too the turn is forgotten.
        """
        self._is_cancelled = False
        turn = {"role": "user", "content": valid_text(text)}
        prompt = self.engine.render_chat(json.dumps([*self.messages, turn], ensure_ascii=False).encode())
        tokens = self.engine.tokenize(prompt, add_special=True)
        request = Request(id=f"chat-{next(self._ids)}", prompt=tokens, sampling=self.sampling())
        generation = self._generation = self.engine.submit_sync(request)
        if self._is_cancelled:  # between the first line and here there was nothing to cancel
            generation.cancel()
        pieces: list[str] = []
        try:
            for delta in generation:
                if delta.text:
                    pieces.append(delta.text)
                    yield delta.text
        finally:
            generation.cancel()
            self._generation = None
            self.last = generation.finish
            failed = self.last is not None and self.last.reason is FinishReason.ERROR
            if pieces and not failed:
                self.turns += [turn, {"role": "assistant", "content": "".join(pieces)}]
        if failed and self.last is not None:
            error = self.last.error
            raise error if isinstance(error, MullamaError) else ComputeFailed(f"there is no reply: {error}")

    def cancel(self) -> None:
        """Stop the reply that :meth:`ask` is giving; its text so far stays."""
        self._is_cancelled = True
        generation = self._generation
        if generation is not None:
            generation.cancel()

    @property
    def was_cancelled(self) -> bool:
        """Whether the newest reply was stopped by :meth:`cancel`."""
        return self._is_cancelled

    @property
    def context(self) -> tuple[int, int]:
        """Tokens of the context that the conversation takes so far, and those that there are."""
        profile = self.last.profile if self.last is not None else None
        used = profile.prompt_tokens + profile.completion_tokens if profile is not None else 0
        return min(used, self.engine.info.n_ctx), self.engine.info.n_ctx

    def clear(self) -> None:
        """Forget the turns; the system message and the settings stay."""
        self.turns.clear()
        self.last = None

    def set(self, name: str, value: str) -> None:
        """Change a setting. Raises InvalidRequest."""
        key, number = parse_setting(name, value)
        self.settings[key] = number

    def sampling(self) -> SamplingParams:
        """The settings as the engine takes them."""
        values = sampler_values(SimpleNamespace(**self.settings), self.engine.info)
        seed = self.settings.get("seed")
        return SamplingParams(**values, seed=seed_of(None if seed is None else int(seed)))

    def to_dict(self) -> dict[str, Any]:
        """What /save writes."""
        return {"model": self.engine.info.name, "settings": self.settings, "messages": self.messages}


def explain(error: MullamaError) -> str:
    """An error of the engine in the words of a chat."""
    if isinstance(error, ContextLengthExceeded):
        return f"{error.message} (/clear starts a new conversation, --ctx-size makes room for longer ones)"
    return error.message


def valid_text(text: str) -> str:
    """The text itself. Raises InvalidRequest when it came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the prompt is not valid UTF-8", param="prompt") from None
    return text
