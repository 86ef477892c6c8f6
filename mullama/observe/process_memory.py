"""What the system says of this process's memory: its pages, what they belong to, what the allocator has handed out.

Linux tells all of it under ``/proc/self``; glibc's ``mallinfo2`` tells the rest. Elsewhere the answer is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SELF = Path("/proc/self")
_ENTRY = 8  # bytes of a page's entry in pagemap
_CHUNK_PAGES = 1 << 16


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes, as ``/proc/self/smaps_rollup`` has them."""

    rss: int  # pages in memory
    pss: int  # the same, pages that n processes share counted as 1/n
    anonymous: int  # of rss: memory of its own
    file: int  # of rss: pages of files and of shared memory
    swapped: int


@dataclass(frozen=True, slots=True)
class Mapping:
    """A file that is mapped, all its mappings together. Bytes."""

    file: str  # its name without the folder
    rss: int
    pss: int


@dataclass(frozen=True, slots=True)
class Pages:
    """Bytes in memory of a stretch of addresses, by whom the pages belong to."""

    file: int = 0
    anonymous: int = 0

    @property
    def total(self) -> int:
        return self.file + self.anonymous


def parse_fields(text: str) -> dict[str, int]:
    """``Name:  123 kB`` lines as bytes; other lines are left out."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        if unit == "kB" and number.isdecimal():
            found[name] = int(number) * 1024
    return found


def process_memory() -> ProcessMemory | None:
    """This process's memory now; None where the system does not say."""
    try:
        fields = parse_fields((_SELF / "smaps_rollup").read_text())
        rss, anonymous = fields["Rss"], fields["Anonymous"]
        return ProcessMemory(rss, fields["Pss"], anonymous, rss - anonymous, fields.get("Swap", 0))
    except (OSError, KeyError):
        return None


def mapped_files() -> list[Mapping] | None:
    """Files (and shared memory) that are mapped, the largest first; None where the system does not say."""
    try:
        return parse_mappings((_SELF / "smaps").read_text(errors="replace"))
    except OSError:
        return None


def parse_mappings(text: str) -> list[Mapping]:
    """The files of a ``smaps`` text."""
    sums: dict[str, tuple[int, int]] = {}
    path = ""
    for line in text.splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):  # 7f00-7f10 r--p 00000000 08:01 123   /path with spaces
            columns = line.split(None, 5)
            path = columns[5] if len(columns) == 6 and columns[5].startswith("/") else ""
        elif path and first in ("Rss:", "Pss:"):
            rss, pss = sums.get(path, (0, 0))
            n = int(rest.split()[0]) * 1024
            sums[path] = (rss + n, pss) if first == "Rss:" else (rss, pss + n)
    found = [Mapping(name.rpartition("/")[2], rss, pss) for name, (rss, pss) in sums.items()]
    return sorted(found, key=lambda one: -one.rss)


# The top byte of an entry: bit 7 present, bit 5 a file's page (or shared memory), bit 0 mapped by this process alone.
# The page of zeros that stands for memory nobody has written to is present and neither of the others: it takes nothing.
_IS_FILE = bytes(int(value & 0xA0 == 0xA0) for value in range(256))
_IS_OWN = bytes(int(value & 0xA1 == 0x81) for value in range(256))


def resident(ranges: Iterable[tuple[int, int]]) -> list[Pages] | None:
    """Which bytes of each (address, size) are in memory. None where the system does not say.

    A page counts whole, though never for more than the range has bytes. Where nothing is mapped, nothing counts.
    """
    page = mmap.PAGESIZE
    try:
        with (_SELF / "pagemap").open("rb", buffering=0) as pagemap:
            found = []
            for address, size in ranges:
                n_file = n_own = 0
                first, end = address // page, -(-(address + size) // page)
                for at in range(first, end, _CHUNK_PAGES):
                    pagemap.seek(at * _ENTRY)
                    top = pagemap.read(min(_CHUNK_PAGES, end - at) * _ENTRY)[7::_ENTRY]
                    n_file += top.translate(_IS_FILE).count(1)
                    n_own += top.translate(_IS_OWN).count(1)
                file = min(n_file * page, size)
                found.append(Pages(file, min(n_own * page, size - file)))
            return found
    except OSError:
        return None


class _MallInfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def heap_in_use() -> int | None:
    """Bytes that the C allocator has handed out and not got back; None where it does not say (glibc before 2.33)."""
    info = _mallinfo()
    return None if info is None else int(info.uordblks + info.hblkhd)


def heap_free() -> int | None:
    """Bytes that the C allocator keeps for later; not all of them are in memory."""
    info = _mallinfo()
    return None if info is None else int(info.fordblks)


def give_back_heap() -> None:
    """Let the C allocator give what it keeps back to the system: after much was freed, as when a model goes.

    It would keep hundreds of megabytes of small blocks. It takes milliseconds, and there is such a thing in glibc only.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _mallinfo() -> _MallInfo2 | None:
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError, AttributeError):
        function = ctypes.CDLL(None).mallinfo2
        function.restype = _MallInfo2
        found: _MallInfo2 = function()
        return found
    return None


class _Baseline:
    anonymous: int | None = None


def note_baseline() -> None:
    """Remember what the process takes before there is a model. Only the first call counts."""
    if _Baseline.anonymous is None:
        now = process_memory()
        _Baseline.anonymous = now.anonymous if now is not None else 0


def baseline() -> int:
    """Bytes of memory of its own that the process had before the first model; 0 when none was loaded."""
    return _Baseline.anonymous or 0
