"""What /proc and the allocator say, and how it is read."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from mullama.observe import process_memory
from mullama.observe.process_memory import Mapping, Pages

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells it")
PAGE = mmap.PAGESIZE

SMAPS = """\
7f10-7f20 r--p 00000000 08:01 123                        /srv/my models/a.gguf
Size:                400 kB
Rss:                 300 kB
Pss:                 150 kB
Pss_Dirty:             7 kB
VmFlags: rd mr mw me
7f20-7f30 rw-p 00000000 00:00 0
Rss:                9000 kB
Pss:                9000 kB
7f30-7f40 rw-p 00000000 00:00 0                          [heap]
Rss:                9000 kB
Pss:                9000 kB
7f40-7f50 r-xp 00001000 08:01 124                        /usr/lib/libc.so.6
Rss:                 800 kB
Pss:                  10 kB
7f50-7f60 r--p 00002000 08:01 123                        /srv/my models/a.gguf
Rss:                 100 kB
Pss:                  50 kB
"""


def test_mappings_of_a_file_are_added_up() -> None:
    assert process_memory.parse_mappings(SMAPS) == [
        Mapping("libc.so.6", 800 * 1024, 10 * 1024),
        Mapping("a.gguf", 400 * 1024, 200 * 1024),
    ]


def test_fields() -> None:
    text = "55d0-7ffd ---p 00000000 00:00 0   [rollup]\nRss:   12 kB\nTHPeligible:  1\nPss:\t3 kB\nVmFlags: rd\n"
    assert process_memory.parse_fields(text) == {"Rss": 12 * 1024, "Pss": 3 * 1024}


@LINUX
def test_the_process_is_the_sum_of_its_pages() -> None:
    found = process_memory.process_memory()
    assert found is not None
    assert found.rss == found.anonymous + found.file
    assert 0 < found.pss <= found.rss
    assert found.anonymous > 1 << 20


@LINUX
def test_memory_counts_when_it_is_touched() -> None:
    n = 64
    with mmap.mmap(-1, n * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        address = _address(area)
        ranges = [(address, n * PAGE)]
        assert process_memory.resident(ranges) == [Pages()]
        area[0] = 1
        area[10 * PAGE : 20 * PAGE] = b"x" * (10 * PAGE)
        found = process_memory.resident([*ranges, (address + 10 * PAGE, PAGE), (address + 30 * PAGE, PAGE)])
        assert found == [Pages(anonymous=11 * PAGE), Pages(anonymous=PAGE), Pages()]
        # A range counts for no more than it has, also where it ends within a page.
        assert process_memory.resident([(address + 12 * PAGE + 100, PAGE + 50)]) == [Pages(anonymous=PAGE + 50)]


@LINUX
def test_reading_untouched_memory_takes_none() -> None:
    with mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        assert area[3 * PAGE] == 0  # from the page of zeros that all share
        assert process_memory.resident([(_address(area), 8 * PAGE)]) == [Pages()]


@LINUX
def test_pages_of_a_file_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (8 * PAGE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=3) as area:
        assert sum(area[i * PAGE] for i in range(8)) == 8 * ord("x")
        assert process_memory.resident([(_address(area), 8 * PAGE)]) == [Pages(file=8 * PAGE)]
        area[0] = 1  # a copy of its own
        assert process_memory.resident([(_address(area), 8 * PAGE)]) == [Pages(file=7 * PAGE, anonymous=PAGE)]
        mapped = {one.file: one for one in process_memory.mapped_files() or []}
        assert mapped["file"].rss == 8 * PAGE


@LINUX
def test_a_large_range_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "_CHUNK_PAGES", 3)
    with mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[:] = b"y" * (16 * PAGE)
        assert process_memory.resident([(_address(area), 16 * PAGE)]) == [Pages(anonymous=16 * PAGE)]


def test_where_nothing_is_mapped_nothing_counts() -> None:
    assert process_memory.resident([(PAGE, PAGE)]) in ([Pages()], None)


def test_a_system_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process_memory, "_SELF", tmp_path / "proc")
    assert process_memory.process_memory() is None
    assert process_memory.mapped_files() is None
    assert process_memory.resident([(0, PAGE)]) is None


def test_the_heap_grows_by_what_is_handed_out() -> None:
    before = process_memory.heap_in_use()
    if before is None:
        pytest.skip("this C library does not tell")
    held = bytearray(48 << 20)  # beyond the largest threshold above which malloc maps memory of its own
    after = process_memory.heap_in_use()
    assert after is not None
    assert 48 << 20 <= after - before < 56 << 20
    assert len(held) == 48 << 20
    assert process_memory.heap_free() is not None


def test_only_the_first_baseline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory._Baseline, "anonymous", None)
    assert process_memory.baseline() == 0
    process_memory.note_baseline()
    first = process_memory.baseline()
    monkeypatch.setattr(process_memory, "process_memory", lambda: pytest.fail("asked again"))
    process_memory.note_baseline()
    assert process_memory.baseline() == first


def _address(area: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(area, dtype=np.uint8).ctypes.data)
