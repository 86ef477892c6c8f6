"""From the token ring to the requests' readers: one reader at a time, an event loop or a thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import selectors
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mullama import abi
from mullama.engine.requests.generation import BaseGeneration
from mullama.errors import ComputeFailed
from mullama.types import Finish, FinishReason, LoraUse, Profile, WeightSpan

if TYPE_CHECKING:
    from mullama._core import Core

log = logging.getLogger("mullama.engine")

ERROR_TEXTS = {
    "not_finite": "the model's logits are not finite",
    "sampler": "the sampler failed",
    "decode": "llama_decode failed",
    "no_kv": "there was no room in the KV cache",
    "adapter": "an adapter of the request is gone",
    "constraint": "the constraint became too complex to follow",
}


def profile_of(
    row: abi.Row, token_bytes: int = 0, why: str | None = None, weights: tuple[WeightSpan, ...] = ()
) -> Profile:
    """The request's profile, made of its row; the words for a miss and the weights' names are the engine's."""

    def ms(start: int, end: int) -> float:
        return (end - start) / 1e6 if end >= start > 0 else 0.0

    return Profile(
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        kv_cache_hit=row.kv_cache_hit,
        kv_cache_miss=row.kv_cache_miss,
        kv_cache_evict=row.kv_cache_evict,
        queue_ms=ms(row.arrival_ns, row.started_ns or row.finished_ns),
        prefill_ms=row.prefill_ns / 1e6,
        decode_ms=row.decode_ns / 1e6,
        sample_ms=row.sample_ns / 1e6,
        time_to_first_token_ms=ms(row.arrival_ns, row.first_token_ns) if row.first_token_ns else None,
        total_ms=ms(row.arrival_ns, row.finished_ns),
        steps=row.ubatches,
        mean_batch_size=row.batch_sum / row.ubatches if row.ubatches else 0.0,
        threads_min=row.threads_min,
        threads_max=row.threads_max,
        preemptions=row.preemptions,
        preempted_ms=row.preempted_ns / 1e6,
        recomputed_tokens=row.recomputed,
        kv_cache_source=abi.KV_SOURCES[row.kv_source],
        kv_miss_reason=why,
        context_shifted=row.shifted,
        kv_bytes=row.cells * token_bytes,
        kv_byte_seconds=row.kv_cell_ns * token_bytes / 1e9,
        weights=weights,
    )


@dataclass(slots=True)
class Reading:
    """What is known of a request that has not ended, for its reader and its profile."""

    generation: BaseGeneration
    stops: tuple[str, ...] = ()
    adapters: tuple[LoraUse, ...] = ()  # that compute it
    weights: tuple[WeightSpan, ...] = ()  # that generate it
    miss_reason: str | None = None  # why prompt tokens had to be computed


class Reader:
    """Hands records to generations.

    An event loop that is the only reader reads by itself. As soon as there is another one (a second loop, a thread
    without a loop), a thread reads for all of them: nobody depends on how long somebody else's loop lives.
    """

    def __init__(self, core: Core, text_kind: int, token_bytes: int = 0) -> None:
        self._core = core
        self._text_kind = text_kind
        self._readings: dict[int, Reading] = {}  # by handle
        self._token_bytes = token_bytes  # KV of one token
        self.kernels: dict[str, str] = {}  # ways of computing, for the profiles
        self._lock = threading.Lock()  # one reader of the ring at a time
        self._attaching = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._readings)

    def add(self, generation: BaseGeneration, stops: tuple[str, ...], adapters: tuple[LoraUse, ...] = ()) -> None:
        """Read for a request, which the engine thread does not know yet."""
        self._readings[generation.handle] = Reading(generation, stops, adapters)

    def explain(self, handle: int, reason: str | None) -> None:
        """Why a request's prompt was not in the KV cache, for its profile. Engine thread."""
        reading = self._readings.get(handle)
        if reading is not None:
            reading.miss_reason = reason

    def note_weights(self, handle: int, weights: str, from_token: int) -> None:
        """Which weights generate a request's tokens from ``from_token`` on, for its profile. Engine thread."""
        reading = self._readings.get(handle)
        if reading is not None:
            # Those from the same token on generated nothing.
            before = tuple(span for span in reading.weights if span.from_token < from_token)
            reading.weights = (*before, WeightSpan(weights, from_token))

    def release(self, handle: int) -> Reading | None:
        """Hand out what is known of a request, which goes on elsewhere; None: it has ended. Engine thread.

        What its records said so far is delivered before.
        """
        while self.read():
            pass
        return self._readings.pop(handle, None)

    def adopt(self, handle: int, reading: Reading) -> None:
        """Go on reading for a request that another engine's reader has released."""
        reading.generation.attach_to(self)
        self._readings[handle] = reading

    def handles(self) -> list[int]:
        """Requests that have not ended."""
        return list(self._readings)

    def attach_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """See that what this loop submits is read; call on it."""
        if self._loop is loop or self._thread is not None or self._closed:
            return
        with self._attaching:
            if self._thread is not None:
                return
            if self._loop is not None and not self._loop.is_closed():
                self._start_thread()
            else:
                self._loop = loop
                fd = self._core.wake_fd()
                loop.add_reader(fd, self._read_on, loop, fd)

    def attach_thread(self) -> None:
        """See that what a thread without an event loop submits is read."""
        if self._thread is None and not self._closed:
            with self._attaching:
                if self._thread is None:
                    self._start_thread()

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="mullama-reader", daemon=True)
        self._detach_loop()
        self._thread.start()

    def _detach_loop(self) -> None:
        """Stop reading on the loop, from any thread."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        with contextlib.suppress(RuntimeError):  # it is closed: nothing to stop
            loop.call_soon_threadsafe(loop.remove_reader, self._core.wake_fd())

    def _run(self) -> None:
        fd = self._core.wake_fd()
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while not self._closed:
                selector.select()
                self.read()

    def _read_on(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        """Read on a loop, unless the reading went to a thread meanwhile: deltas would overtake each other."""
        with self._lock:
            if self._loop is loop:
                self._read()
                return
        loop.remove_reader(fd)

    def read(self) -> int:
        """Take the records that wait off the ring (a few thousand at most) and return their number."""
        with self._lock:
            return self._read()

    def _read(self) -> int:
        """The caller holds the lock."""
        if self._closed:
            return 0
        records = self._core.drain_records()
        for record in records:
            if record[0] == self._text_kind:
                _, handle, text, n_tokens = record
                reading = self._readings.get(handle)
                if reading is not None:
                    reading.generation.deliver(text, n_tokens)
                continue
            reading = self._readings.pop(record[1], None)
            if reading is not None:
                reading.generation.end(self._finish(record, reading))
        return len(records)

    def _finish(self, record: tuple[int, int, int, int, int, bytes], reading: Reading) -> Finish:
        _, _, number, stop_index, error, row = record
        reason, failure = FinishReason(abi.FINISH_REASONS[number]), None
        if reason is FinishReason.ERROR:
            name = abi.CORE_ERRORS.get(error, "")
            failure = ComputeFailed(f"the request failed: {ERROR_TEXTS.get(name, f'core error {error}')}")
        profile = profile_of(abi.Row.from_buffer_copy(row), self._token_bytes, reading.miss_reason, reading.weights)
        profile.adapters, profile.kernels = reading.adapters, self.kernels
        stop = reading.stops[stop_index] if 0 <= stop_index < len(reading.stops) else None
        return Finish(reason, profile, stop_string=stop, error=failure)

    def end_directly(self, handle: int, finish: Finish) -> None:
        """End a request that never reached the core, or whose core is gone."""
        reading = self._readings.pop(handle, None)
        if reading is not None:
            reading.generation.end(finish)

    def end_all(self, error: Exception) -> None:
        for handle in self.handles():
            self.end_directly(handle, Finish(FinishReason.ERROR, Profile(), error=error))

    def close(self) -> None:
        """Stop reading. Call from the loop's thread, or when the loop has ended."""
        with self._lock:
            self._closed = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._core.wake_reader()
            self._thread.join()
        self._thread = None
        loop, self._loop = self._loop, None
        if loop is None or loop.is_closed():
            return
        fd = self._core.wake_fd()
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop or not loop.is_running():
            loop.remove_reader(fd)
        else:
            done = threading.Event()

            def remove() -> None:
                loop.remove_reader(fd)
                done.set()

            loop.call_soon_threadsafe(remove)
            done.wait(5)
