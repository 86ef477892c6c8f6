"""The engine thread: commands in, a plan, the core runs it without the GIL, records out.

One step, on one screen, is ``_step``. Everything that touches the core runs on the engine thread; other threads only
append commands, set its interrupt flag, or read the instrumentation page.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from mullama import abi
from mullama._core import TEXT, Cells, Core, Model, Sampling, system_info
from mullama.config import ServeConfig
from mullama.engine.background import NICE_URGENT, in_background
from mullama.engine.client import OpenedChat
from mullama.engine.commands import Commands
from mullama.engine.kv_control import KvControl
from mullama.engine.memory import fits, sizing
from mullama.engine.memory import report as memory
from mullama.engine.parts import EngineParts
from mullama.engine.planning.control import PlanningControl
from mullama.engine.planning.policy_host import PolicyHost
from mullama.engine.planning.steps import Steps
from mullama.engine.requests import handover
from mullama.engine.requests.chat_text import ChatText
from mullama.engine.requests.chats import Chats
from mullama.engine.requests.generation import AsyncGeneration, Inbox, SyncGeneration
from mullama.engine.requests.intake import Intake
from mullama.engine.requests.reader import Reader
from mullama.engine.requests.sequences import LiveSequence, Sequences
from mullama.engine.requests.tokenizing import Tokenizer, TooManyTokens, text_of, vocabulary_of
from mullama.engine.weights import load
from mullama.engine.weights.control import WeightControl
from mullama.engine.weights.in_charge import Boundary, Weights
from mullama.engine.weights.loras import Loras
from mullama.errors import (
    EngineDead,
    MullamaError,
    ShuttingDown,
)
from mullama.kv import audit
from mullama.kv.cache import KvCache
from mullama.kv.eviction import registry as kv_registry
from mullama.kv.eviction.guarded import GuardedPolicy
from mullama.machine.cores import usable_threads
from mullama.machine.ways import words_of
from mullama.observe.process_memory import give_back_heap
from mullama.plugins.arguments import parse_args
from mullama.scheduling import registry
from mullama.scheduling.base import IDLE_LIMIT_NS
from mullama.types import ChatAsk, Finish, FinishReason, ModelInfo, Profile, Request, SamplingParams

log = logging.getLogger("mullama.engine")

T = TypeVar("T")

STALLED_SECONDS = 30.0  # no step for so long, with work to do: not ready
GIL_SWITCH_SECONDS = 0.0005  # what the engine waits at most for a busy event loop
IDLE_AUDIT_S = 1.0  # without work before the KV cache's bookkeeping is compared with llama.cpp's
AHEAD_BYTES = 4 << 20  # of KV that are copied to host memory before their slot is needed: about a millisecond


class Engine:
    """A loaded model that generates (see engine.client.EngineClient for the contract)."""

    def __init__(self, model: Model, core: Core, info: ModelInfo, config: ServeConfig) -> None:
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
        host_bytes = config.kv_host_bytes if config.kv_host_bytes >= 0 else sizing.default_host_bytes()
        self._kv = KvCache(core, Cells(core), host_bytes, policy, exchange=lambda a, b: self._seqs.exchange(a, b))
        token_bytes = self._kv.cells.token_bytes or fits.token_bytes_of(model.path, config)
        if not token_bytes:  # a state takes the same however long its sequence is: a token has its part of a full one's
            token_bytes = -(-fits.state_bytes_of(model.path) // info.n_ctx)
        self._reader = Reader(core, TEXT, token_bytes)
        self._reader.kernels = words_of(info.kernels)
        self._handles = itertools.count(1)
        self._seqs = Sequences(
            core,
            self._reader,
            info.name,
            info.weights,
            config.swap_bytes or sizing.default_host_bytes(),
            self._kv,
            self._ended,
        )
        self._policy.views = self._seqs.views
        self._commands = commands = Commands(core, info.name)
        self._in_charge = Weights()
        self._loras = Loras(core, self._in_charge, commands.lock)
        capacity = core.kv_cells
        kv_tokens = min(config.kv_tokens or capacity, capacity)
        # What fits alone never fails: no request may use more than the whole budget.
        # A context that is cut short by the budget is not full when its cells are: it cannot be shifted.
        can_shift = info.can_shift and info.n_ctx <= kv_tokens
        info = dataclasses.replace(info, n_ctx=min(info.n_ctx, kv_tokens), can_shift=can_shift)
        self._parts = parts = EngineParts(
            core=core,
            kv=self._kv,
            seqs=self._seqs,
            reader=self._reader,
            policy=self._policy,
            weights=self._in_charge,
            loras=self._loras,
            commands=commands,
            page=abi.Reader(core.page.buffer()),
            config=config,
            model=model,
            info=info,
            kv_tokens=kv_tokens,
            token_bytes=token_bytes,
        )
        self._core = core
        self.kv = KvControl(parts)
        self.planning = PlanningControl(parts)
        self.weights = WeightControl(parts)
        self._intake = Intake(parts)
        self._steps = Steps(parts)
        if config.shadow_scheduler:
            self._policy.shadow = self.planning.make_shadow(config.shadow_scheduler, None)
        self._tokenizer = Tokenizer(lambda: parts.model)
        self._known_chats: Chats | None = None
        self._audited = -1  # version of the KV cache that was audited last
        self._idle = False
        self._has_ended = False  # a request has, since it was last looked what goes next
        sys.setswitchinterval(min(sys.getswitchinterval(), GIL_SWITCH_SECONDS))
        try:
            self._kv.attach_disk(load.open_disk_tier(model, core, self._kv, config, commands.post_quietly))
        except BaseException:
            self._policy.close()
            core.close()
            model.close()
            raise
        self._thread = threading.Thread(target=self._run, name=f"mullama-engine-{info.name}", daemon=True)
        self._thread.start()

    @property
    def info(self) -> ModelInfo:
        """What is loaded; another one after a change of weights."""
        return self._parts.info

    @property
    def model(self) -> Model:
        """The model in charge, or who tokenises for it while it is away."""
        return self._parts.model

    @property
    def config(self) -> ServeConfig:
        """As it was loaded."""
        return self._parts.config

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
            model = in_background(lambda: load.load_model(path, config, progress), nice=NICE_URGENT)
        else:
            model = load.load_model(path, config, progress)
        try:
            core = load.make_core(model, name, config, sizes=sizes, quick=background)
            tables = meter.tables(core)
        except BaseException:
            model.close()
            raise
        engine = cls(model, core, load.info_of(model, core, name, weights), config)
        engine._parts.tables_bytes = tables
        try:
            engine._loras.load_configured(config.lora)
        except BaseException:
            engine.close()
            raise
        return engine

    # -- any thread -------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text. The GIL is released while it works. Raises InvalidRequest for lone surrogates."""
        self._commands.check_open()
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
        self._commands.check_open()
        try:
            return self._tokenizer.tokenize(
                text, add_special=add_special, parse_special=parse_special, most=most, between=between
            )
        except TooManyTokens as error:
            raise self._intake.too_long(error.n, at_least=not error.is_all) from None

    def bytes_alone(self, data: bytes) -> list[int]:
        """The token of each byte, as for a character that has only begun; nothing when the vocabulary lacks one."""
        self._commands.check_open()
        return self._tokenizer.bytes_alone(data) if data else []

    def detokenize(self, tokens: SequenceOf[int], *, special: bool = False, only_whole: bool = False) -> str:
        """Text of token ids, malformed UTF-8 replaced by U+FFFD (see EngineClient.detokenize)."""
        self._commands.check_open()
        return text_of(self.model, tokens, special=special, only_whole=only_whole)

    def pieces(self, tokens: SequenceOf[int]) -> list[bytes]:
        """The bytes of each token (see EngineClient.pieces)."""
        self._commands.check_open()
        return [self.model.piece(token, special=True) for token in tokens]

    def vocabulary(self) -> dict[str, Any]:
        """The special tokens and the template (see EngineClient.vocabulary)."""
        self._commands.check_open()
        return vocabulary_of(self.model)

    def render_chat(
        self, messages_json: bytes, *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> str:
        """The prompt of a chat; tokenise it with ``add_special=True``. Raises InvalidRequest."""
        return self._chats().render(
            messages_json, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
        )

    def open_chat(self, messages_json: bytes, ask: ChatAsk, *, add_generation_prompt: bool = True) -> OpenedChat:
        """The prompt of a chat with functions and thoughts, and the form of its answers. Raises InvalidRequest."""
        return self._chats().open(messages_json, ask, add_generation_prompt=add_generation_prompt)

    def _chats(self) -> Chats:
        """Those of the model that is loaded now."""
        self._commands.check_open()
        model, known = self.model, self._known_chats
        if known is None or known.model is not model:
            known = self._known_chats = Chats(model, parses_special=self.config.parse_special_content)
        return known

    def submit(self, request: Request) -> AsyncGeneration:
        """Queue a request; call on the event loop that will read it (errors: see EngineClient.submit)."""
        self._commands.check_alive()
        loop = asyncio.get_running_loop()
        self._reader.attach_loop(loop)
        handle = next(self._handles)
        generation = AsyncGeneration(request.id, handle, self._request_cancel, loop)
        self._intake.enqueue(request, generation)
        return generation

    def submit_sync(self, request: Request) -> SyncGeneration:
        """Queue a request and read it on the calling thread, which must not be the event loop's.

        A generation that nobody refers to any more is cancelled (errors: see EngineClient.submit).
        """
        self._commands.check_alive()
        self._reader.attach_thread()
        handle = next(self._handles)
        inbox = Inbox(request.id, handle, self._request_cancel)
        self._intake.enqueue(request, inbox)
        return SyncGeneration(inbox)

    def prepare(self, sampling: SamplingParams) -> Sampling:
        """What is dear about opening a request, done ahead in any thread (see EngineClient.prepare)."""
        return self._intake.prepare(sampling)

    def _request_cancel(self, handle: int) -> None:
        self._commands.post_quietly(lambda: self._seqs.cancel(handle))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread at the next step boundary."""
        return self._commands.call(function)

    @property
    def death(self) -> str | None:
        """Why the engine thread stopped by itself; None: it did not."""
        return self._commands.failure

    def is_ready(self) -> bool:
        """Loaded, and the engine makes progress or has nothing to do."""
        if not self._commands.is_ours or self._commands.failure is not None:
            return False
        if self._commands.stopping or self._commands.draining or not self._thread.is_alive():
            return False
        if self._idle or self._in_charge.are_away:
            return True
        return time.monotonic_ns() - int(self._parts.page.counters().heartbeat_ns) < STALLED_SECONDS * 1e9

    def counters(self) -> dict[str, int]:
        """The engine's counters as its page shows them (see abi.h)."""
        return abi.as_dict(self._parts.page.counters())

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
        return await memory.report(self._parts)

    def memory_report_sync(self) -> dict[str, Any]:
        """The same for a thread without an event loop."""
        return memory.report_sync(self._parts)

    def hand_over(self, other: Engine) -> int:
        """Let another engine go on with what waits and runs here, from its tokens or its text; nothing is dropped.

        Returns how many requests went over; one that does not fit the other's context ends here. Blocks; not on the
        engine threads or an event loop. The caller sees that no new requests come here.
        """
        same = self.weights.is_same_vocab(other.weights)
        travellers = self.call(
            lambda: handover.depart(
                self._core, self._seqs, self._reader, other, other.info.n_ctx, same_vocab=same
            )
        ).result()  # fmt: skip
        try:
            other.call(lambda: other._take_in(travellers)).result()
        except BaseException as error:
            for one in travellers:
                one.reading.generation.end(Finish(FinishReason.ERROR, Profile(), error=EngineDead(str(error))))
            raise
        return len(travellers)

    def _take_in(self, travellers: list[handover.Traveller]) -> None:
        handover.arrive(
            travellers,
            self._core,
            self._seqs,
            self._reader,
            lambda: next(self._handles),
            self._request_cancel,
            self.info.weights,
            lambda seq: self._policy.arrived(seq.view),
        )

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - at the deadline it acts, it does not give up
        """Refuse new requests, wait for running ones up to ``timeout`` seconds, cancel the rest. True: none was cut."""
        self._commands.draining = True
        deadline = time.monotonic() + timeout
        while self._seqs or self._parts.n_posted:
            if time.monotonic() >= deadline or self._commands.failure is not None:
                break
            await asyncio.sleep(0.02)
        left = self._reader.handles()  # also those that the engine thread has not taken yet
        for handle in left:
            self._request_cancel(handle)
        for _ in range(250):
            if not len(self._reader) or self._commands.failure is not None:
                break
            await asyncio.sleep(0.02)
        return not left

    def close(self) -> None:
        """Stop the engine thread, end what still runs, and free context and model. Idempotent.

        In a child of the process that loaded the engine nothing happens: it is the parent's.
        """
        if not self._commands.is_ours:
            self._commands.closed = True
            return
        with self._commands.lock:
            if self._commands.closed:
                return
            self._commands.closed = True
            self._commands.stopping = True
            self._core.abort()
            self._commands.lock.notify()
        self._thread.join()
        while self._reader.read():
            pass  # what was finished before is not lost
        self._reader.close()
        self._reader.end_all(ShuttingDown(f"'{self.info.name}' was closed"))
        self._policy.close()
        self._kv.close(keep=self._commands.failure is None)
        self._in_charge.close()
        self._core.close()
        self._seqs.close()
        self._loras.close()
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
                if self._commands.stopping:
                    break
                self._commands.take()
                change = self._in_charge.change
                if self._seqs:
                    self._step(change)
                elif change is not None:
                    change.at_boundary(busy=False, quiet=True)
                else:
                    self._wait_for_work()
        except BaseException as error:
            log.exception("the engine of '%s' stopped", self.info.name)
            with self._commands.lock:
                self._commands.failure = (
                    error.message if isinstance(error, MullamaError) else f"{type(error).__name__}: {error}"
                )
            # What stopped it may quote anybody's request: that is for the log.
            self._reader.end_all(EngineDead(f"the engine of '{self.info.name}' stopped; the server's log says why"))
        finally:
            if self._in_charge.change is not None:
                self._in_charge.change.abort(EngineDead(f"the engine of '{self.info.name}' stopped meanwhile"))
            self._commands.end()

    def _wait_for_work(self, until_ns: int = 0) -> None:
        """Nothing to do: let the compute threads sleep until a command comes, or until the time given."""
        self._core.pause()
        if self._has_ended and not self._seqs and not self._commands:
            self._has_ended = False
            self._kv.store_ahead(self._seqs.running(), AHEAD_BYTES)
        self._core.refresh_page(self._parts.n_waiting)
        start = time.monotonic_ns()
        with self._commands.lock:
            self._idle = not self._seqs
            if self._idle and self._kv.version != self._audited:
                self._commands.wait(IDLE_AUDIT_S)
                if not self._commands and not self._commands.stopping:
                    self._audit()
            while not self._commands and not self._commands.stopping:
                left = (until_ns - time.monotonic_ns()) / 1e9 if until_ns else None
                if left is not None and left <= 0:
                    break
                self._commands.wait(left)
            self._idle = False
        if not self._commands.stopping:
            self._core.note_idle(time.monotonic_ns() - start, self._parts.n_waiting)

    def _audit(self) -> None:
        """Nothing to do for a while: look whether tree, slots and llama.cpp's cells agree about the KV."""
        self._audited = self._kv.version
        for difference in audit.differences(self._kv):
            log.error("KV cache of '%s': %s", self.info.name, difference)

    def _step(self, change: Boundary | None) -> None:
        """Plan, preempt, admit, run, follow."""
        state = self._steps.state()
        plan = self._policy.plan(state)
        planned_ns = time.monotonic_ns() - state.now_ns
        steps = plan.repeat
        fresh = bool(plan.preempt)
        fitted = None
        if self._steps.is_limited:
            fitted = self._steps.fit(plan)
            plan = fitted.plan
        for handle, how in plan.preempt.items():
            self._seqs.preempt(handle, how)
        if fitted is not None:
            steps = self._steps.make_room(fitted)
        for handle in plan.tokens:
            if self._seqs.views[handle].is_queued and not self._steps.waits_for_prefix(handle, plan):
                self._seqs.start(handle)
                fresh = True
        self._seqs.close_holes()
        self._seqs.collect()  # a sequence that could not be moved has ended
        decode, prefill = self._steps.shape(plan)
        self._core.note_plan(planned_ns, self._parts.n_waiting, len(decode), sum(n for _, n in prefill))
        if change is not None and not change.at_boundary(busy=True, quiet=not fresh):
            return  # every slot is empty now
        if decode or prefill:
            is_short = fresh or change is not None
            self._core.run(decode, prefill, 1 if is_short else steps, plan.until_ns)
            self._seqs.collect()
        elif self._seqs:
            now = time.monotonic_ns()  # not for ever: whoever leaves all idle is asked again, and found out
            self._wait_for_work(min(plan.until_ns or now + 1_000_000, now + IDLE_LIMIT_NS))

    def _ended(self, seq: LiveSequence) -> None:
        self._has_ended = True
        self._loras.ended(seq.adapters)
        self._policy.ended(seq)
