"""An embedding engine without a model, shaped like ``EmbeddingClient``: a text's vector counts its characters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mullama.errors import ContextLengthExceeded, InvalidRequest
from mullama.types import EmbeddingRequest, ModelKind, Pooling, Request

from .fake_engine import BOS, FakeEngine

N_OUT = 8
SEP = 2


class FakeEmbedder(FakeEngine):
    """``embedded`` says what was asked of it; ``gate``, where there is one, is waited for. ``cancelled``: how often
    somebody who waited has gone."""

    def __init__(self, name: str = "vectors", *, kind: ModelKind = ModelKind.EMBED, n_out: int = N_OUT) -> None:
        super().__init__(name)
        pooling = Pooling.RANK if kind is ModelKind.RANK else Pooling.MEAN
        self.info = replace(self.info, kind=kind, pooling=pooling, n_out=n_out, n_ctx=32)
        self.embedded: list[EmbeddingRequest] = []
        self.embed_error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.cancelled = 0

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        tokens = super().tokenize(text, add_special=add_special, parse_special=parse_special)
        return [*tokens, SEP] if add_special else tokens

    def prompt_tokens(self, text: str, **how: Any) -> list[int]:
        most = how.pop("most", None)
        tokens = self.tokenize(text, add_special=how.get("add_special", True))
        if most is not None and len(tokens) > most:
            raise ContextLengthExceeded(
                f"input: the text has {len(tokens)} tokens", param="input", n_tokens=len(tokens)
            )
        return tokens

    def affixes(self) -> tuple[list[int], list[int]]:
        return [BOS], [SEP]

    def pair_tokens(self, query: str, document: str, most: int | None = None) -> list[int]:
        plain = [self.tokenize(text, add_special=False) for text in (query, document)]
        return [BOS, *plain[0], SEP, *plain[1], SEP]

    def submit(self, request: Request) -> Any:
        raise InvalidRequest(f"'{self.info.name}' generates no text", param="model")

    def prepare(self, sampling: Any) -> Any:
        raise InvalidRequest(f"'{self.info.name}' generates no text", param="model")

    def render_chat(self, messages_json: bytes, **_: Any) -> str:
        raise InvalidRequest(f"'{self.info.name}' generates no text", param="model")

    def vector(self, tokens: Sequence[int], *, normalise: bool = True) -> np.ndarray[Any, Any]:
        found = np.bincount(np.asarray(tokens) % self.info.n_out, minlength=self.info.n_out).astype(np.float32)
        return found / np.linalg.norm(found) if normalise else found

    async def embed(self, request: EmbeddingRequest) -> list[bytes]:
        self.embedded.append(request)
        if self.embed_error is not None:
            raise self.embed_error
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.info.kind is ModelKind.RANK:
            return [np.full(self.info.n_out, len(one) - 10, np.float32).tobytes() for one in request.prompts]
        if request.pooling is Pooling.NONE:
            rows = [[self.vector([token], normalise=False) for token in one] for one in request.prompts]
            return [np.concatenate(one).astype(np.float32).tobytes() for one in rows]
        return [self.vector(one, normalise=request.normalise).astype(np.float32).tobytes() for one in request.prompts]
