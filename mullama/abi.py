"""Reading the instrumentation page with nothing but ctypes. Layout and law: ``abi.h``.

Stands alone: copy this file next to a tool and it reads the page of any running mullama::

    reader = Reader.attach(path)
    reader.counters().steps

A test compares every offset here with the compiler's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

MAGIC = 0x00414D414C4C554D  # b"MULLAMA\0", little-endian
VERSION = 5

u32, i32, u64, i64 = ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int64

FREE, RETAINED, PREFILL, DECODE, DONE = range(5)  # MULLAMA_SLOT_*
SLOT_STATES = {0: "free", 1: "retained", 2: "prefill", 3: "decode", 4: "done"}
KV_SOURCES = {0: "none", 1: "in_place", 2: "copy", 3: "host", 4: "disk"}
FINISH_REASONS = {0: "none", 1: "stop", 2: "length", 3: "cancelled", 4: "error"}
CORE_ERRORS = {
    1: "not_finite",
    2: "sampler",
    3: "decode",
    4: "no_kv",
    5: "adapter",
    6: "constraint",
}  # why one ended with "error"
SITES = {
    1: "OPEN", 2: "PLAN", 3: "UBATCH_BEGIN", 4: "UBATCH_END", 5: "SAMPLE", 6: "FINISH", 7: "CLOSE", 8: "MOVE",
    9: "EVICT", 10: "THREADS", 11: "RING_STALL", 12: "IDLE", 13: "PREEMPT", 14: "RESUME",
    15: "STORE", 16: "RESTORE", 17: "COPY", 18: "SHIFT", 19: "WEIGHTS",
}  # fmt: skip


class AbiError(Exception):
    """The page is not one, was written by another version, or could not be read whole."""


_Block = TypeVar("_Block", bound=ctypes.Structure)


class Header(ctypes.Structure):
    _fields_ = [
        ("magic", u64), ("version", u32), ("header_size", u32), ("page_size", u64),
        ("counters_offset", u32), ("counters_size", u32), ("rows_offset", u32), ("row_size", u32), ("n_rows", u32),
        ("events_offset", u32), ("event_size", u32), ("n_events", u32), ("pid", u64), ("created_ns", u64),
        ("closed_ns", u64),
    ]  # fmt: skip


class Counters(ctypes.Structure):
    """Sums since the engine started; see abi.h for each."""

    _fields_ = [(name, u64) for name in (
        "lock", "heartbeat_ns", "steps", "ubatches", "split_ubatches", "decode_ns", "busy_ns", "sample_ns", "commit_ns",
        "plans", "plan_ns", "gil_wait_ns", "prefill_tokens", "decode_tokens", "sampled_tokens", "graphs_reused",
        "ring_stalls", "ring_stall_ns", "wakeups", "events", "opened", "finished_stop", "finished_length", "cancelled",
        "failed", "kv_hit_tokens", "kv_miss_tokens", "kv_evict_tokens", "kv_moves", "kv_move_bytes", "kv_move_ns",
        "decode_retries", "thread_changes", "threads", "running", "waiting", "retained", "cells_used",
        "preemptions", "swap_bytes", "swap_ns", "parked", "parked_bytes",
        "kv_store_bytes", "kv_store_ns", "kv_restore_bytes", "kv_restore_ns", "kv_copy_bytes", "kv_copy_ns",
        "turn_wait_ns", "weight_swaps", "weight_swap_bytes", "weight_swap_ns", "weight_pause_ns",
        "weight_first_ns", "adapter_switches", "adapter_ubatches", "checksum",
    )]  # fmt: skip


class Row(ctypes.Structure):
    """One slot: the sequence that lives in it, or lived in it last."""

    _fields_ = [
        ("lock", u64), ("handle", u64), ("state", u32), ("slot", i32),
        ("arrival_ns", u64), ("opened_ns", u64), ("started_ns", u64), ("first_token_ns", u64), ("last_token_ns", u64),
        ("finished_ns", u64), ("prompt_tokens", u32), ("completion_tokens", u32), ("kv_cache_hit", u32),
        ("kv_cache_miss", u32), ("kv_cache_evict", u32), ("cells", u32), ("ubatches", u32), ("finish_reason", u32),
        ("batch_sum", u64), ("prefill_ns", u64), ("decode_ns", u64), ("sample_ns", u64),
        ("threads_min", u32), ("threads_max", u32), ("priority", i32), ("moves", u32),
        ("preemptions", u32), ("recomputed", u32), ("preempted_ns", u64),
        ("kv_cell_ns", u64), ("kv_source", u32), ("shifted", u32), ("checksum", u64),
    ]  # fmt: skip


class Event(ctypes.Structure):
    _fields_ = [
        ("seq", u64), ("time_ns", u64), ("handle", u64), ("kind", u32), ("slot", i32), ("a", i64), ("b", i64),
    ]  # fmt: skip


def as_dict(block: ctypes.Structure) -> dict[str, int]:
    """Plain numbers, without the lock and the checksum."""
    return {f[0]: getattr(block, f[0]) for f in block._fields_ if f[0] not in ("lock", "checksum")}


class Reader:
    """Reads a page: of this process (``Reader(page.buffer())``) or of another (``Reader.attach(path)``)."""

    def __init__(self, buffer: Any) -> None:
        self._view = memoryview(buffer).cast("B")
        if len(self._view) < ctypes.sizeof(Header):
            raise AbiError("too short to be an instrumentation page")
        self.header = Header.from_buffer_copy(self._view[: ctypes.sizeof(Header)])
        if self.header.magic != MAGIC:
            raise AbiError("not an instrumentation page (the magic number is wrong)")
        if self.header.version != VERSION or self.header.row_size != ctypes.sizeof(Row):
            raise AbiError(f"the page has layout version {self.header.version}, this reader knows {VERSION}")
        if self.header.page_size > len(self._view):
            raise AbiError("the page is shorter than its header says")

    @classmethod
    def attach(cls, path: str | os.PathLike[str]) -> Reader:
        """Map the page of a running engine, read-only."""
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size < ctypes.sizeof(Header):
                raise AbiError("too short to be an instrumentation page")
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    @property
    def is_closed(self) -> bool:
        """Whether its engine has ended, and said so: what is read is the last it wrote. See also ``is_alive``."""
        at = Header.closed_ns.offset
        if self.header.header_size < at + 8:
            return False  # an older engine, which never says
        return bool(struct.unpack_from("=Q", self._view, at)[0])

    def counters(self) -> Counters:
        return self._read(Counters, self.header.counters_offset)

    def row(self, slot: int) -> Row:
        if not 0 <= slot < self.header.n_rows:
            raise IndexError(f"slot {slot}: the page has {self.header.n_rows}")
        return self._read(Row, self.header.rows_offset + slot * self.header.row_size)

    def rows(self) -> list[Row]:
        return [self.row(slot) for slot in range(self.header.n_rows)]

    def events(self, since: int = 0) -> Iterator[Event]:
        """Events with index >= since that the ring still holds, oldest first. ``event.seq`` is the next ``since``."""
        total = self.counters().events
        for index in range(max(since, total - self.header.n_events, 0), total):
            at = self.header.events_offset + (index & (self.header.n_events - 1)) * self.header.event_size
            event = Event.from_buffer_copy(self._view[at : at + ctypes.sizeof(Event)])
            again = struct.unpack_from("=Q", self._view, at)[0]
            if event.seq == again == index + 1:
                yield event

    def _read(self, kind: type[_Block], at: int, tries: int = 10_000) -> _Block:
        """Copy a block until lock and checksum agree."""
        size = ctypes.sizeof(kind)
        words = struct.Struct(f"={size // 8}Q")
        for _ in range(tries):
            data = bytes(self._view[at : at + size])
            values = words.unpack(data)
            after = struct.unpack_from("=Q", self._view, at)[0]
            lock = values[0]
            if not any(values):
                return kind.from_buffer_copy(data)  # never written
            if lock & 1 == 0 and after == lock and sum(values[1:-1]) & 0xFFFFFFFFFFFFFFFF == values[-1]:
                return kind.from_buffer_copy(data)
        raise AbiError("the writer changed this block during every attempt to copy it")


def is_alive(path: str | os.PathLike[str]) -> bool:
    """Whether the engine of a page still runs, in whatever container: it holds a lock on the file until it ends.

    Where there are no such locks (Windows, some network file systems) every page counts as alive. Raises OSError.
    """
    with Path(path).open("rb") as file:
        try:
            import fcntl
        except ImportError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def runtime_dir() -> Path:
    """Where engines put their pages: $XDG_RUNTIME_DIR/mullama, else a folder of this user in the temporary one."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK):
        return Path(base) / "mullama"
    import tempfile

    user = os.getuid() if sys.platform != "win32" else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"mullama-{user}"
