"""The page as the compiler has it, as Python reads it, and as another process sees it while it changes."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from core_support import Driver, greedy

from mullama import abi
from mullama._core import Model, Page
from mullama._core.output.page import block_sizes, layout, site_table
from mullama.engine.weights.load import _sweep

BLOCKS = {"header": abi.Header, "counters": abi.Counters, "row": abi.Row, "event": abi.Event}


def test_offsets_and_sizes_equal_the_compilers() -> None:
    mirrored = [
        (block, name, getattr(kind, name).offset, getattr(kind, name).size)
        for block, kind in BLOCKS.items()
        for name, _ in kind._fields_  # type: ignore[misc]
    ]
    assert mirrored == layout()


def test_block_sizes_equal_the_compilers() -> None:
    assert {block: ctypes.sizeof(kind) for block, kind in BLOCKS.items()} == block_sizes()


def test_sites_equal_the_compilers() -> None:
    assert {number: name for name, (number, _) in site_table().items()} == abi.SITES
    assert all(doc for _, doc in site_table().values())


def test_enums_equal_the_headers() -> None:
    """The numbers of abi.h, read from its text; the core's own states come out of it in every other test here."""
    header = Path(abi.__file__).with_name("abi.h")
    if not header.is_file():
        pytest.skip("abi.h is not installed")
    text = header.read_text(encoding="utf-8")
    numbers = {}
    for line in text.splitlines():
        words = line.replace(",", " ").split()
        if len(words) >= 3 and words[0].startswith(("MULLAMA_SLOT_", "MULLAMA_FINISH_")) and words[1] == "=":
            numbers[words[0]] = int(words[2])
    assert {f"MULLAMA_SLOT_{n.upper()}": i for i, n in abi.SLOT_STATES.items()} | {
        f"MULLAMA_FINISH_{n.upper()}": i for i, n in abi.FINISH_REASONS.items()
    } == numbers
    assert f"MULLAMA_ABI_VERSION {abi.VERSION}u" in text
    assert f"0x{abi.MAGIC:016X}ull" in text


def test_the_header_of_a_fresh_page() -> None:
    page = Page(3, None, 16)
    header = abi.Reader(page.buffer()).header
    assert (header.magic, header.version, header.n_rows, header.n_events) == (abi.MAGIC, abi.VERSION, 3, 16)
    assert header.header_size == ctypes.sizeof(abi.Header)
    assert header.page_size == len(page.buffer())
    for offset in (header.counters_offset, header.rows_offset, header.events_offset):
        assert offset % 64 == 0
    assert abs(time.monotonic_ns() - header.created_ns) < 60e9


def test_the_page_is_read_only_for_readers() -> None:
    with pytest.raises(TypeError):
        Page(1).buffer()[0] = 1


@pytest.mark.parametrize(("n_rows", "n_events"), [(0, 8), (-1, 8), (1, 0), (1, 12), (1, -8)])
def test_pages_that_make_no_sense(n_rows: int, n_events: int) -> None:
    with pytest.raises(ValueError, match="n_rows must be positive"):
        Page(n_rows, None, n_events)


def test_the_file_is_private_and_goes_with_close(tmp_path: Path) -> None:
    path = tmp_path / "x.page"
    page = Page(1, path)
    assert page.path == str(path)
    assert path.stat().st_mode & 0o077 == 0
    reader = abi.Reader.attach(path)
    assert abi.is_alive(path) and not reader.is_closed
    page.close()
    page.close()
    assert not path.exists()
    assert reader.counters().steps == 0, "who has it open may go on reading"
    assert reader.is_closed


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_pages_of_dead_engines_are_swept_whatever_their_pids_mean(tmp_path: Path) -> None:
    """Of containers that share the folder: a pid may be somebody else's here, or nobody's."""
    own = [f"{os.getpid()}-m-0.page", f"{2**22 + 1}-m-1.page"]  # a living pid; one that no process has
    alive = [Page(1, tmp_path / f"{os.getpid()}-alive-0.page"), Page(1, tmp_path / f"{2**22 + 1}-alive-1.page")]
    for name in (*own, "notes.page", "1-m.txt"):
        (tmp_path / name).write_bytes(b"x" * 200)
    _sweep(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"notes.page", "1-m.txt", *(Path(page.path).name for page in alive)}
    for page in alive:
        page.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_page_that_is_swept_as_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    real, path, sweeps = fcntl.flock, tmp_path / "1-m-0.page", [True]

    def flock(fd: int, how: int) -> None:
        if sweeps and how == fcntl.LOCK_EX:
            sweeps.pop()
            path.unlink()  # another engine had the lock first
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    page = Page(1, path)
    assert not sweeps and path.exists() and abi.is_alive(path)
    page.close()


def test_counters_rows_and_events_of_a_request(core: Driver) -> None:
    output = core.generate("HELLO", greedy(5), slot=2, arrival_ns=123, priority=-4, evicted=7)
    reader = abi.Reader(core.core.page.buffer())
    counters = core.core.counters_dict()
    assert counters["opened"] == counters["finished_length"] == 1
    assert counters["prefill_tokens"] == 5 and counters["decode_tokens"] == 4 and counters["sampled_tokens"] == 5
    assert counters["ubatches"] == counters["steps"] == 5
    assert counters["running"] == counters["retained"] == counters["cells_used"] == 0
    assert (output.facts.arrival_ns, output.facts.priority, output.facts.kv_cache_evict) == (123, -4, 7)
    kinds = [abi.SITES[event.kind] for event in reader.events()]
    assert kinds[:3] == ["OPEN", "UBATCH_BEGIN", "UBATCH_END"]
    assert kinds.count("SAMPLE") == 5
    assert kinds[-2:] == ["FINISH", "CLOSE"]
    samples = [event.a for event in reader.events() if event.kind == 5]
    assert samples == output.tokens


def test_events_are_numbered_in_order_of_time(core: Driver) -> None:
    core.generate("HELLO", greedy(30))
    events = list(abi.Reader(core.core.page.buffer()).events())
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    times = [event.time_ns for event in events]
    assert times == sorted(times)


def test_the_event_ring_keeps_the_last_ones(core: Driver) -> None:
    reader = abi.Reader(core.core.page.buffer())
    since = 0
    while reader.counters().events <= 2 * reader.header.n_events:
        core.generate("HELLO", greedy(400))
        events = list(reader.events(since))
        since = events[-1].seq
    core.core.counters_dict()  # publishes the last ones
    events = list(reader.events())
    assert len(events) == reader.header.n_events
    assert events[-1].seq == reader.counters().events


CHILD = """
import json, sys
from mullama import abi
reader = abi.Reader.attach(sys.argv[1])
while reader.counters().finished_length == 0:
    pass
row = reader.row(0)
print(json.dumps([abi.as_dict(reader.counters()), abi.as_dict(row), reader.header.pid]))
"""


def test_another_process_attaches(make_core: Callable[..., Driver], model: Model, tmp_path: Path) -> None:
    driver = make_core(model, page_path=str(tmp_path / "x.page"))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "x.page")], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    driver.open("HELLO", greedy(20))
    driver.prefill()
    driver.core.run([0], [])
    out, _ = child.communicate(timeout=60)
    counters, row, pid = json.loads(out)
    assert pid == os.getpid()
    assert counters["sampled_tokens"] == 20
    assert (row["prompt_tokens"], row["completion_tokens"], row["finish_reason"]) == (5, 20, 2)
    driver.finish_all()


def test_reads_while_the_engine_writes_are_whole(make_core: Callable[..., Driver], model: Model) -> None:
    """A thread decodes without the GIL; every copy of counters and rows is consistent in itself and grows only."""
    driver = make_core(model, n_slots=2, n_ctx=4096)
    for slot in (0, 1):
        driver.open("HELLO", greedy(4000), slot=slot)
    driver.prefill()
    reader = abi.Reader(driver.core.page.buffer())
    failures: list[BaseException] = []

    def decode() -> None:
        try:
            while driver.slots_in(abi.DECODE) == [0, 1] and not enough.is_set():
                driver.core.run([0, 1], [], 200)
        except BaseException as error:
            failures.append(error)

    def drain() -> None:
        while thread.is_alive():
            driver.read_records(driver.core.drain_records())
            time.sleep(0.001)

    enough = threading.Event()
    thread = threading.Thread(target=decode)
    drainer = threading.Thread(target=drain)
    thread.start()
    drainer.start()
    last_steps = last_tokens = 0
    changes = 0
    for _ in range(10_000):
        counters, row = reader.counters(), reader.row(0)
        assert counters.sampled_tokens == counters.decode_tokens + 2, "one token each from the prompts"
        assert counters.ubatches >= counters.steps - 1
        assert counters.steps >= last_steps
        assert row.handle == 1
        assert row.cells == row.prompt_tokens + row.completion_tokens - 1, "the last token is not computed yet"
        assert row.completion_tokens >= last_tokens
        assert row.ubatches == row.completion_tokens
        changes += counters.steps != last_steps
        last_steps, last_tokens = counters.steps, row.completion_tokens
    enough.set()
    driver.core.interrupt()
    thread.join()
    drainer.join()
    assert not failures
    assert changes > 10, "the writer was at work meanwhile"
    for slot in (0, 1):
        driver.core.cancel(slot)
