"""The engine thread: commands in, a plan, the core runs it without the GIL, records out.

One step, on one screen, is ``_step``. Everything that touches the core runs on the engine thread; other threads only
append commands, set its interrupt flag, or read the instrumentation page.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

from mullama import abi
from mullama._core import TEXT, Core, Model, Sampling, system_info
from mullama.config import ServeConfig
from mullama.engine.background import NICE_URGENT, in_background
from mullama.engine.memory import fits, sizing
from mullama.engine.memory import report as memory
from mullama.engine.planning.control import PolicyMethods
from mullama.engine.planning.policy_host import IDLE_LIMIT_NS, PolicyHost
from mullama.engine.requests.chat_text import ChatText, ControlTokens
from mullama.engine.requests.generation import AsyncGeneration, BaseGeneration, Inbox, SyncGeneration
from mullama.engine.requests.reader import Reader
from mullama.engine.requests.sequences import LiveSequence, Sequences
from mullama.engine.requests.tokenizing import Tokenizer, TooManyTokens
from mullama.engine.weights import load as loading
from mullama.engine.weights.change import Weights
from mullama.engine.weights.control import WeightMethods
from mullama.engine.weights.loras import Adapters
from mullama.engine.weights.sleeping import Sleep
from mullama.errors import (
    ContextLengthExceeded,
    EngineDead,
    InvalidRequest,
    ModelNotLoaded,
    MullamaError,
    QueueFull,
    ShuttingDown,
)
from mullama.kv.cache import KvCache
from mullama.kv.choice import ESTIMATES
from mullama.kv.control import KvMethods
from mullama.kv.eviction import registry as kv_registry
from mullama.kv.eviction.guarded import GuardedPolicy
from mullama.kv.index.tree import pack
from mullama.machine.cores import usable_threads
from mullama.machine.ways import words_of
from mullama.observe.process_memory import give_back_heap
from mullama.plugins.arguments import parse_args
from mullama.scheduling import Costs, EngineState, Plan, SeqView, registry
from mullama.scheduling import kv_budget as budget
from mullama.types import ModelInfo, Request, SamplingParams, SeqState

log = logging.getLogger("mullama.engine")

#: What clients call a special token, and its name in a model's metadata.
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

T = TypeVar("T")

STALLED_SECONDS = 30.0  # no step for so long, with work to do: not ready
GIL_SWITCH_SECONDS = 0.0005  # what the engine waits at most for a busy event loop
IDLE_AUDIT_S = 1.0  # without work before the KV cache's bookkeeping is compared with llama.cpp's
BESIDE_S = 0.2  # another engine that computed so lately wants the cores as well
SHARED_PREFILL = 128  # tokens: about 0.2 s of a small model on two cores
PRESSURE_STEPS = 64  # steps that eviction under KV pressure makes room for


class Engine(KvMethods, PolicyMethods, WeightMethods):
    """A loaded model that generates (see engine.client.EngineClient for the contract)."""

    def __init__(self, model: Model, core: Core, info: ModelInfo, config: ServeConfig) -> None:
        self.model = model
        me = weakref.ref(self)  # a cycle would keep what close() lets go of
        self._tokenizer = Tokenizer(lambda: cast(Engine, me()).model)
        self._control_tokens: tuple[Model, ControlTokens] | None = None  # of which model; found for the first chat
        self.config = config
        self._core = core
        scheduler_args = parse_args(config.scheduler_arg)
        self._policy = PolicyHost(
            registry.create(config.scheduler, scheduler_args),
            config.scheduler,
            own_thread=registry.is_foreign(config.scheduler, scheduler_args),
            timeout_ms=config.plan_timeout_ms,
        )
        policy = GuardedPolicy(
            kv_registry.create(config.kv_policy, parse_args(config.kv_policy_arg, "kv_policy_arg")), config.kv_policy
        )
        host_bytes = config.kv_host_bytes if config.kv_host_bytes >= 0 else sizing.default_swap_bytes()
        self._kv = KvCache(core, host_bytes, policy, exchange=lambda a, b: self._seqs.exchange(a, b))
        self._token_bytes = self._kv.cells.token_bytes or sizing.kv_bytes_per_token(model.metadata())
        self._reader = Reader(core, TEXT, self._token_bytes)
        self._reader.kernels = words_of(info.kernels)
        self._page = abi.Reader(core.page.buffer())
        self._handles = itertools.count(1)
        self._seqs = Sequences(
            core,
            self._reader,
            info.name,
            info.weights,
            config.swap_bytes or sizing.default_swap_bytes(),
            self._kv,
            self._ended,
        )
        self._policy.views = self._seqs.views
        self._weights = Weights(core, self._kv, self._seqs, config, self._post_quietly)
        self._napping = Sleep(self._weights)
        capacity = core.kv_cells
        self._kv_tokens = min(config.kv_tokens or capacity, capacity)
        # What fits alone never fails: no request may use more than the whole budget.
        # A context that is cut short by the budget is not full when its cells are: it cannot be shifted.
        can_shift = info.can_shift and info.n_ctx <= self._kv_tokens
        self.info = info = dataclasses.replace(info, n_ctx=min(info.n_ctx, self._kv_tokens), can_shift=can_shift)
        if config.shadow_scheduler:
            self._policy.shadow = self._make_shadow(config.shadow_scheduler, None)
        self._wait = threading.Condition()
        self._adapters = Adapters(core, self._weights, self._wait)
        self._weights.adapters = self._adapters
        self._commands: deque[Callable[[], None]] = deque()
        self._calls: set[Future[Any]] = set()  # of call(), not answered yet
        self._takes_none = False  # it sleeps, or falls asleep; under the lock
        self._n_posted = 0  # submitted, not taken by the engine thread yet; under the lock
        self._audited = -1  # version of the KV cache that was audited last
        self._estimated = (-1, -1)  # version of the KV cache, and arrivals, when the queue was last looked up in it
        self._tables_bytes = 0  # what loading took beside the buffers
        self._idle = False
        self._draining = False
        self._stopping = False
        self._closed = False
        self._failure: str | None = None
        self._pid = os.getpid()  # a child has neither the threads nor the right to the page's file
        sys.setswitchinterval(min(sys.getswitchinterval(), GIL_SWITCH_SECONDS))
        try:
            self._kv.disk = loading.open_disk_tier(model, core, self._kv, config, lambda work: self._post_quietly(work))
        except BaseException:
            self._policy.close()
            core.close()
            model.close()
            raise
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
    ) -> Engine:
        """Load a GGUF file and start its engine. ``weights`` names them in profiles (default: the file's stem).

        ``background``: other engines are at work, so that the weights come with low priority.
        ``progress(fraction)`` may return False to cancel. Raises ModelLoadError with the reason (LoadCancelled;
        MemoryTooSmall before anything is loaded).
        """
        config = config or ServeConfig()
        name = name or Path(path).stem.lower()
        sizes = fits.sizes_for(path, config, name)
        meter = memory.LoadMeter()
        if background:
            model = in_background(lambda: loading.load_model(path, config, progress), nice=NICE_URGENT)
        else:
            model = loading.load_model(path, config, progress)
        try:
            core = loading.make_core(model, name, config, sizes=sizes, quick=background)
            tables = meter.tables(core)
        except BaseException:
            model.close()
            raise
        engine = cls(model, core, loading.info_of(model, core, name, weights), config)
        engine._tables_bytes = tables
        try:
            engine._adapters.load_configured(config.lora)
        except BaseException:
            engine.close()
            raise
        return engine

    # -- any thread -------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text. The GIL is released while it works. Raises InvalidRequest for lone surrogates."""
        self._check_open()
        if isinstance(text, ChatText):
            return self._tokenizer.tokenize(text, add_special=add_special, parse_special=parse_special)
        return self.model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def prompt_tokens(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        most: int | None = None,
        between: Callable[[], None] | None = None,
    ) -> list[int]:
        """The tokens of a prompt, worked out in pieces (see EngineClient.prompt_tokens)."""
        self._check_open()
        try:
            return self._tokenizer.tokenize(
                text, add_special=add_special, parse_special=parse_special, most=most, between=between
            )
        except TooManyTokens as error:
            raise self._too_long(error.n, at_least=not error.is_all) from None

    def _too_long(self, n: int, *, at_least: bool = False) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"the prompt has {'at least ' if at_least else ''}{n} tokens; one request may use {self.info.n_ctx}, "
            "completion included",
            param="prompt",
            n_tokens=n,
        )

    def bytes_alone(self, data: bytes) -> list[int]:
        """The token of each byte, as for a character that has only begun; nothing when the vocabulary lacks one."""
        self._check_open()
        return self._tokenizer.bytes_alone(data) if data else []

    def detokenize(self, tokens: SequenceOf[int], *, special: bool = False) -> str:
        """Text of token ids, malformed UTF-8 replaced by U+FFFD. ``special``: control tokens are spelled out."""
        self._check_open()
        return self.model.detokenize(tokens, special=special)

    def pieces(self, tokens: SequenceOf[int]) -> list[bytes]:
        """The bytes of each token (see EngineClient.pieces)."""
        self._check_open()
        return [self.model.piece(token, special=True) for token in tokens]

    def vocabulary(self) -> dict[str, Any]:
        """The special tokens and the template (see EngineClient.vocabulary)."""
        self._check_open()
        model = self.model
        found: dict[str, Any] = {"chat_template": model.chat_template()}
        for name, key in SPECIAL_TOKENS.items():
            token = model.metadata().get(f"tokenizer.ggml.{key}_token_id", "")
            known = token.isdecimal() and int(token) < model.n_vocab
            found[name] = model.piece(int(token), special=True).decode("utf-8", "replace") if known else None
        return found

    def render_chat(self, messages_json: bytes, *, add_generation_prompt: bool = True) -> str:
        """The prompt of a chat; tokenise it with ``add_special=True``. Raises InvalidRequest."""
        self._check_open()
        model = self.model
        render = functools.partial(model.render_chat, add_generation_prompt=add_generation_prompt)
        if self.config.parse_special_content:
            return render(messages_json)
        known = self._control_tokens
        if known is None or known[0] is not model:
            known = self._control_tokens = (model, ControlTokens(model.control_tokens()))
        return known[1].render(render, messages_json)

    def submit(self, request: Request) -> AsyncGeneration:
        """Queue a request; call on the event loop that will read it (errors: see EngineClient.submit)."""
        self._check_alive()
        loop = asyncio.get_running_loop()
        self._reader.attach_loop(loop)
        handle = next(self._handles)
        generation = AsyncGeneration(request.id, handle, self._request_cancel, loop)
        self._enqueue(request, generation)
        return generation

    def submit_sync(self, request: Request) -> SyncGeneration:
        """Queue a request and read it on the calling thread, which must not be the event loop's.

        A generation that nobody refers to any more is cancelled (errors: see EngineClient.submit).
        """
        self._check_alive()
        self._reader.attach_thread()
        handle = next(self._handles)
        inbox = Inbox(request.id, handle, self._request_cancel)
        self._enqueue(request, inbox)
        return SyncGeneration(inbox)

    def _enqueue(self, request: Request, generation: BaseGeneration) -> None:
        prepared = self._check(request)
        room = self.info.n_ctx - len(request.prompt)
        view = SeqView(
            id=generation.handle,
            state=SeqState.WAITING,
            prompt_tokens=len(request.prompt),
            prefill_left=len(request.prompt),
            max_tokens=self._most_tokens(request, room),
            arrival_ns=request.arrival_ns or time.monotonic_ns(),
            priority=request.priority,
            user=request.user,
            slo_ms=request.slo_ms,
            preempt=request.preempt,
            state_ns=time.monotonic_ns(),
        )
        seq = LiveSequence(view, request, key=pack(request.prompt), prepared=prepared)
        with self._wait:
            self._check_alive()
            if self._takes_none:
                raise ModelNotLoaded(f"'{self.info.name}' is asleep; wake it first", param="model")
            # A request that a slot is free for does not wait.
            n_waiting = self._n_posted + self._seqs.n_queued
            if n_waiting >= self.config.max_queue + self._seqs.slots.count(0):
                raise QueueFull(
                    f"{n_waiting} requests are waiting, the limit is {self.config.max_queue}", retry_after=1
                )
            adapters = self._adapters.choose(seq, request)
            self._n_posted += 1
            self._reader.add(generation, request.sampling.stop)
            self._reader.note_adapters(generation.handle, adapters)
            self._post(lambda: self._add(seq))

    def _most_tokens(self, request: Request, room: int) -> int:
        """Tokens that a request may generate. One that shifts has no room to keep to, but without a limit of its own
        it may generate a context's worth."""
        asked = request.sampling.max_tokens
        if request.context_shift:
            return asked or self.info.n_ctx
        return min(asked or room, room)

    def prepare(self, sampling: SamplingParams) -> Sampling:
        """What is dear about opening a request, done ahead in any thread (see EngineClient.prepare)."""
        return Sampling(self.model, sampling)

    def _check(self, request: Request) -> Sampling:
        n = len(request.prompt)
        if n == 0:
            raise InvalidRequest("the prompt is empty: it must have at least one token", param="prompt")
        if n > self.info.n_ctx - 1:
            raise self._too_long(n)
        if min(request.prompt) < 0 or max(request.prompt) >= self.info.n_vocab:
            raise InvalidRequest(f"a token id is outside the vocabulary (0 to {self.info.n_vocab - 1})", param="prompt")
        if request.context_shift and not self.info.can_shift:
            raise InvalidRequest(f"'{self.info.name}' cannot shift its context", param="context_policy")
        _check_fields(request)
        if isinstance(request.prepared, Sampling) and request.prepared.model is self.model:
            return request.prepared
        return self.prepare(request.sampling)

    def _check_open(self) -> None:
        """Raise unless what was loaded is still there."""
        if self._closed:
            raise ShuttingDown(f"'{self.info.name}' was closed: load it again")

    def _check_process(self) -> None:
        """Raise in a child of the process that loaded the engine: its threads are not there."""
        if os.getpid() != self._pid:
            raise EngineDead(
                f"'{self.info.name}' was loaded by process {self._pid}, and no engine comes along when a process "
                "forks: load it after the fork"
            )

    def _check_alive(self) -> None:
        self._check_process()
        self._check_open()
        if self._failure is not None:
            raise EngineDead(f"the engine of '{self.info.name}' stopped; the server's log says why")
        if self._stopping or self._draining:
            raise ShuttingDown(f"'{self.info.name}' is shutting down", retry_after=5)

    def _post(self, command: Callable[[], None]) -> None:
        """Hand a command to the engine thread; the lock is held."""
        self._commands.append(command)
        self._core.interrupt()
        self._wait.notify()

    def _post_quietly(self, command: Callable[[], None]) -> None:
        """Hand a command to the engine thread from another one; nothing happens when it has ended."""
        if os.getpid() != self._pid:
            return  # the lock may have been held when the process forked
        with self._wait:
            if not self._closed and self._failure is None:
                self._post(command)

    def _request_cancel(self, handle: int) -> None:
        if os.getpid() != self._pid:
            return
        with self._wait:
            if not self._closed:
                self._post(lambda: self._seqs.cancel(handle))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread at the next step boundary."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked has gone
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:
                # A SystemExit from here would end the event loop that waits for it.
                future.set_exception(RuntimeError(f"the engine was told to end by {type(error).__name__}"))

        self._check_process()
        with self._wait:
            if self._closed:
                raise EngineDead(f"'{self.info.name}' was closed: load it again")
            if self._failure is not None:
                raise EngineDead(f"the engine of '{self.info.name}' stopped; the server's log says why")
            self._calls.add(future)
            future.add_done_callback(self._calls.discard)
            self._post(command)
        return future

    @property
    def death(self) -> str | None:
        """Why the engine thread stopped by itself; None: it did not."""
        return self._failure

    def is_ready(self) -> bool:
        """Loaded, and the engine makes progress or has nothing to do."""
        if os.getpid() != self._pid or self._failure is not None:
            return False
        if self._stopping or self._draining or not self._thread.is_alive():
            return False
        if self._idle or self._weights.in_gap:
            return True
        return time.monotonic_ns() - int(self._page.counters().heartbeat_ns) < STALLED_SECONDS * 1e9

    def counters(self) -> dict[str, int]:
        """The engine's counters as its page shows them (see abi.h)."""
        return abi.as_dict(self._page.counters())

    def page_path(self) -> str:
        """File of the instrumentation page, for abi.Reader.attach; empty when it is private."""
        return str(self._core.page.path)

    def computing(self) -> dict[str, Any]:
        """How it computes: what changes times or last bits of numbers, for whoever publishes them."""
        config = self.config
        names = (
            "threads_fixed",
            "kernels",
            "flash_attn",
            "deterministic",
            "kv_layout",
            "kv_type_k",
            "kv_type_v",
            "gpu_layers",
        )
        return {
            "threads": config.threads or usable_threads(),
            **{name: getattr(config, name) for name in names},
            "system": system_info(),
            "ways": self.info.kernels,
        }

    def memory(self) -> dict[str, Any]:
        """Bytes allocated, by part and kind of buffer (see Context.memory), as they are at a step boundary."""
        return self.call(self._core.memory).result()

    async def memory_report(self) -> dict[str, Any]:
        """GET /internal/memory: what is allocated and what is resident (see EngineClient)."""
        return await memory.report(self)

    def memory_report_sync(self) -> dict[str, Any]:
        """The same for a thread without an event loop."""
        return memory.report_sync(self)

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - at the deadline it acts, it does not give up
        """Refuse new requests, wait for running ones up to ``timeout`` seconds, cancel the rest. True: none was cut."""
        self._draining = True
        deadline = time.monotonic() + timeout
        while self._seqs or self._n_posted:
            if time.monotonic() >= deadline or self._failure is not None:
                break
            await asyncio.sleep(0.02)
        left = self._reader.handles()  # also those that the engine thread has not taken yet
        for handle in left:
            self._request_cancel(handle)
        for _ in range(250):
            if not len(self._reader) or self._failure is not None:
                break
            await asyncio.sleep(0.02)
        return not left

    def close(self) -> None:
        """Stop the engine thread, end what still runs, and free context and model. Idempotent.

        In a child of the process that loaded the engine nothing happens: it is the parent's.
        """
        if os.getpid() != self._pid:
            self._closed = True
            return
        with self._wait:
            if self._closed:
                return
            self._closed = True
            self._stopping = True
            self._core.abort()
            self._wait.notify()
        self._thread.join()
        while self._reader.read():
            pass  # what was finished before is not lost
        self._reader.close()
        self._reader.end_all(ShuttingDown(f"'{self.info.name}' was closed"))
        self._policy.close()
        self._kv.close(keep=self._failure is None)
        self._weights.close()
        self._core.close()
        self._adapters.close(list(self._seqs.live.values()))
        self._seqs.let_go()
        self.model.close()
        give_back_heap()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the engine thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._core.rearm()
                # In this order: close() sets the flag before it aborts, so that a rearm never hides an abort.
                if self._stopping:
                    break
                self._take_commands()
                if self._weights.broken is not None:
                    raise self._weights.broken
                swap = self._weights.active
                if swap is not None:
                    swap.advance(busy=bool(self._seqs))
                if self._seqs:
                    self._step()
                elif self._weights.active is None:
                    self._sleep()
        except BaseException as error:
            log.exception("the engine of '%s' stopped", self.info.name)
            with self._wait:
                self._failure = error.message if isinstance(error, MullamaError) else f"{type(error).__name__}: {error}"
            # What stopped it may quote anybody's request: that is for the log.
            self._reader.end_all(EngineDead(f"the engine of '{self.info.name}' stopped; the server's log says why"))
        finally:
            # Nobody posts any more: close() and a failure are both seen under the lock.
            if self._weights.active is not None:
                self._weights.active.abort(EngineDead(f"the engine of '{self.info.name}' stopped meanwhile"))
            for future in list(self._calls):
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineDead(f"the engine of '{self.info.name}' is not running"))

    def _take_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _sleep(self, until_ns: int = 0) -> None:
        """Nothing to do: let the compute threads sleep until a command comes, or until the time given."""
        self._core.pause()
        self._core.refresh_page(self._n_waiting())
        start = time.monotonic_ns()
        with self._wait:
            self._idle = not self._seqs
            if self._idle and self._kv.version != self._audited:
                self._wait.wait_for(lambda: self._commands or self._stopping, IDLE_AUDIT_S)
                if not self._commands and not self._stopping:
                    self._audit()
            while not self._commands and not self._stopping:
                left = (until_ns - time.monotonic_ns()) / 1e9 if until_ns else None
                if left is not None and left <= 0:
                    break
                self._wait.wait(left)
            self._idle = False
        if not self._stopping:
            self._core.note_idle(time.monotonic_ns() - start, self._n_waiting())

    def _audit(self) -> None:
        """Nothing to do for a while: look whether tree, slots and llama.cpp's cells agree about the KV."""
        self._audited = self._kv.version
        for difference in self._kv.audit():
            log.error("KV cache of '%s': %s", self.info.name, difference)

    def _n_waiting(self) -> int:
        return self._n_posted + self._seqs.n_queued

    def _step(self) -> None:
        """Plan, preempt, admit, run, follow."""
        state = self._state()
        plan = self._policy.plan(state)
        planned_ns = time.monotonic_ns() - state.now_ns
        steps = plan.repeat
        fresh = bool(plan.preempt)
        is_limited = self._kv_tokens < self._core.n_slots * self._core.n_ctx
        cells = 0
        if is_limited:
            plan, cells = self._fit_budget(plan)
        for handle, how in plan.preempt.items():
            self._seqs.preempt(handle, how)
        if is_limited:
            steps = self._make_room(plan, cells)
        for handle in plan.tokens:
            if self._seqs.views[handle].is_queued and not self._waits_for_prefix(handle, plan):
                self._seqs.start(handle)
                fresh = True
        self._seqs.close_holes()
        self._seqs.collect()  # a sequence that could not be moved has ended
        decode, prefill = self._shape(plan)
        self._core.note_plan(planned_ns, self._n_waiting(), len(decode), sum(n for _, n in prefill))
        swap = self._weights.active
        if swap is not None:
            swap.commit(quiet=not fresh)
        if decode or prefill:
            is_short = fresh or swap is not None
            self._core.run(decode, prefill, 1 if is_short else steps, plan.until_ns)
            self._seqs.collect()
        elif self._seqs:
            now = time.monotonic_ns()  # not for ever: whoever leaves all idle is asked again, and found out
            self._sleep(min(plan.until_ns or now + 1_000_000, now + IDLE_LIMIT_NS))

    def _state(self) -> EngineState:
        self._estimate()
        core, governor = self._core, self._core.governor
        n_decoding = sum(view.state is SeqState.DECODE for view in self._seqs.views.values())
        costs = Costs(
            prefill_token_ns=governor.cost(core.n_batch) / core.n_batch,
            decode_step_ns=governor.cost(max(n_decoding, 1)),
            swap_token_ns=self._seqs.move_ns_per_byte * self._token_bytes,
        )
        return EngineState(
            now_ns=time.monotonic_ns(),
            step=core.steps_done(),
            free_slots=self._seqs.slots.count(0),
            max_prefill=self._max_prefill(),
            n_slots=core.n_slots,
            free_cells=self._kv_tokens - self._seqs.cells_running(),
            costs=costs,
        )

    def _max_prefill(self) -> int:
        """Prompt tokens of one step: fewer while somebody waits for its end, another engine or a change of weights."""
        core = self._core
        if self._weights.active is not None or core.turns.busy_beside(core.seat, BESIDE_S):
            return min(core.n_batch, SHARED_PREFILL)
        return core.n_batch

    def _fit_budget(self, plan: Plan) -> tuple[Plan, int]:
        """Cut the plan to the KV budget. Returns it and the cells that it needs on top of the used ones."""
        views = self._seqs.views
        fitted = budget.fit_or_go_on(plan, views, self._kv_tokens, self._core.n_batch)
        for handle in fitted.preempt:
            fitted.plan.preempt[handle] = views[handle].preempt
        return fitted.plan, fitted.cells

    def _make_room(self, plan: Plan, cells: int) -> int:
        """Give up retained prefixes, also those of whom the plan preempted. Returns the steps it may be repeated."""
        n_decode = max(len(plan.tokens), 1)
        wanted = cells + n_decode * PRESSURE_STEPS
        free = self._kv_tokens - self._seqs.cells_running() - self._seqs.cells_retained()
        if free < wanted:
            free += self._seqs.evict_retained(wanted - free)
        steps = max(1, free // n_decode)
        return min(plan.repeat, steps) if plan.repeat else steps

    def _shape(self, plan: Plan) -> tuple[list[int], list[tuple[int, int]]]:
        """The plan as the core takes it: slots that decode, and prompt chunks (slot, tokens)."""
        decode: list[int] = []
        prefill: list[tuple[int, int]] = []
        for handle, n in plan.tokens.items():
            seq = self._seqs.live.get(handle)
            if seq is None or seq.slot < 0:
                continue  # it could not be started
            if seq.view.state is SeqState.DECODE:
                decode.append(seq.slot)
            else:
                n = min(n, seq.view.prefill_left)
                if seq.borders:
                    n = min(n, max(seq.borders[0] - seq.view.cells, 1))
                prefill.append((seq.slot, n))
        return decode, prefill

    def _waits_for_prefix(self, handle: int, plan: Plan) -> bool:
        """Whether another request is computing the prefix that this one needs: then it is computed once."""
        seq = self._seqs.live[handle]
        if seq.parked is not None:
            return False
        _, later, slot = self._kv.expected(seq.namespace, seq.key, len(seq.request.prompt) - 1)
        # Only while it gets on: a policy that leaves it out must not leave two requests waiting.
        return later > 0 and self._seqs.slots[slot] in plan.tokens

    def _estimate(self) -> None:
        """Tell the policy what the next ones in the queue will have to compute, as far as the KV cache changed."""
        known = (self._kv.version, self._seqs.n_added)
        if not self._seqs.n_queued or known == self._estimated:
            return
        self._estimated = known
        queued = (seq for seq in self._seqs.live.values() if seq.view.state is SeqState.WAITING)
        for seq in itertools.islice(queued, ESTIMATES):
            now, later, _ = self._kv.expected(seq.namespace, seq.key, len(seq.request.prompt) - 1)
            seq.view.expect(max(now, later))

    def _ended(self, seq: LiveSequence) -> None:
        self._adapters.ended(seq)
        self._policy.ended(seq)

    def _add(self, seq: LiveSequence) -> None:
        with self._wait:
            self._n_posted -= 1
            self._seqs.add(seq)
        self._policy.arrived(seq.view)


def _check_fields(request: Request) -> None:
    """What a policy and the page are told of a request. Raises InvalidRequest."""
    priority, user, slo_ms = request.priority, request.user, request.slo_ms
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(1 << 31) <= priority < 1 << 31:
        raise InvalidRequest(
            f"priority must be a whole number from {-(1 << 31)} to {(1 << 31) - 1}, got {priority!r}", param="priority"
        )
    if user is not None and not isinstance(user, str):
        raise InvalidRequest(f"user must be a text, got {user!r}", param="user")
    if slo_ms is not None and (isinstance(slo_ms, bool) or not isinstance(slo_ms, int | float) or not slo_ms > 0):
        raise InvalidRequest(f"slo_ms must be a number of milliseconds above 0, got {slo_ms!r}", param="slo_ms")
