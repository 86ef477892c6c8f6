"""An engine that makes vectors of texts, or ranks pairs of them: requests in, whole ubatches of texts, vectors out.

A step is one ubatch. Nothing stays in the context, so that there is no cache, no sequence and no policy: whose texts
are next is in fair_queue.py. Everything that touches the Embedder runs on the engine thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

from mullama import abi
from mullama._core import Embedder, Model
from mullama.config import ServeConfig
from mullama.engine.background import NICE_URGENT, in_background
from mullama.engine.client import PlanningClient
from mullama.engine.commands import Commands
from mullama.engine.embedding.absent import NoChanges, NoKv
from mullama.engine.embedding.fair_queue import FairQueue, Job
from mullama.engine.embedding.pairs import Pairs
from mullama.engine.engine import GIL_SWITCH_SECONDS, STALLED_SECONDS
from mullama.engine.memory import fits
from mullama.engine.memory import report as memory
from mullama.engine.planning import turn_share
from mullama.engine.requests.tokenizing import Tokenizer, TooManyTokens, text_of, vocabulary_of
from mullama.engine.weights import load
from mullama.errors import (
    ComputeFailed,
    ContextLengthExceeded,
    EngineDead,
    InvalidRequest,
    ModelLoadError,
    MullamaError,
    QueueFull,
    ShuttingDown,
)
from mullama.models.files.kind import cuts_vectors, kind_of, pooling_of
from mullama.observe.process_memory import give_back_heap
from mullama.types import EmbeddingRequest, ModelInfo, ModelKind, Pooling, Request, SamplingParams

log = logging.getLogger("mullama.engine")

#: Tokens of a ubatch of several texts. PERF: attention goes over all of a ubatch, whosoever tokens they are, so that a
#: larger one wastes more than its products gain: with MiniLM on a CPU 128 are a quarter to a third faster than 512.
UBATCH_TOKENS = 128

Vectors = list[bytes]  # of each text: 32-bit floats


class EmbeddingEngine:
    """A loaded model that embeds or ranks (see engine.client.EmbeddingClient for the contract)."""

    def __init__(self, model: Model, core: Embedder, info: ModelInfo, config: ServeConfig, tables: int = 0) -> None:
        self._model, self._core, self._info, self._config = model, core, info, config
        self._tables_bytes = tables
        self._commands = Commands(core, info.name)
        self._queue = FairQueue()
        self._n_posted = 0  # submitted, not taken by the engine thread yet; under the lock
        self._open: set[Job] = set()  # not ended; under the lock
        self._page = abi.Reader(core.page.buffer())
        self._idle = False
        self.kv = NoKv(info.name)
        self.weights = NoChanges(info.name)
        self.planning = EmbeddingPlanning(self)
        self._pairs = Pairs(model)
        self._tokenizer = Tokenizer(lambda: self._model)
        sys.setswitchinterval(min(sys.getswitchinterval(), GIL_SWITCH_SECONDS))
        self._thread = threading.Thread(target=self._run, name=f"mullama-engine-{info.name}", daemon=True)
        self._thread.start()

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
    ) -> EmbeddingEngine:
        """Load a model that embeds or ranks; arguments and errors are those of Engine.load."""
        config = config or ServeConfig()
        name = name or Path(path).stem.lower()
        header = fits.header_of(path)
        kind = kind_of(header)
        if kind is ModelKind.GENERATE:
            raise ModelLoadError(f"{path}: this model generates text; it was not made to embed", param="model")
        n_ctx = fits.embedding_ctx(path, config, name)
        meter = memory.LoadMeter()
        if background:
            model = in_background(lambda: load.load_model(path, config, progress), nice=NICE_URGENT)
        else:
            model = load.load_model(path, config, progress)
        try:
            ranks = kind is ModelKind.RANK
            core = load.make_embedder(model, name, config, n_ctx=n_ctx, ranks=ranks, quick=background)
        except BaseException:
            model.close()
            raise
        info = dataclasses.replace(
            load.info_of(model, core, name, weights),
            kind=kind,
            pooling=pooling_of(header),
            n_out=core.n_embd,
            cuts_vectors=cuts_vectors(header),
        )
        return cls(model, core, info, config, meter.tables(core))

    # -- any thread -------------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def config(self) -> ServeConfig:
        return self._config

    @property
    def model(self) -> Model:
        return self._model

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text. The GIL is released while it works. Raises InvalidRequest for lone surrogates."""
        self._commands.check_open()
        return self._model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def prompt_tokens(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        most: int | None = None,
        between: Callable[[], None] | None = None,
    ) -> list[int]:
        """The tokens of a text, worked out in pieces (see EngineClient.prompt_tokens)."""
        self._commands.check_open()
        try:
            return self._tokenizer.tokenize(
                text, add_special=add_special, parse_special=parse_special, most=most, between=between
            )
        except TooManyTokens as error:
            raise self._too_long(error.n, at_least=not error.is_all) from None

    def detokenize(self, tokens: SequenceOf[int], *, special: bool = False, only_whole: bool = False) -> str:
        """Text of token ids (see EngineClient.detokenize)."""
        self._commands.check_open()
        return text_of(self._model, tokens, special=special, only_whole=only_whole)

    def pieces(self, tokens: SequenceOf[int]) -> list[bytes]:
        """The bytes of each token (see EngineClient.pieces)."""
        self._commands.check_open()
        return [self._model.piece(token, special=True) for token in tokens]

    def vocabulary(self) -> dict[str, Any]:
        """The special tokens and the template (see EngineClient.vocabulary)."""
        self._commands.check_open()
        return vocabulary_of(self._model)

    def affixes(self) -> tuple[list[int], list[int]]:
        """The tokens that the vocabulary puts before and behind every text."""
        return self._pairs.head, self._pairs.tail

    def pair_tokens(self, query: str, document: str, most: int | None = None) -> list[int]:
        """Two texts as one prompt (see EmbeddingClient.pair_tokens)."""
        self._commands.check_open()
        return self._pairs.tokens(query, document, most)

    async def embed(self, request: EmbeddingRequest) -> Vectors:
        """The vectors of a request's texts, in their order (see EmbeddingClient.embed)."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Vectors] = loop.create_future()
        job = self._enqueue(request, future)
        try:
            return await future
        finally:
            if not job.is_over:  # whoever waited has gone
                self._commands.post_quietly(lambda: self._give_up(job))

    def embed_sync(self, request: EmbeddingRequest) -> Vectors:
        """The same for a caller without an event loop."""
        future: Future[Vectors] = Future()
        job = self._enqueue(request, future)
        try:
            return future.result()
        finally:
            if not job.is_over:
                self._commands.post_quietly(lambda: self._give_up(job))

    def render_chat(self, messages_json: bytes, **_: Any) -> NoReturn:
        """Raises InvalidRequest, as all that is for models which generate."""
        raise self._generates_nothing()

    def open_chat(self, messages_json: bytes, *_: Any, **__: Any) -> NoReturn:
        """Raises InvalidRequest, as all that is for models which generate."""
        raise self._generates_nothing()

    def prepare(self, sampling: SamplingParams) -> NoReturn:
        raise self._generates_nothing()

    def submit(self, request: Request) -> NoReturn:
        raise self._generates_nothing()

    def submit_sync(self, request: Request) -> NoReturn:
        raise self._generates_nothing()

    def _generates_nothing(self) -> InvalidRequest:
        routes = "/v1/rerank and /v1/score" if self._info.kind is ModelKind.RANK else "/v1/embeddings"
        return InvalidRequest(
            f"'{self._info.name}' generates no text: it is for {routes}; choose another model", param="model"
        )

    def hand_over(self, other: object) -> int:
        """Nothing goes over to an engine that takes this one's place: what runs here ends here, soon."""
        return 0

    @property
    def death(self) -> str | None:
        """Why the engine thread stopped by itself; None: it did not."""
        return self._commands.failure

    def is_ready(self) -> bool:
        """Loaded, and the engine makes progress or has nothing to do."""
        commands = self._commands
        if not commands.is_ours or commands.failure is not None or commands.stopping or commands.draining:
            return False
        if not self._thread.is_alive():
            return False
        return self._idle or time.monotonic_ns() - int(self._page.counters().heartbeat_ns) < STALLED_SECONDS * 1e9

    def counters(self) -> dict[str, int]:
        """The engine's counters as its page shows them (see abi.h)."""
        return abi.as_dict(self._page.counters())

    def page_path(self) -> str:
        """File of the instrumentation page, for abi.Reader.attach; empty when it is private."""
        return str(self._core.page.path)

    def memory(self) -> dict[str, Any]:
        """Bytes allocated, by part and kind of buffer (see Context.memory)."""
        return self._commands.call(self._core.memory).result()

    async def memory_report(self) -> dict[str, Any]:
        """GET /internal/memory (see EngineClient)."""
        found = await asyncio.wrap_future(self._commands.call(self._allocated))
        return await asyncio.to_thread(memory.measured, *found)

    def memory_report_sync(self) -> dict[str, Any]:
        """The same for a thread without an event loop."""
        return memory.measured(*self._commands.call(self._allocated).result())

    def _allocated(self) -> tuple[dict[str, Any], list[tuple[str, str, int, int]]]:
        return memory.without_cache(self._core, self._tables_bytes), self._core.context.buffers()

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - at the deadline it acts, it does not give up
        """Refuse new requests, wait for running ones up to ``timeout`` seconds, end the rest. True: none was cut."""
        self._commands.draining = True
        deadline = time.monotonic() + timeout
        while self._open:
            if time.monotonic() >= deadline or self._commands.failure is not None:
                break
            await asyncio.sleep(0.02)
        was_cut = bool(self._open)
        self._end_all(ShuttingDown(f"'{self._info.name}' is shutting down", retry_after=5))
        return not was_cut

    def close(self) -> None:
        """Stop the engine thread, end what still runs, and free context and model. Idempotent.

        In a child of the process that loaded the engine nothing happens: it is the parent's.
        """
        commands = self._commands
        if not commands.is_ours:
            commands.closed = True
            return
        with commands.lock:
            if commands.closed:
                return
            commands.closed = True
            commands.stopping = True
            self._core.abort()
            commands.lock.notify()
        self._thread.join()
        self._end_all(ShuttingDown(f"'{self._info.name}' was closed"))
        self._core.close()
        self._model.close()
        give_back_heap()

    def __enter__(self) -> EmbeddingEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the way in ------------------------------------------------------------------------------------------

    def check(self, request: EmbeddingRequest) -> None:
        """Raises InvalidRequest, ContextLengthExceeded."""
        info = self._info
        if not request.prompts:
            raise InvalidRequest("input: it is empty; it must have at least one text", param="input")
        is_rank = info.kind is ModelKind.RANK
        if request.pooling is not None and (request.pooling is Pooling.RANK) != is_rank:
            what = "ranks pairs of texts" if is_rank else "has no head that ranks"
            raise InvalidRequest(f"pooling: '{info.name}' {what}; leave the field out", param="pooling")
        for i, prompt in enumerate(request.prompts):
            if not prompt:
                raise InvalidRequest(f"input[{i}]: it holds no token", param=f"input[{i}]")
            if len(prompt) > info.n_ctx:
                raise self._too_long(len(prompt), f"input[{i}]")
            if min(prompt) < 0 or max(prompt) >= info.n_vocab:
                raise InvalidRequest(
                    f"input[{i}]: a token id is outside the vocabulary (0 to {info.n_vocab - 1})", param=f"input[{i}]"
                )

    def _too_long(self, n: int, param: str = "input", *, at_least: bool = False) -> ContextLengthExceeded:
        few = "at least " if at_least else ""
        return ContextLengthExceeded(
            f"{param}: the text has {few}{n} tokens; '{self._info.name}' takes {self._info.n_ctx}; "
            "shorten it, or have it cut with truncate_prompt_tokens",
            param=param,
            n_tokens=n,
        )

    def _enqueue(self, request: EmbeddingRequest, future: asyncio.Future[Vectors] | Future[Vectors]) -> Job:
        commands = self._commands
        commands.check_alive()
        self.check(request)
        job = Job(request, future, request.arrival_ns or time.monotonic_ns())
        with commands.lock:
            commands.check_alive()
            if len(self._open) > self._config.max_queue:
                raise QueueFull(f"{len(self._open)} requests are waiting, the limit is {self._config.max_queue}",
                                retry_after=1)  # fmt: skip
            self._open.add(job)
            self._n_posted += 1
            commands.post(lambda: self._add(job))
        return job

    # -- the engine thread -----------------------------------------------------------------------------------

    def _add(self, job: Job) -> None:
        self._n_posted -= 1
        if not job.is_over:
            self._core.note_opened(len(job.request.prompts))
            self._queue.add(job)

    def _give_up(self, job: Job) -> None:
        if job.is_over:
            return
        self._queue.remove(job)
        self._core.note_cancelled(len(job.request.prompts) - job.n_done)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        job.is_over = True
        with self._commands.lock:
            self._open.discard(job)

    @property
    def n_waiting(self) -> int:
        """Requests with texts that nobody computes yet."""
        return len(self._queue) + self._n_posted

    def _run(self) -> None:
        commands = self._commands
        try:
            while not commands.stopping:
                commands.take()
                if self._queue:
                    self._step()
                else:
                    self._wait_for_work()
        except BaseException as error:
            log.exception("the engine of '%s' stopped", self._info.name)
            with commands.lock:
                commands.failure = (
                    error.message if isinstance(error, MullamaError) else f"{type(error).__name__}: {error}"
                )
            self._end_all(EngineDead(f"the engine of '{self._info.name}' stopped; the server's log says why"))
        finally:
            commands.end()

    def _wait_for_work(self) -> None:
        self._core.pause()
        start = time.monotonic_ns()
        with self._commands.lock:
            self._idle = True
            self._commands.wait()
            self._idle = False
        if not self._commands.stopping:
            self._core.note_idle(time.monotonic_ns() - start, self._n_posted)

    def _step(self) -> None:
        """One ubatch: take texts, compute them, hand the finished requests over."""
        texts = self._queue.take(min(self._config.batch_size, UBATCH_TOKENS), self._core.n_slots)
        own = self._info.pooling or Pooling.MEAN
        prompts = [(job.request.prompts[i], job.request.pooling or own, job.request.normalise) for job, i in texts]
        failed: Exception | None = None
        vectors: SequenceOf[bytes | None] = [None] * len(texts)
        try:
            vectors = self._core.run(prompts, self.n_waiting)
        except ComputeFailed as error:
            if self._commands.stopping:
                return  # told to stop: all that is open is ended then
            failed = error
        ended = []
        for (job, i), vector in zip(texts, vectors, strict=True):
            job.n_done += 1
            if vector is None:
                job.error = job.error or failed or ComputeFailed(f"the vector of input[{i}] has no finite numbers")
                self._queue.remove(job)
            else:
                job.vectors[i] = vector
            if not job.is_over and (job.error is not None or job.n_done == len(job.vectors)):
                self._forget(job)
                ended.append(job)
        deliver(ended)

    def _end_all(self, error: MullamaError) -> None:
        """End what is open, from any thread; what the engine thread still computes of it is for nobody."""
        with self._commands.lock:
            left, self._open = list(self._open), set()
            for job in left:
                job.is_over, job.error = True, error
        self._commands.post_quietly(lambda: self._drop(left))
        deliver(left)

    def _drop(self, jobs: SequenceOf[Job]) -> None:
        for job in jobs:
            self._queue.remove(job)


def deliver(jobs: SequenceOf[Job]) -> None:
    """Hand ended requests to those who wait. An event loop is woken once for all that are its."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[Job]] = defaultdict(list)
    for job in jobs:
        if isinstance(job.future, asyncio.Future):
            by_loop[job.future.get_loop()].append(job)
        else:
            job.resolve()
    for loop, own in by_loop.items():
        with contextlib.suppress(RuntimeError):  # it was closed
            loop.call_soon_threadsafe(_resolve_all, own)


def _resolve_all(jobs: SequenceOf[Job]) -> None:
    for job in jobs:
        job.resolve()


class EmbeddingPlanning(PlanningClient):
    """Whose turn it is among engines; among requests nobody decides, for clients just take turns."""

    def __init__(self, engine: EmbeddingEngine) -> None:
        self._engine = engine

    def snapshot(self) -> dict[str, Any]:
        """GET /internal/scheduler: requests, and counters."""
        engine = self._engine
        now = time.monotonic_ns()
        counters = engine.counters()
        return {
            "model": engine.info.name,
            "policy": "clients_in_turn",
            "params": {},
            "waiting": [_row(job, now) for job in list(engine._open)],
            "running": [],
            "step": counters["steps"],
            "threads": engine._core.governor.snapshot(),
            "kernels": engine.info.kernels,
            "counters": counters,
        }

    async def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise InvalidRequest(f"'{self._engine.info.name}' has no scheduling policy: clients take turns", param="model")

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> NoReturn:
        await self._refuse()

    async def aconfigure(self, params: Mapping[str, Any]) -> NoReturn:
        await self._refuse()

    async def aset_shadow(self, spec: str | None, params: Mapping[str, Any] | None = None) -> None:
        await self._refuse()

    def share(self) -> tuple[str, dict[str, Any]]:
        return turn_share.share_of(self._engine._core)

    def set_share(self, *, weight: float = 1.0, priority: int = 0) -> None:
        turn_share.set_share(self._engine._core, weight=weight, priority=priority)

    def set_arbiter_policy(self, policy: str) -> None:
        self._engine._core.turns.policy = policy


def _row(job: Job, now: int) -> dict[str, Any]:
    request = job.request
    return {
        "id": request.id,
        "state": "prefill" if job.n_taken else "waiting",
        "slot": None,
        "tenant": request.tenant,
        "texts": len(request.prompts),
        "texts_done": job.n_done,
        "prompt_tokens": sum(map(len, request.prompts)),
        "age_ms": round((now - job.since_ns) / 1e6, 3),
    }
