"""The reader's end of a request, and the hub that hands records out, without a core."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mullama import abi
from mullama.engine.requests.generation import AsyncGeneration, BaseGeneration, Inbox, SyncGeneration
from mullama.engine.requests.reader import ERROR_TEXTS, Kinds, Reader, profile_of
from mullama.errors import ComputeFailed, EngineDead
from mullama.types import Delta, Finish, FinishReason, Profile, TokenScore

TEXT, FINISH, TOKEN, PROMPT = KINDS = Kinds(1, 2, 3, 4)
STOP = Finish(FinishReason.STOP, Profile())


class FakeCore:
    """A ring and its wake-up."""

    def __init__(self) -> None:
        self.fd, self.write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        self.ring: deque[tuple[Any, ...]] = deque()

    def wake_fd(self) -> int:
        return self.fd

    def drain_records(self) -> list[tuple[Any, ...]]:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 1 << 16)
        records = []
        while self.ring:
            records.append(self.ring.popleft())
        return records

    def wake_reader(self) -> None:
        os.write(self.write_fd, b"1")

    def text(self, handle: int, text: str, n_tokens: int = 1) -> None:
        self.ring.append((TEXT, handle, text, n_tokens))
        os.write(self.write_fd, b"1")

    def finish(self, handle: int, reason: int = 1, *, stop: int = -1, error: int = 0, **row: int) -> None:
        self.ring.append((FINISH, handle, reason, stop, error, -1, bytes(abi.Row(handle=handle, **row))))
        os.write(self.write_fd, b"1")


@pytest.fixture
def core() -> Iterator[FakeCore]:
    core = FakeCore()
    yield core
    os.close(core.fd)
    os.close(core.write_fd)


@pytest.fixture
def reader(core: FakeCore) -> Iterator[Reader]:
    reader = Reader(core, KINDS)  # type: ignore[arg-type]
    yield reader
    reader.close()


def no_cancel(handle: int) -> None:
    raise AssertionError("nobody asked for that")


def sync(reader: Reader, handle: int = 1, stops: tuple[str, ...] = ()) -> SyncGeneration:
    inbox = Inbox(f"r{handle}", handle, no_cancel)
    reader.add(inbox, stops)
    reader.attach_thread()
    return SyncGeneration(inbox)


def on_loop(reader: Reader, handle: int = 1) -> AsyncGeneration:
    loop = asyncio.get_running_loop()
    generation = AsyncGeneration(f"r{handle}", handle, no_cancel, loop)
    reader.add(generation, ())
    reader.attach_loop(loop)
    return generation


# -- generations alone


def test_sync_yields_deltas_then_stops() -> None:
    inbox = Inbox("r", 1, no_cancel)
    generation = SyncGeneration(inbox)
    inbox.deliver("a", 1)
    inbox.deliver("", 1)
    inbox.end(STOP)
    assert generation.finish is None, "a reader sees the end when it has read what came before"
    assert list(generation) == [Delta("a", 1), Delta("", 1)]
    assert generation.finish is STOP
    assert list(generation) == [], "the end stays the end"


def test_cancel_is_passed_on_until_the_end() -> None:
    cancelled: list[int] = []
    inbox = Inbox("r", 7, cancelled.append)
    generation = SyncGeneration(inbox)
    generation.cancel()
    inbox.end(STOP)
    list(generation)
    generation.cancel()
    assert cancelled == [7]


def test_what_nobody_can_read_any_more_is_cancelled() -> None:
    """Its reader holds on to the inbox alone."""
    cancelled: list[int] = []
    unread, begun, ended = (Inbox("r", handle, cancelled.append) for handle in (1, 2, 3))
    SyncGeneration(unread)
    gc.collect()
    assert cancelled == [1]
    begun.deliver("a", 1)
    for _ in SyncGeneration(begun):
        break
    gc.collect()
    assert cancelled == [1, 2]
    ended.end(STOP)
    assert list(SyncGeneration(ended)) == []
    gc.collect()
    assert cancelled == [1, 2]


def test_a_generation_is_not_read_in_a_child() -> None:
    generation = SyncGeneration(Inbox("r", 1, lambda handle: None))
    generation._pid -= 1  # as if it came along from another process
    with pytest.raises(EngineDead, match="in another process"):
        next(generation)


def test_the_base_delivers_nothing_by_itself() -> None:
    base = BaseGeneration("r", 1, no_cancel)
    with pytest.raises(NotImplementedError):
        base.deliver("a", 1)
    with pytest.raises(NotImplementedError):
        base.end(STOP)


def test_async_merges_what_piled_up() -> None:
    async def go() -> list[Delta]:
        generation = AsyncGeneration("r", 1, no_cancel, asyncio.get_running_loop())
        generation.deliver("a", 1)
        generation.deliver("b", 2)
        first = await anext(generation)
        generation.deliver("", 1)
        generation.end(STOP)
        return [first] + [delta async for delta in generation]

    assert asyncio.run(go()) == [Delta("ab", 3), Delta("", 1)]


def test_async_waits_and_is_woken_from_another_thread() -> None:
    async def go() -> tuple[list[Delta], Finish | None]:
        generation = AsyncGeneration("r", 1, no_cancel, asyncio.get_running_loop())

        def write() -> None:
            generation.deliver("a", 1)
            generation.deliver("b", 1)
            generation.end(STOP)

        threading.Thread(target=write).start()
        return [delta async for delta in generation], generation.finish

    deltas, finish = asyncio.run(go())
    assert "".join(delta.text for delta in deltas) == "ab"
    assert sum(delta.n_tokens for delta in deltas) == 2
    assert finish is STOP


def test_async_reader_may_give_up_waiting_and_come_back() -> None:
    async def go() -> list[Delta]:
        generation = AsyncGeneration("r", 1, no_cancel, asyncio.get_running_loop())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(generation), 0.001)
        generation.deliver("a", 1)
        generation.end(STOP)
        return [delta async for delta in generation]

    assert asyncio.run(go()) == [Delta("a", 1)]


def test_a_closed_loop_is_no_error_for_the_writer() -> None:
    async def make() -> AsyncGeneration:
        return AsyncGeneration("r", 1, no_cancel, asyncio.get_running_loop())

    generation = asyncio.run(make())
    thread = threading.Thread(target=lambda: (generation.deliver("a", 1), generation.end(STOP)))
    thread.start()
    thread.join()
    generation.deliver("a", 1)


# -- the sink of a generation


def test_a_sink_takes_texts_and_wakes_nobody() -> None:
    async def go() -> tuple[list[str], list[Delta]]:
        generation = AsyncGeneration("r", 1, no_cancel, asyncio.get_running_loop())
        taken: list[str] = []
        generation.sink = lambda text, _: text != "c" and not taken.append(text)  # type: ignore[func-returns-value]
        waiting = asyncio.ensure_future(anext(generation))
        await asyncio.sleep(0)
        generation.deliver("a", 1)
        generation.deliver("b", 1)
        await asyncio.sleep(0.001)
        assert not waiting.done()
        generation.deliver("c", 1)  # declined
        generation.deliver("d", 1)  # must not overtake
        queued = [await waiting]
        generation.deliver("e", 1)  # the queue is empty again
        generation.sink = None
        generation.deliver("f", 1)
        generation.end(STOP)
        return taken, queued + [delta async for delta in generation]

    assert asyncio.run(go()) == (["a", "b", "e"], [Delta("cd", 2), Delta("f", 1)])


def test_a_sink_is_called_on_its_loop_only() -> None:
    async def go() -> tuple[list[str], set[int]]:
        generation = AsyncGeneration("r", 1, no_cancel, asyncio.get_running_loop())
        taken: list[str] = []
        threads: set[int] = set()

        def sink(text: str, tokens: Sequence[TokenScore]) -> bool:
            taken.append(text)
            threads.add(threading.get_ident())
            return True

        def write() -> None:
            for text in "abc":
                generation.deliver(text, 1)
            generation.end(STOP)

        generation.sink = sink
        threading.Thread(target=write).start()
        assert [delta async for delta in generation] == []
        return taken, threads

    assert asyncio.run(go()) == (["a", "b", "c"], {threading.get_ident()})


def test_a_broken_sink_costs_no_text_and_no_other_request(core: FakeCore, reader: Reader) -> None:
    def broken(text: str, tokens: Sequence[TokenScore]) -> bool:
        raise ValueError("no")

    async def go() -> list[list[Delta]]:
        generations = [on_loop(reader, 1), on_loop(reader, 2)]
        generations[0].sink = broken
        for text in "ab":
            core.text(1, text)
            core.text(2, text)
        core.finish(1)
        core.finish(2)
        return [[delta async for delta in generation] for generation in generations]

    assert asyncio.run(go()) == [[Delta("ab", 2)], [Delta("ab", 2)]]


# -- the reader


def test_records_find_their_requests(core: FakeCore, reader: Reader) -> None:
    one, two = sync(reader, 1), sync(reader, 2, stops=("###", "END"))
    core.text(2, "x")
    core.text(1, "a", 2)
    core.text(9, "nobody's")
    core.finish(9)
    core.finish(2, stop=1)
    core.finish(1, 2)
    assert list(one) == [Delta("a", 2)]
    assert list(two) == [Delta("x", 1)]
    assert one.finish is not None and two.finish is not None
    assert (one.finish.reason, one.finish.stop_string) == (FinishReason.LENGTH, None)
    assert (two.finish.reason, two.finish.stop_string) == (FinishReason.STOP, "END")
    assert len(reader) == 0


@pytest.mark.parametrize(("error", "message"), [(1, "not finite"), (2, "sampler"), (3, "llama_decode"), (4, "no room"),
                                                (77, "core error 77")])  # fmt: skip
def test_failures_say_why(core: FakeCore, reader: Reader, error: int, message: str) -> None:
    generation = sync(reader)
    core.finish(1, 4, error=error)
    list(generation)
    assert generation.finish is not None
    assert generation.finish.reason is FinishReason.ERROR
    assert isinstance(generation.finish.error, ComputeFailed)
    assert message in str(generation.finish.error)


def test_the_profile_is_the_row() -> None:
    ms = 1_000_000
    row = abi.Row(
        arrival_ns=5 * ms, opened_ns=6 * ms, started_ns=7 * ms, first_token_ns=10 * ms, finished_ns=25 * ms,
        prompt_tokens=9, completion_tokens=4, kv_cache_hit=3, kv_cache_miss=6, kv_cache_evict=2, ubatches=5,
        batch_sum=15, prefill_ns=2 * ms, decode_ns=11 * ms, sample_ns=ms // 2, threads_min=1, threads_max=2,
    )  # fmt: skip
    assert profile_of(row) == Profile(
        prompt_tokens=9, completion_tokens=4, kv_cache_hit=3, kv_cache_miss=6, kv_cache_evict=2, queue_ms=2.0,
        prefill_ms=2.0, decode_ms=11.0, sample_ms=0.5, time_to_first_token_ms=5.0, total_ms=20.0, steps=5,
        mean_batch_size=3.0, threads_min=1, threads_max=2,
    )  # fmt: skip


def test_the_profile_of_a_request_that_never_computed() -> None:
    profile = profile_of(abi.Row(arrival_ns=1_000_000, finished_ns=3_000_000, prompt_tokens=9))
    assert (profile.queue_ms, profile.total_ms) == (2.0, 2.0)
    assert profile.time_to_first_token_ms is None
    assert profile.mean_batch_size == 0.0


def test_reading_on_a_loop(core: FakeCore, reader: Reader) -> None:
    before = set(threading.enumerate())

    async def go() -> list[Delta]:
        generation = on_loop(reader)
        core.text(1, "a")
        core.finish(1)
        return [delta async for delta in generation]

    assert asyncio.run(go()) == [Delta("a", 1)]
    assert set(threading.enumerate()) <= before, "a loop alone needs no thread"


def test_one_loop_after_the_other(core: FakeCore, reader: Reader) -> None:
    for handle in (1, 2):

        async def go(handle: int = handle) -> list[Delta]:
            generation = on_loop(reader, handle)
            core.text(handle, "a")
            core.finish(handle)
            return [delta async for delta in generation]

        assert asyncio.run(go()) == [Delta("a", 1)]


def test_a_thread_goes_on_when_the_loop_has_ended(core: FakeCore, reader: Reader) -> None:
    async def go() -> SyncGeneration:
        on_loop(reader, 1)
        generation = await asyncio.to_thread(sync, reader, 2)
        core.finish(1)
        return generation

    generation = asyncio.run(go())
    core.text(2, "after the loop")
    core.finish(2)
    assert list(generation) == [Delta("after the loop", 1)]


def test_a_loop_goes_on_when_another_has_ended(core: FakeCore, reader: Reader) -> None:
    async def short() -> None:
        on_loop(reader, 2)

    async def go() -> list[Delta]:
        generation = on_loop(reader, 1)
        await asyncio.to_thread(asyncio.run, short())
        core.text(1, "a")
        core.finish(1)
        return [delta async for delta in generation]

    assert asyncio.run(go()) == [Delta("a", 1)]


def test_a_loop_closed_under_a_waiting_reader_harms_nobody(core: FakeCore, reader: Reader) -> None:
    loop = asyncio.new_event_loop()
    waiting: list[asyncio.Task[Delta]] = []

    async def wait() -> None:
        waiting.append(asyncio.ensure_future(anext(on_loop(reader, 1))))
        await asyncio.sleep(0)

    loop.run_until_complete(wait())
    loop.close()

    async def go() -> list[Delta]:
        generation = on_loop(reader, 2)
        core.text(1, "to nobody")
        core.text(2, "a")
        core.finish(2)
        return [delta async for delta in generation]

    try:
        assert asyncio.run(go()) == [Delta("a", 1)]
    finally:
        waiting[0]._log_destroy_pending = False  # type: ignore[attr-defined]


def test_deltas_keep_their_order_while_the_reading_moves_to_a_thread(core: FakeCore, reader: Reader) -> None:
    async def go() -> str:
        generation = on_loop(reader, 1)

        def write() -> None:
            for number in range(200):
                core.text(1, f"{number} ")
                if number == 100:
                    reader.attach_thread()
            core.finish(1)

        writer = threading.Thread(target=write)
        writer.start()
        text = "".join([delta.text async for delta in generation])
        writer.join()
        return text

    assert asyncio.run(go()).split() == [str(number) for number in range(200)]


def test_many_threads_attach_one_reading_thread(reader: Reader) -> None:
    barrier = threading.Barrier(8)

    def attach() -> None:
        barrier.wait()
        reader.attach_thread()

    threads = [threading.Thread(target=attach) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [t.name for t in threading.enumerate()].count("mullama-reader") == 1


def test_end_all(reader: Reader) -> None:
    generations = [sync(reader, handle) for handle in (1, 2, 3)]
    reader.end_all(EngineDead("gone"))
    for generation in generations:
        assert list(generation) == []
        assert generation.finish is not None and isinstance(generation.finish.error, EngineDead)
    assert len(reader) == 0


def test_close_twice_and_from_a_running_loop(core: FakeCore, reader: Reader) -> None:
    async def go() -> None:
        on_loop(reader)
        reader.close()
        core.text(1, "late")
        await asyncio.sleep(0)

    asyncio.run(go())
    reader.close()
    assert core.ring, "a closed reader leaves the ring alone"


def test_close_while_the_loop_runs_elsewhere(reader: Reader) -> None:
    attached, release = threading.Event(), threading.Event()

    async def go() -> None:
        on_loop(reader)
        attached.set()
        while not release.is_set():
            await asyncio.sleep(0.001)

    thread = threading.Thread(target=lambda: asyncio.run(go()))
    thread.start()
    attached.wait(5)
    reader.close()
    release.set()
    thread.join(5)
    assert not thread.is_alive()


def test_why_requests_fail_is_in_the_headers_order() -> None:
    """The numbers that finish records carry, and words for each."""
    guard = Path(abi.__file__).parent / "_core" / "compute" / "guard.h"
    if not guard.is_file():
        pytest.skip("guard.h is not installed")
    found = re.findall(r"CORE_(\w+)\s*= (\d+),", guard.read_text(encoding="utf-8"))
    numbers = {name.lower(): int(number) for name, number in found}
    assert numbers.pop("ok") == 0 and numbers.pop("exception") == 100  # neither is in a record
    assert {name: number for number, name in abi.CORE_ERRORS.items()} == numbers
    assert ERROR_TEXTS.keys() == numbers.keys()
