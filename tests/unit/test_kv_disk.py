"""KV on disk: what is written comes back, and nothing else ever does."""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.errors import StoreError
from mullama.kv.tiers import disk_store as disk
from mullama.kv.tiers.disk_records import (
    _FIELDS,
    _MAGIC,
    ALTERED,
    CHUNK_TOKENS,
    FOREIGN,
    NO_FILE,
    NO_RECORD,
    PRELUDE_BYTES,
    SHORT,
    DiskRecord,
    Identity,
    Layout,
)
from mullama.kv.tiers.disk_store import UNFINISHED, UNREADABLE, DiskStore, load_secret

SECRET = b"a secret of the tests"
IDENTITY = Identity(
    weights="ab" * 32,
    architecture="llama",
    kv_type_k="f16",
    kv_type_v="f16",
    token_bytes=6,
    layout="rows",
    state_version="0c1e570",
)
REPOSITORY = Path(__file__).parents[2]


def path_of(n: int) -> bytes:
    """The bytes of the tokens 0, 1, … n - 1."""
    return b"".join(token.to_bytes(4, "little") for token in range(n))


def rows_of(n: int, token_bytes: int = IDENTITY.token_bytes) -> bytes:
    """``n`` rows, no two alike."""
    return b"".join(bytes((row * 7 + at * 31 + row // 256) % 256 for at in range(token_bytes)) for row in range(n))


def open_store(folder: Path, identity: Identity = IDENTITY, **options: Any) -> DiskStore:
    return DiskStore(folder, 1 << 20, identity, **{"secret": SECRET, **options})


def put(store: DiskStore, end: int = 5, start: int = 0, checkpoint: bytes | None = None) -> DiskRecord:
    return store.put(b"space", path_of(end), start, [rows_of(end - start)], checkpoint, sync=False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    store = open_store(tmp_path)
    yield store
    store.close()


def home_of(folder: Path, identity: Identity = IDENTITY) -> Path:
    return folder / identity.digest().hex()


def files_of(folder: Path) -> set[str]:
    """Names in the identity's folder, but for its lock."""
    return {path.name for path in home_of(folder).iterdir()} - {"lock", "owner"}


def scanned(folder: Path, **options: Any) -> tuple[list[DiskRecord], dict[str, int]]:
    """What a new process finds."""
    store = open_store(folder, **options)
    try:
        return list(store.scan()), dict(store.skipped)
    finally:
        store.close()


def test_numbers_that_make_no_sense_are_no_record_even_under_our_seal(tmp_path: Path) -> None:
    """Found by fuzzing: no tokens, a start behind the end, nothing in it."""
    store = open_store(tmp_path)
    sealer = store._sealer
    odd = [(0, 0, 0, None), (5, 3, 0, None), (2, 2, 0, None), (0, 1, 257, None)]
    for n, (start, end, namespace, checkpoint) in enumerate(odd):
        layout = Layout(start, end, namespace, IDENTITY.token_bytes, checkpoint)
        seals = bytes(max(layout.seals_bytes, 0))
        file = sealer.pack(layout, bytes(namespace), path_of(end), seals) + bytes(1000)
        (home_of(tmp_path) / f"{n:032x}.kv").write_bytes(file[: layout.n_bytes])
    assert list(store.scan()) == []
    assert store.skipped == {NO_RECORD: len(odd)}
    store.close()


# -- round trips


@st.composite
def segments(draw: st.DrawFn) -> dict[str, Any]:
    token_bytes = draw(st.integers(0, 9))
    end = draw(st.integers(1, 3 * CHUNK_TOKENS + 5))
    checkpoint = draw(st.none() | st.binary(max_size=50))
    start = draw(st.integers(0, end if checkpoint is not None else end - 1))
    rows = rows_of(end - start, token_bytes)
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    pieces = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    a = draw(st.integers(start, end))
    return {
        "identity": replace(IDENTITY, token_bytes=token_bytes),
        "namespace": draw(st.binary(max_size=256)),
        "tokens": path_of(end),
        "start": start,
        "rows": rows,
        "pieces": [memoryview(piece) if draw(st.booleans()) else piece for piece in pieces],
        "checkpoint": checkpoint,
        "part": (a, draw(st.integers(a, end))),
    }


@settings(deadline=None)
@given(segments())
def test_what_is_put_is_read_also_by_the_next_process(segment: dict[str, Any]) -> None:
    namespace, tokens, start, rows = (segment[name] for name in ("namespace", "tokens", "start", "rows"))
    end, token_bytes, checkpoint = len(tokens) // 4, segment["identity"].token_bytes, segment["checkpoint"]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder), segment["identity"])
        written = store.put(namespace, tokens, start, segment["pieces"], checkpoint, sync=False)
        size = store.size_of(namespace, start, end, None if checkpoint is None else len(checkpoint))
        assert written.n_bytes == size == written.path.stat().st_size == store.bytes_used
        store.close()
        store = open_store(Path(folder), segment["identity"])
        (found,) = store.scan()
        assert store.bytes_used == size
        assert not store.skipped
        for field in fields(DiskRecord):
            assert getattr(found, field.name) == getattr(written, field.name)
        assert (found.namespace, found.tokens, found.start, found.end) == (namespace, tokens, start, end)
        assert (found.token_bytes, found.has_checkpoint) == (token_bytes, checkpoint is not None)
        for a, b in (segment["part"], (start, end)):
            assert store.read(found, a, b) == rows[(a - start) * token_bytes : (b - start) * token_bytes]
        if checkpoint is not None:
            assert store.read_checkpoint(found) == checkpoint
        store.close()


def test_every_part_of_a_record(store: DiskStore) -> None:
    start, end = 3, 3 + 2 * CHUNK_TOKENS + 2
    record = put(store, end, start)
    rows, size = rows_of(end - start), IDENTITY.token_bytes
    for a in range(start, end + 1):
        for b in (*range(a, end, 7), *{a, min(a + 1, end), end}):
            assert store.read(record, a, b) == rows[(a - start) * size : (b - start) * size]


def test_whole_chunks_are_read_as_one_and_not_copied(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = put(store, 4 * CHUNK_TOKENS)
    seen: list[bytes] = []
    read_exactly = disk.read_exactly

    def spy(file: Any, n: int) -> bytes:
        seen.append(read_exactly(file, n))
        return seen[-1]

    monkeypatch.setattr(disk, "read_exactly", spy)
    assert store.read(record, CHUNK_TOKENS, record.end) is seen[0]
    assert len(seen) == 1
    seen.clear()
    store.read(record, 1, record.end - 1)
    assert [len(data) // IDENTITY.token_bytes // CHUNK_TOKENS for data in seen] == [1, 2, 1]


@pytest.mark.parametrize("part", [(-1, 2), (0, 2), (1, 6), (4, 3), (6, 7)])
def test_parts_that_the_record_does_not_hold(store: DiskStore, part: tuple[int, int]) -> None:
    record = put(store, 5, start=1)
    with pytest.raises(ValueError, match="is not part of"):
        store.read(record, *part)
    assert record in store


def test_there_may_be_no_checkpoint(store: DiskStore) -> None:
    record = put(store)
    with pytest.raises(ValueError, match="has no checkpoint"):
        store.read_checkpoint(record)
    assert store.read_checkpoint(put(store, checkpoint=b"")) == b""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": b""}, "not a path of tokens"),
        ({"tokens": b"12345"}, "not a path of tokens"),
        ({"namespace": bytes(257)}, "at most 256 bytes"),
        ({"start": -1}, r"no KV in \[-1, 2\)"),
        ({"start": 2, "payload": []}, r"no KV in \[2, 2\)"),
        ({"start": 3, "payload": []}, r"no KV in \[3, 2\)"),
        ({"start": 1}, "12 bytes are not 1 rows of 6 bytes"),
        ({"payload": [bytes(11)]}, "11 bytes are not 2 rows"),
    ],
)
def test_sizes_that_do_not_fit_together(store: DiskStore, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"namespace": b"", "tokens": path_of(2), "start": 0, "payload": [bytes(12)], "checkpoint": None}
    with pytest.raises(ValueError, match=message):
        store.put(**{**good, **change})
    assert store.bytes_used == 0
    assert files_of(tmp_path) == set()
    assert store.put(**good).n_bytes == store.bytes_used


def test_names_are_random_and_nobody_else_may_read(store: DiskStore, tmp_path: Path) -> None:
    outside = set(tmp_path.parent.iterdir())
    old = os.umask(0)
    try:
        for namespace in (b"../../x", b"/etc/passwd", b"a\0b", b"../../x"):
            store.put(namespace, b"/../" * 3, 0, [b"../../" * 3], b"../x", sync=False)
    finally:
        os.umask(old)
    assert len(files_of(tmp_path)) == 4
    for name in files_of(tmp_path):
        assert re.fullmatch(r"[0-9a-f]{32}\.kv", name)
        assert stat.S_IMODE((home_of(tmp_path) / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(home_of(tmp_path).stat().st_mode) == 0o700
    assert set(tmp_path.iterdir()) == {home_of(tmp_path)}
    assert set(tmp_path.parent.iterdir()) == outside


# -- hostile files


def small_record(folder: Path, checkpoint: bytes | None = b"state") -> tuple[str, bytes]:
    """Name and contents of a file that a store has written."""
    store = open_store(folder)
    record = put(store, 3, checkpoint=checkpoint)
    store.close()
    return record.path.name, record.path.read_bytes()


def test_a_file_cut_at_any_byte_is_deleted(tmp_path: Path) -> None:
    name, data = small_record(tmp_path)
    store = open_store(tmp_path)
    for size in range(len(data)):
        (home_of(tmp_path) / name).write_bytes(data[:size])
        assert list(store.scan()) == []
        assert store.skipped == {SHORT: size + 1}
        assert files_of(tmp_path) == set()
        assert store.bytes_used == 0
    (home_of(tmp_path) / name).write_bytes(data + b"x")
    assert list(store.scan()) == []
    (home_of(tmp_path) / name).write_bytes(data)
    assert [record.tokens for record in store.scan()] == [path_of(3)]
    store.close()


def test_a_file_with_any_bit_changed_is_deleted_at_the_latest_when_it_is_read(tmp_path: Path) -> None:
    name, data = small_record(tmp_path)
    path = home_of(tmp_path) / name
    layout = Layout(0, 3, len(b"space"), IDENTITY.token_bytes, len(b"state"))
    store = open_store(tmp_path)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        records = list(store.scan())
        assert len(records) == (at >= layout.rows_at)  # a scan reads headers only
        for record in records:
            read = store.read_checkpoint if at >= layout.checkpoint_at else lambda record: store.read(record, 0, 1)
            with pytest.raises(StoreError, match=f"{name} is {ALTERED}; it was deleted"):
                read(record)
            assert record not in store
        assert not path.exists()
        assert store.bytes_used == 0
    assert store.skipped == {NO_RECORD: 8, FOREIGN: 32, ALTERED: layout.rows_at - 40}
    store.close()


def test_only_the_chunks_that_are_asked_for_need_be_sound(store: DiskStore) -> None:
    record = put(store, 3 * CHUNK_TOKENS)
    size = IDENTITY.token_bytes
    with record.path.open("r+b") as file:
        file.seek(record.layout.rows_at + CHUNK_TOKENS * size)
        file.write(b"!")
    assert store.read(record, 0, CHUNK_TOKENS) == rows_of(CHUNK_TOKENS)
    assert store.read(record, 2 * CHUNK_TOKENS, record.end) == rows_of(3 * CHUNK_TOKENS)[2 * CHUNK_TOKENS * size :]
    with pytest.raises(StoreError, match="damaged"):
        store.read(record, CHUNK_TOKENS - 1, CHUNK_TOKENS + 1)
    with pytest.raises(StoreError, match="is gone"):  # none of it is trusted any more
        store.read(record, 0, CHUNK_TOKENS)


def test_a_record_that_was_given_up_stays_so(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where its file could not be deleted, and is sound the next time."""
    record = put(store)
    data = record.path.read_bytes()
    record.path.write_bytes(bytes(len(data)))
    monkeypatch.setattr(disk, "_discard", lambda path: None)
    with pytest.raises(StoreError, match="damaged"):
        store.read(record, 0, 5)
    record.path.write_bytes(data)
    with pytest.raises(StoreError, match="is gone"):
        store.read(record, 0, 5)


def test_chunks_and_files_cannot_change_places(store: DiskStore) -> None:
    def exchanged(data: bytes, record: DiskRecord) -> bytes:
        at, size = record.layout.rows_at, record.layout.chunk_bytes(0)
        return data[:at] + data[at + size : at + 2 * size] + data[at : at + size] + data[at + 2 * size :]

    record = put(store, 2 * CHUNK_TOKENS)
    record.path.write_bytes(exchanged(record.path.read_bytes(), record))
    with pytest.raises(StoreError, match="damaged"):
        store.read(record, 0, 1)
    mine, other = put(store, 3), store.put(b"space", path_of(3), 0, [bytes(18)], None, sync=False)
    shutil.copy(other.path, mine.path)  # sound in itself, and of the same tokens
    with pytest.raises(StoreError, match="damaged"):
        store.read(mine, 0, 3)
    assert store.read(other, 0, 3) == bytes(18)


def test_a_file_cut_short_after_the_scan(store: DiskStore) -> None:
    record = put(store, 2 * CHUNK_TOKENS, checkpoint=b"state")
    os.truncate(record.path, record.n_bytes - 2)
    assert store.read(record, 0, record.end) == rows_of(record.end)
    with pytest.raises(StoreError, match=SHORT):
        store.read_checkpoint(record)
    record = put(store, 1)
    os.truncate(record.path, record.n_bytes - 1)
    assert list(store.scan()) == []
    assert store.bytes_used == 0
    record = put(store, 2 * CHUNK_TOKENS)
    os.truncate(record.path, record.layout.rows_at + 1)
    with pytest.raises(StoreError, match=SHORT):
        store.read(record, CHUNK_TOKENS, record.end)
    assert store.bytes_used == 0


@pytest.mark.parametrize("end", [1 << 20, (1 << 32) - 1])
def test_sizes_in_a_header_allocate_nothing(tmp_path: Path, end: int) -> None:
    name, data = small_record(tmp_path)
    path = home_of(tmp_path) / name
    layout = Layout(0, end, 256, IDENTITY.token_bytes, 1 << 30)
    sizes = _FIELDS.pack(_MAGIC, IDENTITY.digest(), 0, end, 256, 1, 1 << 30)
    path.write_bytes(sizes + data[len(sizes) : PRELUDE_BYTES])
    os.truncate(path, layout.n_bytes)  # sparse: as large as it says
    store = open_store(tmp_path)
    tracemalloc.start()
    try:
        assert list(store.scan()) == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert store.skipped == {ALTERED: 1}
    assert not path.exists()
    store.close()


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "cd" * 32},
        {"architecture": "qwen2"},
        {"kv_type_k": "q8_0"},
        {"kv_type_v": "q8_0"},
        {"token_bytes": IDENTITY.token_bytes + 1},
        {"layout": "transposed"},
        {"state_version": "1"},
    ],
)
def test_another_identity_sees_nothing_and_touches_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    name, data = small_record(tmp_path)
    other = replace(IDENTITY, **change)
    store = open_store(tmp_path, other)
    assert list(store.scan()) == []
    assert (store.bytes_used, dict(store.skipped)) == (0, {})
    (home_of(tmp_path, other) / name).write_bytes(data)  # moved by hand
    assert list(store.scan()) == []
    assert (store.bytes_used, dict(store.skipped)) == (0, {FOREIGN: 1})
    renamed = data.replace(IDENTITY.digest(), other.digest(), 1)
    (home_of(tmp_path, other) / name).write_bytes(renamed)
    assert list(store.scan()) == []
    assert dict(store.skipped) == {FOREIGN: 1, ALTERED: 1}
    store.close()
    assert not (home_of(tmp_path, other) / name).exists()
    assert (home_of(tmp_path) / name).read_bytes() == data


def test_an_identity_has_no_seams() -> None:
    assert len(IDENTITY.digest()) == 32
    a = replace(IDENTITY, kv_type_k="f16f", kv_type_v="16")
    assert a.digest() != replace(IDENTITY, kv_type_k="f16", kv_type_v="f16").digest()
    assert IDENTITY.digest() == replace(IDENTITY).digest()


def test_who_has_not_the_secret_can_plant_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path, secret=b"not the secret at all")
    put(store)
    store.close()
    assert scanned(tmp_path) == ([], {ALTERED: 1})
    with pytest.raises(ValueError, match="16 bytes"):
        open_store(tmp_path, secret=b"short")


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    name, data = small_record(tmp_path)
    home, target = home_of(tmp_path), tmp_path / "elsewhere"
    (home / name).rename(target)
    (home / name).symlink_to(target)
    os.mkfifo(home / f"{'1' * 32}.kv")
    (home / f"{'2' * 32}.kv").mkdir()
    (home / f"{'3' * 32}.kv").symlink_to("/nowhere")
    assert scanned(tmp_path) == ([], {NO_FILE: 4})
    assert target.read_bytes() == data
    assert files_of(tmp_path) == {f"{'2' * 32}.kv"}  # a folder is not ours to delete


def test_a_record_that_becomes_a_link_is_not_followed(store: DiskStore, tmp_path: Path) -> None:
    record = put(store)
    target = tmp_path / "elsewhere"
    record.path.rename(target)
    record.path.symlink_to(target)
    with pytest.raises(StoreError, match="a link"):
        store.read(record, 0, 5)
    assert target.exists()
    assert files_of(tmp_path) == set()


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    home_of(tmp_path).symlink_to(target)
    with pytest.raises(StoreError, match="is a link; remove it"):
        open_store(tmp_path)
    assert list(target.iterdir()) == []


def test_files_with_other_names_are_left_alone(store: DiskStore, tmp_path: Path) -> None:
    names = {"notes.txt", "x.kv", f"{'a' * 31}.kv", f"{'A' * 32}.kv", f"{'a' * 32}.kv.bak", "backup.part"}
    for name in names:
        (home_of(tmp_path) / name).write_bytes(b"x")
    record = put(store)
    assert list(store.scan()) == [record]
    assert files_of(tmp_path) == names | {record.path.name}
    assert not store.skipped


def test_a_file_that_cannot_be_read_now_is_kept(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = put(store)

    def fail(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "read_exactly", fail)
        assert list(store.scan()) == []
        with pytest.raises(StoreError, match=r"cannot read KV record .*: Input/output error"):
            store.read(record, 0, 5)
    assert store.skipped == {UNREADABLE: 1}
    assert store.read(record, 0, 5) == rows_of(5)


def test_one_line_in_the_log_says_what_was_no_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, data = small_record(tmp_path)
    for number in range(3):
        (home_of(tmp_path) / f"{number:032x}.kv").write_bytes(data[:-1])
    (home_of(tmp_path) / f"{9:032x}.kv").write_bytes(bytes(500))
    (home_of(tmp_path) / f"{0:016x}-4.part").write_bytes(data)
    with caplog.at_level(logging.INFO, logger=disk.__name__):
        records, skipped = scanned(tmp_path)
        assert scanned(tmp_path)[1] == {}
    assert [record.path.name for record in records] == [name]
    assert skipped == {SHORT: 3, NO_RECORD: 1, UNFINISHED: 1}
    (message,) = caplog.messages
    assert message.endswith(f": 5 files are no use: 3 {SHORT}, 1 {UNFINISHED}, 1 {NO_RECORD}")


# -- a scan


def test_the_oldest_comes_first(store: DiskStore) -> None:
    records = [put(store, end) for end in (3, 1, 2)]
    for age, record in enumerate(records):
        os.utime(record.path, (1000 - age, 1000 - age))
    assert list(store.scan()) == records[::-1]
    assert store.bytes_used == sum(record.n_bytes for record in records)  # once each, however often they are scanned


def test_a_scan_spares_what_this_process_is_writing(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home_of(tmp_path) / f"{0:016x}-4.part").write_bytes(b"of a process that was killed")
    write = os.write
    seen: list[set[str]] = []

    def write_and_scan(descriptor: int, data: Any) -> int:
        n = write(descriptor, data)
        assert list(store.scan()) == []
        seen.append(files_of(tmp_path))
        return n

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_and_scan)
        record = put(store)
    assert [len(names) for names in seen] == [1, 1]  # its own, after the rows and after the header
    assert store.read(record, 0, 5) == rows_of(5)


# -- kill -9

_WRITER = """
import itertools, os, sys, time
from pathlib import Path
from mullama.kv.tiers.disk_store import DiskStore
from mullama.kv.tiers.disk_records import Identity

store = DiskStore(Path(sys.argv[1]), 1 << 30, Identity(**eval(sys.argv[2])), secret=bytes.fromhex(sys.argv[3]))
if sys.argv[4] == "half":
    write = os.write
    def half(descriptor, data):
        written = write(descriptor, data[:len(data) // 2])
        print("inside", flush=True)
        time.sleep(60)
    os.write = half
print("go", flush=True)
for number in itertools.count(1):
    row = number.to_bytes(4, "little") + b"xy"
    store.put(b"space", row[:4] * 500, 0, [row * 500], row * 1000, sync=number % 2 == 0)
    print(number, flush=True)
"""


def writer(folder: Path, *, how: str = "whole", said: str) -> subprocess.Popen[bytes]:
    """A process that writes records until it is killed; returns when it has said so.

    It says "go", then the number of each record when it is there; where it is to stop in a file "half" way, "inside".
    """
    identity = repr({field.name: getattr(IDENTITY, field.name) for field in fields(Identity)})
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", _WRITER, str(folder), identity, SECRET.hex(), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert said.encode() + b"\n" in process.stdout
    return process


def test_a_writer_killed_at_any_moment_leaves_sound_records(tmp_path: Path) -> None:
    n_expected = 0
    for n_records in (0, 1, 2, 5, 13, 30):
        with writer(tmp_path, said=str(n_records or "go")) as process:
            process.kill()
        n_expected += n_records
        store = open_store(tmp_path)
        records = list(store.scan())
        assert len(records) >= n_expected
        assert set(store.skipped) <= {UNFINISHED}
        assert store.skipped[UNFINISHED] <= 1
        for record in records:
            row = record.tokens[:4] + b"xy"
            assert store.read(record, 0, record.end) == row * 500
            assert store.read_checkpoint(record) == row * 1000
        assert files_of(tmp_path) == {record.path.name for record in records}
        store.close()


def test_a_writer_killed_inside_a_file(tmp_path: Path) -> None:
    with writer(tmp_path, how="half", said="inside") as process:
        process.kill()
    (name,) = files_of(tmp_path)
    assert name.endswith(".part")
    assert scanned(tmp_path) == ([], {UNFINISHED: 1})
    assert files_of(tmp_path) == set()


# -- disks that are full or fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_is_one_clear_error(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int
) -> None:
    kept, write, calls = put(store), os.write, iter(range(100))

    def fail(descriptor: int, data: Any) -> int:
        if next(calls) == after:
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(StoreError, match=r"cannot keep KV in .*: the disk is full"):
            put(store, 2 * CHUNK_TOKENS, checkpoint=b"state")
    assert files_of(tmp_path) == {kept.path.name}
    assert store.bytes_used == kept.n_bytes
    assert store.read(put(store), 0, 5) == rows_of(5)


def test_a_disk_that_takes_a_part_and_no_more(tmp_path: Path) -> None:
    """The system's own error after a write that was cut short."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = open_store(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(StoreError, match="File too large"):
            put(store, 400)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path) == set()
    assert store.bytes_used == 0
    store.close()


def test_short_writes_are_continued(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        record = put(store, CHUNK_TOKENS + 1, checkpoint=b"a state of some bytes")
    assert store.read(record, 0, record.end) == rows_of(record.end)
    assert store.read_checkpoint(record) == b"a state of some bytes"
    assert list(store.scan()) == [record]


def test_short_reads_are_continued(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, file: Any) -> None:
            self._file = file

        def read(self, n: int) -> Any:
            return self._file.read(min(n, 5))

    read_exactly = disk.read_exactly
    record = put(store, CHUNK_TOKENS + 1)
    monkeypatch.setattr(disk, "read_exactly", lambda file, n: read_exactly(Slow(file), n))
    assert store.read(record, 0, record.end) == rows_of(record.end)
    os.truncate(record.path, record.n_bytes - 1)
    with pytest.raises(StoreError, match=SHORT):
        store.read(record, 0, record.end)


@pytest.mark.parametrize("at", [0, 1])
def test_a_sync_that_fails_keeps_nothing(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Of the file, or of the folder after the rename."""
    calls = iter(range(100))

    def fail(descriptor: int) -> None:
        if next(calls) == at:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        store.put(b"", path_of(1), 0, [bytes(6)], None)
    assert files_of(tmp_path) == set()
    assert store.bytes_used == 0
    put(store)  # does not sync
    assert next(calls) == at + 1


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot keep KV in .*file"):
        open_store(tmp_path / "file")
    with pytest.raises(StoreError, match=r"cannot keep KV in .*file"):
        open_store(tmp_path / "file" / "under")


# -- files that vanish, the budget


def test_a_file_that_vanishes_under_us(store: DiskStore) -> None:
    record, other = put(store), put(store)
    record.path.unlink()
    assert record in store
    with pytest.raises(StoreError, match="is gone"):
        store.read(record, 0, 5)
    assert record not in store
    assert store.bytes_used == other.n_bytes
    other.path.unlink()
    assert list(store.scan()) == []
    store.remove(other)
    assert store.bytes_used == 0


def test_a_scan_survives_files_that_vanish_meanwhile(store: DiskStore) -> None:
    records = [put(store) for _ in range(3)]
    scan = store.scan()
    first = next(scan)
    for record in records:
        if record != first:
            record.path.unlink()
    assert list(scan) == []
    assert store.bytes_used == first.n_bytes


def test_removing(store: DiskStore, tmp_path: Path) -> None:
    record, other = put(store), put(store)
    store.remove(record)
    assert files_of(tmp_path) == {other.path.name}
    assert (record in store, other in store) == (False, True)
    assert store.bytes_used == other.n_bytes
    store.remove(record)
    with pytest.raises(StoreError, match="is gone"):
        store.read(record, 0, 5)
    other.path.unlink()
    other.path.mkdir()
    with pytest.raises(StoreError, match="cannot remove"):
        store.remove(other)
    assert store.bytes_used == other.n_bytes


def test_the_budget_is_told_and_left_to_the_caller(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 1000, IDENTITY, secret=SECRET)
    assert (store.budget_bytes, store.bytes_used) == (1000, 0)
    assert [store.over_budget(n) for n in (0, 1000, 1001)] == [0, 0, 1]
    record = put(store)
    assert store.bytes_used == record.n_bytes == record.path.stat().st_size
    assert store.over_budget(1000) == record.n_bytes
    while store.over_budget(0) == 0:
        put(store, 50)
    assert store.over_budget(7) == store.bytes_used + 7 - 1000
    store.close()


def test_threads_may_put_at_once(store: DiskStore) -> None:
    def work(number: int) -> None:
        for end in range(1, 20):
            found[number, end] = put(store, end)

    found: dict[tuple[int, int], DiskRecord] = {}
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 * 19
    assert store.bytes_used == sum(record.n_bytes for record in found.values())
    assert set(store.scan()) == set(found.values())
    for (_, end), record in found.items():
        assert store.read(record, 0, end) == rows_of(end)


# -- the key


def test_the_key_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = DiskStore(tmp_path / "kv", 1 << 20, IDENTITY)
    finally:
        os.umask(old)
    key = tmp_path / "kv" / "key"
    assert len(key.read_bytes()) == 32
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    record = put(store)
    store.close()
    assert scanned(tmp_path / "kv", secret=None) == ([record], {})
    other = DiskStore(tmp_path / "kv2", 1 << 20, IDENTITY)
    assert (tmp_path / "kv2" / "key").read_bytes() != key.read_bytes()
    other.close()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    load_secret(tmp_path)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(StoreError, match=f"mode {mode:o}.*chmod 600"):
        DiskStore(tmp_path, 1 << 20, IDENTITY)
    (tmp_path / "key").chmod(0o600)
    DiskStore(tmp_path, 1 << 20, IDENTITY).close()


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "key").write_bytes(bytes(size))
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(StoreError, match="not a key of 32 bytes; remove it"):
        DiskStore(tmp_path, 1 << 20, IDENTITY)


def test_a_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_secret(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StoreError, match="not to 12345"):
        load_secret(tmp_path)


def test_a_key_that_is_no_file_is_refused(tmp_path: Path) -> None:
    load_secret(tmp_path)
    (tmp_path / "key").rename(tmp_path / "elsewhere")
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="not a plain file; remove it"):
        load_secret(tmp_path)


def test_a_key_whose_maker_was_killed_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "key.part").write_bytes(b"half")
    key = load_secret(tmp_path)
    assert (tmp_path / "key").read_bytes() == key
    assert {path.name for path in tmp_path.iterdir()} - {"key.lock"} == {"key"}


def test_processes_that_start_at_once_make_one_key(tmp_path: Path) -> None:
    """Each is slow where it matters: after it has seen that there is no key."""
    code = (
        "import sys, time; from pathlib import Path; from mullama.kv.tiers import disk_store as disk\n"
        "make = disk._make_key\n"
        "disk._make_key = lambda path: (time.sleep(0.2), make(path))\n"
        "print('ready', flush=True); sys.stdin.readline(); print(disk.load_secret(Path(sys.argv[1])).hex())"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    keys = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert keys == {(tmp_path / "key").read_bytes().hex()}


# -- the lock


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(StoreError, match=f"is used by process {os.getpid()}; give this one another folder"):
        open_store(tmp_path)
    other = open_store(tmp_path, replace(IDENTITY, layout="another"))  # another part of the same folder
    other.close()
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(60)
    open_store(tmp_path).close()


def test_the_owner_may_be_another_process(tmp_path: Path) -> None:
    with writer(tmp_path, how="half", said="inside") as process:
        with pytest.raises(StoreError, match=f"is used by process {process.pid};"):
            open_store(tmp_path)
        (home_of(tmp_path) / "owner").write_bytes(b"rm -rf /")
        with pytest.raises(StoreError, match="is used by another process;"):
            open_store(tmp_path)
        assert any(name.endswith(".part") for name in files_of(tmp_path))  # nobody swept what it writes
        process.kill()
    open_store(tmp_path).close()


def test_a_closed_store_does_nothing_more(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record = put(store, checkpoint=b"state")
    store.close()
    store.close()
    for action in (
        lambda: put(store),
        lambda: list(store.scan()),
        lambda: store.read(record, 0, 5),
        lambda: store.read_checkpoint(record),
        lambda: store.remove(record),
    ):
        with pytest.raises(StoreError, match="is closed"):
            action()
    assert scanned(tmp_path) == ([record], {})
