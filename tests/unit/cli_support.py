"""A fake engine with the shape of ``EngineClient``, as far as the CLI uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from mullama.errors import MullamaError
from mullama.types import Delta, Finish, FinishReason, ModelInfo, Profile, Request


def model_info(name: str = "fake", path: str = "/fake.gguf") -> ModelInfo:
    return ModelInfo(
        name=name, path=path, description="llama 135M", architecture="llama", n_params=1, size_bytes=1, n_vocab=1000,
        n_ctx_train=2048, n_ctx=512, n_parallel=1, n_layer=1, n_embd=1, n_swa=0, has_chat_template=True,
        is_recurrent=False, is_hybrid=False, created=0,
    )  # fmt: skip


class FakeGeneration:
    def __init__(self, id: str, engine: FakeEngine, n_prompt: int) -> None:  # noqa: A002 - the protocol's word
        self.id = id
        self.finish: Finish | None = None
        self._engine = engine
        self._n_prompt = n_prompt
        self._pieces = iter(engine.pieces)
        self._n = 0
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        if self.finish is not None:
            raise StopIteration
        if self.is_cancelled:
            self._end(FinishReason.CANCELLED)
        if self._engine.before_piece:
            self._engine.before_piece(self._n)
        piece = next(self._pieces, None)
        if piece is None:
            self._end(FinishReason.ERROR if self._engine.failure else FinishReason.STOP)
        assert piece is not None
        self._n += 1
        return Delta(piece, 1)

    def _end(self, reason: FinishReason) -> None:
        profile = Profile(
            prompt_tokens=self._n_prompt, completion_tokens=self._n, decode_ms=10.0, time_to_first_token_ms=5
        )
        self.finish = Finish(reason, profile, error=self._engine.failure)
        raise StopIteration


class FakeEngine:
    """Answers with ``pieces``; records what it was asked."""

    loaded: list[FakeEngine] = []
    load_error: MullamaError | None = None

    def __init__(self, pieces: tuple[str, ...] = ("Hello", "", ", ", "wörld"), name: str = "fake") -> None:
        self.pieces = pieces
        self.info = model_info(name)
        self.messages: list[bytes] = []
        self.requests: list[Request] = []
        self.failure: Exception | None = None
        self.refusal: MullamaError | None = None
        self.before_piece: Callable[[int], None] | None = None
        self.config: Any = None
        self.closed = 0

    @classmethod
    def load(
        cls, path: str | Path, *, name: str, config: Any, progress: Callable[[float], bool] | None, weights: str = ""
    ) -> Self:
        if cls.load_error:
            raise cls.load_error
        assert progress is not None and progress(0.5)
        engine = cls(name=name)
        engine.info = model_info(name, str(path))
        engine.config = config
        cls.loaded.append(engine)
        return engine

    def render_chat(self, messages_json: bytes, *, add_generation_prompt: bool = True) -> str:
        self.messages.append(messages_json)
        return messages_json.decode()

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        assert add_special  # the contract of render_chat
        return list(range(min(len(text), 100)))

    def submit_sync(self, request: Request) -> FakeGeneration:
        if self.refusal:
            raise self.refusal
        self.requests.append(request)
        return FakeGeneration(request.id, self, len(request.prompt))

    def close(self) -> None:
        self.closed += 1
