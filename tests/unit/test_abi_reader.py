"""Reading the instrumentation page, against a page written here in Python by the law of abi.h."""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
import threading
from pathlib import Path

import pytest

from mullama import abi

N_ROWS, N_EVENTS = 3, 8


class FakePage:
    """A page in a bytearray; ``put_*`` follow the writer's law."""

    def __init__(self) -> None:
        counters_at = ctypes.sizeof(abi.Header)
        rows_at = counters_at + ctypes.sizeof(abi.Counters)
        events_at = rows_at + N_ROWS * ctypes.sizeof(abi.Row)
        size = events_at + N_EVENTS * ctypes.sizeof(abi.Event)
        self.data = bytearray(size)
        self.header = abi.Header.from_buffer(self.data)
        self.header.magic = abi.MAGIC
        self.header.version = abi.VERSION
        self.header.header_size = ctypes.sizeof(abi.Header)
        self.header.page_size = size
        self.header.counters_offset, self.header.counters_size = counters_at, ctypes.sizeof(abi.Counters)
        self.header.rows_offset, self.header.row_size, self.header.n_rows = rows_at, ctypes.sizeof(abi.Row), N_ROWS
        self.header.events_offset, self.header.n_events = events_at, N_EVENTS
        self.header.event_size = ctypes.sizeof(abi.Event)
        self.counters = abi.Counters.from_buffer(self.data, counters_at)
        self.rows = [abi.Row.from_buffer(self.data, rows_at + i * ctypes.sizeof(abi.Row)) for i in range(N_ROWS)]
        self.events = [
            abi.Event.from_buffer(self.data, events_at + i * ctypes.sizeof(abi.Event)) for i in range(N_EVENTS)
        ]

    @staticmethod
    def seal(block: ctypes.Structure) -> None:
        words = struct.unpack(f"={ctypes.sizeof(block) // 8}Q", bytes(block))
        block.checksum = sum(words[1:-1]) & (2**64 - 1)

    def put_counters(self, **values: int) -> None:
        self.counters.lock += 1
        for name, value in values.items():
            setattr(self.counters, name, value)
        self.seal(self.counters)
        self.counters.lock += 1

    def put_row(self, index: int, **values: int) -> None:
        self.rows[index].lock += 1
        for name, value in values.items():
            setattr(self.rows[index], name, value)
        self.seal(self.rows[index])
        self.rows[index].lock += 1

    def put_event(self, index: int, kind: int, a: int = 0) -> None:
        event = self.events[index % N_EVENTS]
        event.seq, event.kind, event.a, event.time_ns = index + 1, kind, a, 1000 + index


@pytest.fixture
def page() -> FakePage:
    return FakePage()


def test_a_page_nobody_wrote_to_reads_as_zeros(page: FakePage) -> None:
    reader = abi.Reader(page.data)
    assert set(abi.as_dict(reader.counters()).values()) == {0}
    assert [row.handle for row in reader.rows()] == [0] * N_ROWS
    assert list(reader.events()) == []


def test_what_was_written_is_read(page: FakePage) -> None:
    page.put_counters(steps=7, cells_used=2**63)
    page.put_row(1, handle=5, slot=1, state=abi.DECODE, priority=-3)
    reader = abi.Reader(page.data)
    assert reader.counters().steps == 7
    assert reader.counters().cells_used == 2**63
    row = reader.row(1)
    assert (row.handle, row.slot, row.priority, abi.SLOT_STATES[row.state]) == (5, 1, -3, "decode")


def test_as_dict_leaves_the_bookkeeping_out(page: FakePage) -> None:
    page.put_counters(steps=7)
    counters = abi.as_dict(abi.Reader(page.data).counters())
    assert counters["steps"] == 7
    assert "lock" not in counters and "checksum" not in counters


def test_a_row_that_is_not_there(page: FakePage) -> None:
    reader = abi.Reader(page.data)
    for slot in (-1, N_ROWS):
        with pytest.raises(IndexError, match=f"slot {slot}"):
            reader.row(slot)


def test_a_block_being_written_is_not_believed(page: FakePage) -> None:
    page.put_counters(steps=7)
    reader = abi.Reader(page.data)
    page.counters.lock += 1  # the writer is inside
    with pytest.raises(abi.AbiError, match="during every attempt"):
        reader.counters()
    page.counters.lock += 1
    assert reader.counters().steps == 7


def test_a_torn_block_is_not_believed(page: FakePage) -> None:
    """The lock looks well, but the words are of two writes: a processor that reorders stores."""
    page.put_counters(steps=7)
    page.counters.steps = 8
    with pytest.raises(abi.AbiError):
        abi.Reader(page.data).counters()


def test_a_reader_waits_for_the_writer(page: FakePage) -> None:
    page.put_row(0, handle=1, prompt_tokens=10)
    page.rows[0].lock += 1
    reader = abi.Reader(page.data)
    timer = threading.Timer(0.002, lambda: setattr(page.rows[0], "lock", page.rows[0].lock + 1))
    timer.start()
    row = None
    while row is None:
        try:
            row = reader.row(0)
        except abi.AbiError:
            continue
    timer.join()
    assert row.prompt_tokens == 10


def test_events_in_order_and_from_where_one_left_off(page: FakePage) -> None:
    for index in range(5):
        page.put_event(index, kind=5, a=index)
    page.put_counters(events=5)
    reader = abi.Reader(page.data)
    assert [event.a for event in reader.events()] == [0, 1, 2, 3, 4]
    first, second, *_ = reader.events()
    assert [event.a for event in reader.events(since=second.seq)] == [2, 3, 4]
    assert first.seq == 1


def test_a_full_ring_keeps_the_last_ones(page: FakePage) -> None:
    for index in range(3 * N_EVENTS + 2):
        page.put_event(index, kind=5, a=index)
    page.put_counters(events=3 * N_EVENTS + 2)
    events = [event.a for event in abi.Reader(page.data).events()]
    assert events == list(range(2 * N_EVENTS + 2, 3 * N_EVENTS + 2))


def test_an_event_overwritten_meanwhile_is_left_out(page: FakePage) -> None:
    for index in range(4):
        page.put_event(index, kind=5, a=index)
    page.put_counters(events=4)
    page.put_event(1 + N_EVENTS, kind=5, a=99)  # not counted yet, but already in place
    page.events[2].seq = 0  # being written
    assert [event.a for event in abi.Reader(page.data).events()] == [0, 3]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic", 0, "magic number"),
        ("magic", int.from_bytes(b"GGUF\0\0\0\0", "little"), "magic number"),
        ("version", abi.VERSION + 1, f"layout version {abi.VERSION + 1}"),
        ("version", 0, "layout version 0"),
        ("row_size", ctypes.sizeof(abi.Row) + 8, "layout version"),
        ("page_size", 1 << 30, "shorter than its header says"),
    ],
)
def test_what_is_not_such_a_page_is_rejected(page: FakePage, field: str, value: int, message: str) -> None:
    setattr(page.header, field, value)
    with pytest.raises(abi.AbiError, match=message):
        abi.Reader(page.data)


@pytest.mark.parametrize("size", [1, 8, ctypes.sizeof(abi.Header) - 1])
def test_too_short(size: int) -> None:
    with pytest.raises(abi.AbiError, match="too short"):
        abi.Reader(bytes(size))


def test_attach_maps_the_file(page: FakePage, tmp_path: Path) -> None:
    file = tmp_path / "a.page"
    file.write_bytes(page.data)
    reader = abi.Reader.attach(file)
    assert reader.counters().steps == 0
    page.put_counters(steps=9)
    with file.open("r+b") as out, mmap.mmap(out.fileno(), 0) as mapping:
        mapping[:] = bytes(page.data)
    assert reader.counters().steps == 9, "a live view, not a copy"


def test_a_closed_page_says_so_to_who_has_it_open(page: FakePage, tmp_path: Path) -> None:
    file = tmp_path / "a.page"
    file.write_bytes(page.data)
    reader = abi.Reader.attach(file)
    assert not reader.is_closed
    page.header.closed_ns = 5
    with file.open("r+b") as out, mmap.mmap(out.fileno(), 0) as mapping:
        mapping[:] = bytes(page.data)
    assert reader.is_closed
    page.header.header_size = abi.Header.closed_ns.offset
    assert not abi.Reader(page.data).is_closed, "a header without that field: what lies there means something else"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_who_holds_the_lock_is_alive(page: FakePage, tmp_path: Path) -> None:
    import fcntl

    file = tmp_path / "1-x-0.page"
    file.write_bytes(page.data)
    assert not abi.is_alive(file)
    with file.open("r+b") as engine:
        fcntl.flock(engine, fcntl.LOCK_EX)
        assert abi.is_alive(file)
        abi.Reader.attach(file).counters()
    assert not abi.is_alive(file)
    with pytest.raises(FileNotFoundError):
        abi.is_alive(tmp_path / "none.page")


def test_attach_to_what_is_not_a_page(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        abi.Reader.attach(tmp_path / "none.page")
    (tmp_path / "text.page").write_bytes(b"hello" * 100)
    with pytest.raises(abi.AbiError):
        abi.Reader.attach(tmp_path / "text.page")


def test_attach_to_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.page").touch()
    with pytest.raises(abi.AbiError):
        abi.Reader.attach(tmp_path / "empty.page")


def test_the_runtime_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert abi.runtime_dir() == tmp_path / "mullama"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert abi.runtime_dir() != tmp_path / "missing" / "mullama"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert abi.runtime_dir().name.startswith("mullama-")


def test_blocks_are_whole_words() -> None:
    for block in (abi.Header, abi.Counters, abi.Row, abi.Event):
        assert ctypes.sizeof(block) % 8 == 0
        last = block._fields_[-1]
        end = getattr(block, last[0])
        assert end.offset + end.size == ctypes.sizeof(block), "no padding at the end: the checksum is the last word"
