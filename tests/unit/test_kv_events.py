"""The log of KV events: what readers get, what they lose, and that the engine thread waits for nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama.kv.events import KvEvent, KvEventKind, KvEventLog, KvTier
from mullama.kv.index.namespaces import short_namespace


def event(seq: int) -> KvEvent:
    return KvEvent(seq, 1000 + seq, KvEventKind.STORED, KvTier.DEVICE, 0, 1, b"", b"\1\0\0\0")


def add(log: KvEventLog, n: int) -> None:
    for _ in range(n):
        log.append(event(log.next_seq()))


def test_a_log_without_events() -> None:
    log = KvEventLog()
    assert (log.last_seq, log.next_seq()) == (0, 1)
    assert log.since(0) == ([], 0)


@given(limit=st.integers(1, 12), n=st.integers(0, 40), since=st.integers(0, 40))
def test_what_is_there_and_what_is_lost(limit: int, n: int, since: int) -> None:
    log = KvEventLog(limit)
    add(log, n)
    since = min(since, n)
    events, lost = log.since(since)
    kept = range(max(n - limit, 0) + 1, n + 1)
    assert [one.seq for one in events] == [seq for seq in kept if seq > since]
    assert lost == sum(1 for seq in range(since + 1, n + 1) if seq not in kept)
    assert log.last_seq == n


def follow(log: KvEventLog, n: int, pause: Callable[[], object]) -> tuple[list[int], int]:
    """The numbers a reader sees until number ``n``, and how many it loses."""
    seen: list[int] = []
    lost = seq = 0
    while seq < n:
        events, gone = log.since(seq)
        lost += gone
        seen += [one.seq for one in events]
        seq = seen[-1] if events else seq
        pause()
    return seen, lost


@pytest.mark.parametrize("limit", [4, 64, 10_000])
def test_readers_in_threads_account_for_every_event(limit: int) -> None:
    log, n, n_readers = KvEventLog(limit), 5000, 4
    results: list[tuple[list[int], int]] = []
    woken = [threading.Event() for _ in range(n_readers)]
    stops = [log.watch(one.set) for one in woken]

    def read(bell: threading.Event) -> None:
        def pause() -> None:
            if log.last_seq < n:
                bell.wait()
                bell.clear()

        results.append(follow(log, n, pause))

    readers = [threading.Thread(target=read, args=(bell,)) for bell in woken]
    for reader in readers:
        reader.start()
    add(log, n)
    for reader in readers:
        reader.join(60)
    assert len(results) == n_readers
    for seen, lost in results:
        assert seen == sorted(set(seen))
        assert len(seen) + lost == n
        assert seen[-1] == n
        assert lost == 0 or limit < n
    for stop in stops:
        stop()


def test_a_waker_finds_the_event_that_woke_it() -> None:
    log = KvEventLog()
    found: list[int] = []
    stop = log.watch(lambda: found.append(log.since(len(found))[0][0].seq))
    add(log, 3)
    assert found == [1, 2, 3]
    stop()
    stop()
    add(log, 1)
    assert found == [1, 2, 3]


def test_wakers_come_and_go_while_the_engine_writes() -> None:
    log = KvEventLog()
    done = threading.Event()
    errors: list[BaseException] = []

    def come_and_go() -> None:
        try:
            while not done.is_set():
                log.watch(lambda: None)()
        except BaseException as error:
            errors.append(error)

    others = [threading.Thread(target=come_and_go) for _ in range(3)]
    for other in others:
        other.start()
    calls: list[int] = []
    stop = log.watch(lambda: calls.append(1))
    add(log, 2000)
    stop()
    done.set()
    for other in others:
        other.join(60)
    assert (len(calls), errors, log._wakers) == (2000, [], [])


def test_short_namespaces() -> None:
    assert short_namespace(b"") == ""
    names = {short_namespace(salt) for salt in (b"a", b"b", b"key-1\0a", bytes(16))}
    assert len(names) == 4
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in names)
