"""A disk that takes a part of a file and no more, wherever something is written: one clear error, nothing half-placed.

RLIMIT_FSIZE stands for the disk: the system cuts a write short and then refuses the next.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from models_support import FakePip, make_gguf, make_wheel

from mullama.cli.progress import LoadProgress
from mullama.errors import DiskFull, StoreError
from mullama.files import disk_errors, write_text
from mullama.models.parse import parse_reference
from mullama.models.sources import pypi
from mullama.models.store.pulling import pull
from mullama.models.store.store import Store
from mullama.types import Finish, FinishReason, Profile
from mullama.web.profile_log import ProfileLog


@contextmanager
def disk_of(n_bytes: int) -> Iterator[None]:
    """No file grows beyond ``n_bytes`` inside."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_every_full_disk_is_the_same_error(number: int) -> None:
    with pytest.raises(DiskFull, match="cannot keep it: the disk is full") as caught, disk_errors("keep it"):
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value, StoreError)
    assert (caught.value.status, caught.value.code) == (507, "disk_full")


# -- the store -----------------------------------------------------------------------------------------------------

DATA = make_gguf()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    (tmp_path / "index").mkdir()
    make_wheel(tmp_path / "index", "tiny", {"m.gguf": DATA})
    monkeypatch.setattr(pypi, "run_pip", FakePip(tmp_path / "index"))
    return Store(tmp_path / "home")


def placed(store: Store) -> list[str]:
    """Models and refs; what is under ``tmp`` belongs to nobody."""
    return sorted(p.name for folder in (store.blobs, store.refs) for p in folder.glob("*"))


@pytest.mark.parametrize("n_bytes", [0, 1, 50, 150, 200, 250, 300, 400, 500, len(DATA) - 1])
def test_a_pull_is_whole_or_not_at_all(store: Store, n_bytes: int) -> None:
    """Each limit stops another of its files: the wheel, the model, its ref."""
    reference = parse_reference("pypi:tiny")
    try:
        with disk_of(n_bytes):
            entry = pull(store, reference)
    except StoreError as error:
        assert "\n" not in error.message
        assert store.list() == [] and not list(store.refs.glob("*")), "a ref without its model, or half of one"
    else:
        assert store.path_of(entry).read_bytes() == DATA  # only what is noted for later was not written
    entry = pull(store, reference)
    assert store.path_of(entry).read_bytes() == DATA
    assert [one.key for one in store.list()] == ["pypi:tiny"]
    assert len(placed(store)) == 2
    assert not [p for p in store.tmp.iterdir() if p.is_dir()]


@pytest.mark.parametrize("n_bytes", [0, 1, 100, 200])
def test_a_name_is_given_whole_or_not_at_all(store: Store, n_bytes: int) -> None:
    pull(store, parse_reference("pypi:tiny"))
    with pytest.raises(StoreError, match="cannot copy pypi:tiny to mine"), disk_of(n_bytes):
        store.copy("pypi:tiny", "mine")
    assert [one.key for one in store.list()] == ["pypi:tiny"]
    store.copy("pypi:tiny", "mine")
    assert sorted(one.key for one in store.list()) == ["mine", "pypi:tiny"]


# -- what a user asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("n_bytes", [0, 1, 4096])
def test_a_file_is_written_whole_or_stays_what_it_was(tmp_path: Path, n_bytes: int, is_there: bool) -> None:
    """Costs that took an hour to measure, say, which the next ones were to replace."""
    path = tmp_path / "costs.json"
    if is_there:
        path.write_text("measured before")
    with pytest.raises(OSError, match="File too large"), disk_of(n_bytes):
        write_text(path, "x" * 100_000)
    assert [p.read_text() for p in tmp_path.iterdir()] == (["measured before"] if is_there else [])
    path.touch()
    path.chmod(0o640)
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640


def test_a_link_and_a_file_in_a_folder_of_others_are_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, link = tmp_path / "a", tmp_path / "b"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"

    def refuse(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", refuse)
    write_text(target, "newer")
    assert target.read_text() == "newer" and len(list(tmp_path.iterdir())) == 2
    write_text(Path("/dev/null"), "nothing")


# -- logs ----------------------------------------------------------------------------------------------------------

FINISH = Finish(FinishReason.STOP, Profile())


class Disk(io.RawIOBase):
    """A file on a disk with ``room`` bytes left."""

    def __init__(self) -> None:
        super().__init__()
        self.room = 1 << 30
        self.data = b""

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = bytes(data[: self.room])
        self.data += taken
        self.room -= len(taken)
        return len(taken)


@pytest.mark.parametrize("room", [0, 1, 700, 1500])
def test_the_profile_log_goes_on_when_there_is_room_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    log = ProfileLog(str(tmp_path / "p.jsonl"))
    log._file.close()
    disk = Disk()
    log._file = disk  # type: ignore[assignment]

    def write(*numbers: int) -> None:
        log._append([(0.0, {"n": n}, FINISH) for n in numbers])  # as its thread does

    write(1)
    disk.room = room
    write(2, 3, 4)
    write(5)
    disk.room = 1 << 30
    write(6)
    write(7)
    log.close()
    found = []
    for line in disk.data.splitlines():
        try:
            found.append(json.loads(line)["n"])
        except ValueError:
            assert room > 0, "a line is torn where the disk was full, and nowhere else"
    n_whole = len(found) - 3
    assert found == [1, *range(2, 2 + n_whole), 6, 7]
    said = [record.getMessage() for record in caplog.records if record.name == "mullama.web.profile_log"]
    assert said == [
        "the profile log loses lines: [Errno 28] No space left on device",
        f"the profile log goes on; {4 - n_whole} lines were lost",
    ]


def test_a_log_that_is_full_stops_no_load() -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with LoadProgress("m", Full()) as progress:
        progress._shown_from = 0.0
        assert progress(0.5)


def test_the_writer_of_kv_tells_the_log_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    from mullama.kv.tiers import disk_tier

    tier = disk_tier.DiskTier.__new__(disk_tier.DiskTier)
    tier._told = (0.0, "")
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            tier._tell(DiskFull("cannot keep KV: the disk is full"))
        tier._tell(StoreError("cannot keep KV: Input/output error"))
    assert len(caplog.records) == 2
