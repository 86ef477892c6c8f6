"""The engine thread: commands in, a plan, the core runs it without the GIL, records out.

One step, on one screen, is ``_step``. Everything that touches the core runs on the engine thread; other threads only
append commands, set its interrupt flag, or read the instrumentation page.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mullama import abi
from mullama._core import TEXT, Core, Model, check_params
from mullama.config import ServeConfig
from mullama.engine import lifecycle, loading, snapshot
from mullama.engine.generation import AsyncGeneration, BaseGeneration, SyncGeneration
from mullama.engine.reader import Reader
from mullama.errors import (
    ComputeFailed,
    ContextLengthExceeded,
    EngineDead,
    InvalidRequest,
    MullamaError,
    QueueFull,
    ShuttingDown,
)
from mullama.kv.placement import SlotView, holes, place
from mullama.scheduling import EngineState, Fcfs, Scheduler, SeqView, check_plan
from mullama.types import Finish, FinishReason, ModelInfo, Profile, Request, SeqState

log = logging.getLogger("mullama.engine")

T = TypeVar("T")

STALLED_SECONDS = 30.0  # no step for so long, with work to do: not ready
GIL_SWITCH_SECONDS = 0.0005  # what the engine waits at most for a busy event loop


@dataclass(slots=True)
class LiveSequence:
    """A request on its way: what the policy sees, and where it lives."""

    view: SeqView
    request: Request
    slot: int = -1

    def move(self, state: SeqState) -> None:
        self.view.state = lifecycle.check(self.view.state, state)


class Engine:
    """A loaded model that generates (see engine.client.EngineClient for the contract)."""

    def __init__(self, model: Model, core: Core, info: ModelInfo, config: ServeConfig) -> None:
        self.info = info
        self.model = model
        self.config = config
        self._core = core
        self._scheduler: Scheduler = Fcfs(prefill_budget=config.prefill_budget)
        self._reader = Reader(core, TEXT)
        self._page = abi.Reader(core.page.buffer())
        self._handles = itertools.count(1)
        self._seqs: dict[int, LiveSequence] = {}
        self._slots: list[int] = [0] * core.n_slots  # handle of the running sequence, 0: none
        self._wait = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._calls: set[Future[Any]] = set()  # of call(), not answered yet
        self._n_waiting = 0
        self._idle = False
        self._draining = False
        self._stopping = False
        self._closed = False
        self._failure: str | None = None
        self._move_ns_per_byte = 1.0  # measured as moves happen
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
    ) -> Engine:
        """Load a GGUF file and start its engine.

        ``progress(fraction)`` may return False to cancel. Raises ModelLoadError (LoadCancelled) with the reason.
        """
        config = config or ServeConfig()
        name = name or Path(path).stem.lower()
        model = loading.load_model(path, config, progress)
        try:
            core = loading.make_core(model, name, config)
        except BaseException:
            model.close()
            raise
        return cls(model, core, loading.info_of(model, core, name), config)

    # -- any thread -------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text. The GIL is released while it works. Raises InvalidRequest for lone surrogates."""
        return self.model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids, malformed UTF-8 replaced by U+FFFD."""
        return self.model.detokenize(tokens)

    def render_chat(self, messages_json: bytes, *, add_generation_prompt: bool = True) -> str:
        """The prompt of a chat; tokenise it with ``add_special=True``. Raises InvalidRequest."""
        return self.model.render_chat(messages_json, add_generation_prompt=add_generation_prompt)

    def submit(self, request: Request) -> AsyncGeneration:
        """Queue a request; call on the event loop that will read it (errors: see EngineClient.submit)."""
        loop = asyncio.get_running_loop()
        self._reader.attach_loop(loop)
        handle = next(self._handles)
        generation = AsyncGeneration(request.id, handle, self._request_cancel, loop)
        self._enqueue(request, generation)
        return generation

    def submit_sync(self, request: Request) -> SyncGeneration:
        """Queue a request and read it on the calling thread, which must not be the event loop's."""
        self._reader.attach_thread()
        handle = next(self._handles)
        generation = SyncGeneration(request.id, handle, self._request_cancel)
        self._enqueue(request, generation)
        return generation

    def _enqueue(self, request: Request, generation: BaseGeneration) -> None:
        self._check(request)
        view = SeqView(
            id=generation.handle,
            state=SeqState.WAITING,
            prompt_tokens=len(request.prompt),
            prefill_left=len(request.prompt),
            max_tokens=request.sampling.max_tokens or self.info.n_ctx,
            arrival_ns=request.arrival_ns or time.monotonic_ns(),
            priority=request.priority,
            user=request.user,
        )
        seq = LiveSequence(view, request)
        with self._wait:
            self._check_alive()
            # A request that a slot is free for does not wait.
            if self._n_waiting >= self.config.max_queue + self._slots.count(0):
                raise QueueFull(
                    f"{self._n_waiting} requests are waiting, the limit is {self.config.max_queue}", retry_after=1
                )
            self._n_waiting += 1
            self._reader.add(generation, request.sampling.stop)
            self._post(lambda: self._add(seq))

    def _check(self, request: Request) -> None:
        n = len(request.prompt)
        if n == 0:
            raise InvalidRequest("the prompt is empty: it must have at least one token", param="prompt")
        if n > self.info.n_ctx - 1:
            raise ContextLengthExceeded(
                f"the prompt has {n} tokens; one request may use {self.info.n_ctx}, completion included",
                param="prompt",
            )
        if min(request.prompt) < 0 or max(request.prompt) >= self.info.n_vocab:
            raise InvalidRequest(f"a token id is outside the vocabulary (0 to {self.info.n_vocab - 1})", param="prompt")
        check_params(request.sampling)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDead(f"the engine of '{self.info.name}' stopped: {self._failure}")
        if self._stopping or self._draining:
            raise ShuttingDown(f"'{self.info.name}' is shutting down", retry_after=5)

    def _post(self, command: Callable[[], None]) -> None:
        """Hand a command to the engine thread; the lock is held."""
        self._commands.append(command)
        self._core.interrupt()
        self._wait.notify()

    def _request_cancel(self, handle: int) -> None:
        with self._wait:
            if not self._closed:
                self._post(lambda: self._cancel(handle))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread at the next step boundary."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked has gone
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._wait:
            if self._failure is not None or self._closed:
                raise EngineDead(f"the engine of '{self.info.name}' is not running")
            self._calls.add(future)
            future.add_done_callback(self._calls.discard)
            self._post(command)
        return future

    def is_ready(self) -> bool:
        """Loaded, and the engine makes progress or has nothing to do."""
        if self._failure is not None or self._stopping or self._draining or not self._thread.is_alive():
            return False
        if self._idle:
            return True
        return time.monotonic_ns() - int(self._page.counters().heartbeat_ns) < STALLED_SECONDS * 1e9

    def counters(self) -> dict[str, int]:
        """The engine's counters as its page shows them (see abi.h)."""
        return abi.as_dict(self._page.counters())

    def page_path(self) -> str:
        """File of the instrumentation page, for abi.Reader.attach; empty when it is private."""
        return str(self._core.page.path)

    def scheduler_snapshot(self) -> dict[str, Any]:
        """GET /internal/scheduler."""
        return snapshot.scheduler(self.info, self._scheduler, list(self._seqs.values()), self._page, self._core)

    async def kv_snapshot(self) -> dict[str, Any]:
        """GET /internal/kv, as it is at a step boundary."""
        return await asyncio.wrap_future(self.call(lambda: snapshot.kv(self.info, self._core, self._slots)))

    def kv_snapshot_sync(self) -> dict[str, Any]:
        """The same for a thread without an event loop."""
        return self.call(lambda: snapshot.kv(self.info, self._core, self._slots)).result()

    async def drop_retained(self) -> int:
        """Drop every retained prefix; returns the number of cells freed."""
        return await asyncio.wrap_future(self.call(self._drop_retained))

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - at the deadline it acts, it does not give up
        """Refuse new requests, wait for running ones up to ``timeout`` seconds, cancel the rest. True: none was cut."""
        self._draining = True
        deadline = time.monotonic() + timeout
        while self._seqs or self._n_waiting:
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
        """Stop the engine thread, end what still runs, and free context and model. Idempotent."""
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
        self._core.close()
        self.model.close()

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
                if self._seqs:
                    self._step()
                else:
                    self._sleep()
        except BaseException as error:
            log.exception("the engine of '%s' stopped", self.info.name)
            with self._wait:
                self._failure = f"{type(error).__name__}: {error}"
            self._reader.end_all(EngineDead(f"the engine of '{self.info.name}' stopped: {self._failure}"))
        finally:
            # Nobody posts any more: close() and a failure are both seen under the lock.
            for future in list(self._calls):
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineDead(f"the engine of '{self.info.name}' is not running"))

    def _take_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _sleep(self) -> None:
        """Nothing to do: let the compute threads sleep until a command comes."""
        self._core.pause()
        start = time.monotonic_ns()
        with self._wait:
            self._idle = True
            while not self._commands and not self._stopping:
                self._wait.wait()
            self._idle = False
        if not self._stopping:
            self._core.note_idle(time.monotonic_ns() - start, self._n_waiting)

    def _step(self) -> None:
        """Plan, admit, run, collect."""
        start = time.monotonic_ns()
        state = EngineState(
            now_ns=start,
            step=self._page.counters().steps,
            free_slots=self._slots.count(0),
            max_prefill=self._core.n_batch,
        )
        plan = self._scheduler.plan(state)
        check_plan(plan, {handle: seq.view for handle, seq in self._seqs.items()}, state)
        for handle in plan.tokens:
            if self._seqs[handle].view.state is SeqState.WAITING:
                self._admit(self._seqs[handle])
        self._close_holes()
        self._collect()  # a sequence that could not be moved has ended
        decode: list[int] = []
        prefill: list[tuple[int, int]] = []
        for handle, n in plan.tokens.items():
            seq = self._seqs.get(handle)
            if seq is None:
                continue  # could not be opened
            if seq.view.state is SeqState.DECODE:
                decode.append(seq.slot)
            else:
                prefill.append((seq.slot, min(n, seq.view.prefill_left)))
        self._core.note_plan(time.monotonic_ns() - start, self._n_waiting, len(decode), sum(n for _, n in prefill))
        self._core.run(decode, prefill, plan.repeat)
        for slot, n in prefill:
            self._seqs[self._slots[slot]].view.prefill_left -= n
        self._collect()

    def _add(self, seq: LiveSequence) -> None:
        self._seqs[seq.view.id] = seq
        self._scheduler.add(seq.view)

    def _admit(self, seq: LiveSequence) -> None:
        """WAITING -> PREFILL: give it a slot, with as much of its prompt as a retained prefix saves."""
        core, request = self._core, seq.request
        match_slot, match_tokens = core.match(request.prompt)
        where = place(self._slot_views(), match_slot, match_tokens)
        assert where is not None, "the plan was checked against the free slots"
        evicted = core.evict(where.evict) if where.evict is not None else 0
        if where.exchange is not None:
            self._exchange(*where.exchange)
        self._n_waiting -= 1
        try:
            core.open(
                where.slot,
                seq.view.id,
                request.prompt,
                request.sampling,
                reuse=min(where.reuse, core.retained(where.slot)[0]),  # 0 if the exchange lost it
                evicted=evicted,
                arrival_ns=seq.view.arrival_ns,
                priority=request.priority,
            )
        except Exception as error:
            # Whatever one request holds, the others go on.
            if not isinstance(error, MullamaError):
                error = InvalidRequest(f"the request could not be started: {error}")
            self._forget(seq)
            self._reader.end_directly(seq.view.id, Finish(FinishReason.ERROR, Profile(), error=error))
            return
        seq.slot = where.slot
        seq.view.prefill_left = len(request.prompt) - core.slot_info(where.slot)[2]
        self._slots[where.slot] = seq.view.id
        seq.move(SeqState.PREFILL)

    def _slot_views(self) -> list[SlotView]:
        views = []
        for slot, handle in enumerate(self._slots):
            tokens, last_used = self._core.retained(slot)
            views.append(SlotView(handle != 0, tokens, last_used))
        return views

    def _close_holes(self) -> None:
        """Keep running sequences on a gap-free range of the lowest slots, where the move costs less than the gap."""
        for low, high in holes([handle != 0 for handle in self._slots]):
            cost = self._core.state_bytes(high) * self._move_ns_per_byte
            if cost < self._core.gap_cost_ns(high):
                self._exchange(low, high)

    def _exchange(self, a: int, b: int) -> None:
        """Swap two slots, KV and all. Sequences whose KV is lost on the way fail; nobody else notices."""
        start = time.monotonic_ns()
        try:
            n_bytes = self._core.exchange(a, b)
        except ComputeFailed:
            log.exception("slots %d and %d of '%s' could not change places", a, b, self.info.name)
            n_bytes = 0
        if n_bytes:
            self._move_ns_per_byte += 0.3 * ((time.monotonic_ns() - start) / n_bytes - self._move_ns_per_byte)
        self._slots[a], self._slots[b] = self._slots[b], self._slots[a]
        for slot in (a, b):
            if self._slots[slot]:
                self._seqs[self._slots[slot]].slot = slot

    def _collect(self) -> None:
        """Follow what the core did: first tokens, finishes."""
        for slot, (state, generated) in enumerate(self._core.progress()):
            handle = self._slots[slot]
            if not handle:
                continue
            seq = self._seqs[handle]
            seq.view.generated = generated
            if state == abi.DECODE and seq.view.state is SeqState.PREFILL:
                seq.move(SeqState.DECODE)
            elif state == abi.DONE:
                self._core.close_slot(slot)
                self._forget(seq)

    def _forget(self, seq: LiveSequence) -> None:
        seq.move(SeqState.DONE)
        if seq.slot >= 0:
            self._slots[seq.slot] = 0
        self._seqs.pop(seq.view.id, None)
        self._scheduler.remove(seq.view.id)

    def _cancel(self, handle: int) -> None:
        seq = self._seqs.get(handle)
        if seq is None:
            return
        if seq.slot >= 0:
            self._core.cancel(seq.slot)  # writes the finish record
        else:
            self._n_waiting -= 1
            waited = (time.monotonic_ns() - seq.view.arrival_ns) / 1e6
            profile = Profile(prompt_tokens=seq.view.prompt_tokens, queue_ms=waited, total_ms=waited)
            self._reader.end_directly(handle, Finish(FinishReason.CANCELLED, profile))
        self._forget(seq)

    def _drop_retained(self) -> int:
        freed = sum(self._core.evict(slot) for slot, handle in enumerate(self._slots) if not handle)
        self._core.note_idle(0, self._n_waiting)
        return freed
