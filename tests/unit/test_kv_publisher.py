"""The publisher over a real socket: what subscribers know, late ones, slow ones, the end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_block_support import Router, World
from test_kv_blocks import SPACES, operations, sizes

from mullama.errors import ConfigError
from mullama.kv.events import KvEvent, KvEventKind, KvEventLog, KvTier
from mullama.kv.index.tree import pack
from mullama.observe import kv_publisher
from mullama.observe.kv_publisher import KvPublisher

FREE = "tcp://127.0.0.1:*"
SECONDS = 30
END = (b"", (9, 9, 9, 9, 9, 9))  # a path of no other test: when it is known, all before it is


@pytest.fixture(autouse=True, scope="module")
def snapshots_come_quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_publisher, "SNAPSHOT_SECONDS", 0.02)
        yield


class Subscriber:
    """One SUB socket and the router behind it."""

    def __init__(self, endpoint: str, block_size: int, topic: str = "", **options: int) -> None:
        self.router = Router(block_size)
        self.numbers: list[int] = []  # of messages since it knows what there is
        self.topics: set[str] = set()
        self._knows = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        for name, value in options.items():
            self._socket.setsockopt(getattr(zmq, name), value)
        self._socket.connect(endpoint)
        self._topic = topic
        self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)

    def subscribe_again(self) -> None:
        self._knows = False
        self.numbers.clear()
        self._socket.setsockopt_string(zmq.UNSUBSCRIBE, self._topic)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, self._topic)

    def take(self, *, check: bool = True) -> list[str]:
        """Wait for a message; the kinds of its events. Without ``check`` only its number counts.

        What comes before everything is told is left out, as a router must.
        """
        assert self._socket.poll(SECONDS * 1000), "no message came"
        topic, number, payload = self._socket.recv_multipart()
        assert len(number) == 8
        self.topics.add(topic.decode())
        when, events, rank = msgspec.msgpack.decode(payload)
        assert rank == 0
        assert abs(time.time() - when) < 3600
        self._knows |= events[0] == ["AllBlocksCleared"]
        if self._knows:
            self.numbers.append(int.from_bytes(number, "big"))
            if check:
                self.router.take(events, SPACES)
        return [event[0] for event in events]

    def take_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.take()

    def is_quiet(self) -> bool:
        return self._socket.poll(50) == 0

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextmanager
def publishing(log: KvEventLog, block_size: int = 2) -> Iterator[KvPublisher]:
    publisher = KvPublisher(FREE, block_size=block_size)
    publisher.start({"model": log})
    try:
        yield publisher
    finally:
        publisher.close()
    assert log._wakers == []


@contextmanager
def subscribed(publisher: KvPublisher, block_size: int = 2, topic: str = "", **options: int) -> Iterator[Subscriber]:
    """A subscriber that has been told what there is."""
    subscriber = Subscriber(publisher.endpoint, block_size, topic, **options)
    try:
        subscriber.take_until(lambda: subscriber.router.n_cleared > 0)
        yield subscriber
    finally:
        subscriber.close()


def add(log: KvEventLog, kind: KvEventKind, tokens: list[int], *, gone: bool = False) -> None:
    log.append(KvEvent(log.next_seq(), 0, kind, KvTier.DEVICE, 0, len(tokens), b"", pack(tokens), gone=gone))


@given(size=sizes, steps=st.lists(operations, min_size=1, max_size=25), late=st.integers(0, 25))
@settings(deadline=None, max_examples=15)
def test_subscribers_know_the_blocks_that_are_held(size: int, steps: list[tuple[object, ...]], late: int) -> None:
    """One that was there from the start, and one that comes in the middle."""
    world = World()
    with publishing(world.log, size) as publisher, subscribed(publisher, size) as first:
        for name, *arguments in steps[:late]:
            getattr(world, str(name))(*arguments)
        with subscribed(publisher, size) as second:
            for name, *arguments in steps[late:]:
                getattr(world, str(name))(*arguments)
            world.hold("end", END)
            for subscriber in (first, second):
                end = (END[0], END[1][: len(END[1]) // size * size])
                subscriber.take_until(lambda subscriber=subscriber, end=end: end in subscriber.router.known)
                assert subscriber.router.known == world.blocks(size)
                start = subscriber.numbers[0]
                assert subscriber.numbers == list(range(start, start + len(subscriber.numbers)))
        assert publisher.n_lost == 0
        assert publisher.n_messages > 0


def test_everything_before_the_start_is_told() -> None:
    world = World()
    world.hold("slot 0", (b"salt", (1, 2, 3, 4)))
    with publishing(world.log) as publisher, subscribed(publisher) as subscriber:
        subscriber.take_until(lambda: subscriber.router.known == world.blocks(2))


def test_what_the_log_lost_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    world = World(log=KvEventLog(3))
    for n in range(10):
        world.hold(f"slot {n}", (b"", (n, n, n)))
    with publishing(world.log) as publisher, subscribed(publisher) as subscriber:
        subscriber.take_until(lambda: len(subscriber.router.known) == 3)
        assert publisher.n_lost == 7
        world.reuse("slot 0", 3)
        subscriber.take_until(lambda: len(subscriber.router.known) == 4)
        assert subscriber.router.known < world.blocks(2)
    assert "7 KV events of model were lost" in caplog.text


def test_a_loss_on_the_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(log=KvEventLog(5))
    with publishing(world.log) as publisher, subscribed(publisher) as subscriber:
        world.hold("slot 0", (b"", (1, 1)))
        subscriber.take_until(lambda: subscriber.router.known == world.blocks(2))
        n_cleared = subscriber.router.n_cleared
        # The thread cannot read while the log is locked, and then it is too late.
        entered, go_on = threading.Event(), threading.Event()
        since = world.log.since

        def held_up(seq: int) -> object:
            entered.set()
            assert go_on.wait(SECONDS)
            return since(seq)

        monkeypatch.setattr(world.log, "since", held_up)
        world.hold("slot 1", (b"", (2, 2)))
        assert entered.wait(SECONDS)
        for n in range(20):
            world.hold("slot 2", (b"", (3, n)))
        go_on.set()
        world.hold("end", END)
        subscriber.take_until(lambda: END in subscriber.router.known)
        assert subscriber.router.n_cleared == n_cleared + 1
        assert subscriber.router.known < world.blocks(2)
        assert publisher.n_lost > 0


def test_a_slow_subscriber_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses messages, sees that by their numbers, and knows everything again when it subscribes again."""
    monkeypatch.setattr(kv_publisher, "GATHER_SECONDS", 0.0)
    monkeypatch.setattr(kv_publisher, "QUEUED_MESSAGES", 10)  # the quick one has at most two
    size, n_tokens, n_paths = 32, 8192, 250  # 10 MB, more than the sockets hold
    log = KvEventLog()
    with (
        publishing(log, size) as publisher,
        subscribed(publisher, size, RCVHWM=1, RCVBUF=4096) as slow,
        subscribed(publisher, size) as quick,
    ):
        for first in range(100_000, 100_000 + n_paths):
            add(log, KvEventKind.STORED, [first] * n_tokens)
            if first > 100_000:
                add(log, KvEventKind.EVICTED, [first - 1] * n_tokens, gone=True)
            blocks = quick.router.blocks
            quick.take_until(
                lambda blocks=blocks, first=first: (
                    len(blocks) == n_tokens // size and (b"", (first,) * size) in blocks.values()
                )
            )
        assert publisher.n_lost == 0
        assert quick.numbers == list(range(quick.numbers[0], quick.numbers[-1] + 1))
        while not slow.is_quiet():
            slow.take(check=False)
        assert slow.numbers == sorted(set(slow.numbers))
        if len(slow.numbers) == quick.numbers[-1] - slow.numbers[0] + 1:
            pytest.skip("this machine's sockets held everything")
        slow.subscribe_again()
        slow.take_until(lambda: slow.router.n_cleared == 2)
        assert slow.router.blocks == quick.router.blocks


def test_every_model_has_its_topic() -> None:
    one, two = World(), World()
    publisher = KvPublisher(FREE, topic="kv@host@{model}", block_size=2)
    publisher.start({"one": one.log, "two": two.log})
    try:
        with (
            subscribed(publisher, topic="kv@host@one") as first,
            subscribed(publisher, topic="kv@host@two") as second,
        ):
            one.hold("slot 0", (b"", (1, 2)))
            two.hold("slot 0", (b"salt", (3, 4, 5, 6)))
            first.take_until(lambda: first.router.known == one.blocks(2))
            second.take_until(lambda: second.router.known == two.blocks(2))
            assert (first.topics, second.topics) == ({"kv@host@one"}, {"kv@host@two"})
            assert first.is_quiet() and second.is_quiet()
            assert first.numbers == [0, 1]
    finally:
        publisher.close()


def test_several_models_need_a_topic_each() -> None:
    publisher = KvPublisher(FREE, topic="kv")
    with pytest.raises(ConfigError, match=r"--kv-events-topic: it must hold \{model\}"):
        publisher.start({"one": KvEventLog(), "two": KvEventLog()})
    publisher.close()


def test_subscriptions_in_a_row_are_served_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_publisher, "SNAPSHOT_SECONDS", 0.5)
    world = World()
    world.hold("slot 0", (b"", (1, 2)))
    with publishing(world.log) as publisher, subscribed(publisher) as subscriber:
        n_messages = publisher.n_messages
        for _ in range(20):
            subscriber.subscribe_again()
        subscriber.take_until(lambda: subscriber.router.n_cleared == 2)
        assert subscriber.router.known == world.blocks(2)
        assert publisher.n_messages <= n_messages + 5


def test_the_end_clears_what_routers_know() -> None:
    world = World()
    publisher = KvPublisher(FREE, block_size=2)
    publisher.start({"model": world.log})
    with subscribed(publisher) as subscriber:
        world.hold("slot 0", (b"", (1, 2)))
        subscriber.take_until(lambda: subscriber.router.known == world.blocks(2))
        publisher.close()
        publisher.close()
        assert subscriber.take() == ["AllBlocksCleared"]
    assert not any(thread.name == "mullama-kv-publisher" for thread in threading.enumerate())
    world.hold("slot 1", (b"", (1, 2, 3, 4)))  # nobody listens any more


def test_it_closes_at_any_moment() -> None:
    world = World()
    stop = threading.Event()

    def write() -> None:
        n = 0
        while not stop.is_set():
            world.hold("slot 0", (b"", (n % 7, 1, 2)))
            n += 1
            time.sleep(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for n in range(30):
            publisher = KvPublisher(FREE, block_size=1)
            publisher.start({"model": world.log})
            time.sleep(0.001 * (n % 5))
            closer = threading.Thread(target=publisher.close)
            closer.start()
            closer.join(SECONDS)
            assert not closer.is_alive()
    finally:
        stop.set()
        writer.join()


def test_closing_what_was_never_started_frees_the_port() -> None:
    publisher = KvPublisher(FREE)
    endpoint = publisher.endpoint
    with pytest.raises(ConfigError, match=f"cannot bind {endpoint}"):
        KvPublisher(endpoint)
    publisher.close()
    publisher.close()
    KvPublisher(endpoint).close()


@pytest.mark.parametrize(
    "endpoint", ["tcp://no.such.host:5557", "tcp://127.0.0.1:99999", "tcp://127.0.0.1:x", "ipc:///no/such/folder/x"]
)
def test_endpoints_that_cannot_be_had(endpoint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KvPublisher(endpoint)
    assert caught.value.message.startswith(f"--kv-events-endpoint: cannot bind {endpoint}: ")
    assert "\n" not in caught.value.message


def test_without_pyzmq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"needs pyzmq: pip install 'mullama\[router\]'"):
        KvPublisher(FREE)


def test_the_module_needs_neither_pyzmq_nor_compiled_code() -> None:
    code = "import sys; import mullama.observe.kv_publisher; assert not {'zmq', 'mullama._core'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_name_that_gets_another_log_and_then_none() -> None:
    """After a swap or a load the name goes on with the new engine's log; subscribers forget what was before."""
    first, second = KvEventLog(), KvEventLog()
    add(first, KvEventKind.STORED, [1, 2])
    publisher = KvPublisher(FREE, topic="kv-{model}", block_size=2)
    publisher.start({"a": first})
    try:
        with subscribed(publisher, topic="kv-") as subscriber:
            n_cleared = subscriber.router.n_cleared
            publisher.follow("a", second)
            add(second, KvEventKind.STORED, [3, 4])
            subscriber.take_until(lambda: subscriber.router.n_cleared > n_cleared)
            publisher.follow("a", None)
            n_cleared = subscriber.router.n_cleared
            subscriber.take_until(lambda: subscriber.router.n_cleared > n_cleared)
            assert subscriber.topics == {"kv-a"}
            deadline = time.monotonic() + SECONDS
            while publisher._sources and time.monotonic() < deadline:
                time.sleep(0.001)
            assert publisher._sources == first._wakers == second._wakers == []
    finally:
        publisher.close()
