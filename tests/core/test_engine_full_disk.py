"""A disk that takes nothing more: what should wait there is said not to, and stays where it was."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kv_engine_support import EXACT, one, tokens

from mullama._core import Core, Model
from mullama.engine.engine import Engine
from mullama.errors import DiskFull, ModelLoadError
from mullama.kv.tiers import disk_tier as kvdisk

PROMPT = tokens(1, 100)
HOST_BYTES = [0, 1 << 26]

Make = Callable[..., Engine]


@contextmanager
def full_disk(number: int = errno.ENOSPC) -> Iterator[None]:
    """Every write(2) that this process makes through Python fails inside."""

    def fail(descriptor: int, data: Any) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", fail)
        yield


@pytest.fixture
def open_disk(make_engine: Make, tiny_model: Callable[..., Path], tmp_path: Path) -> Make:
    def get(arch: str = "llama", **options: Any) -> Engine:
        settings = {"parallel": 2, "kv_disk_dir": str(tmp_path / "kv"), "kv_host_bytes": 1 << 26, **EXACT, **options}
        return make_engine(tiny_model(arch), **settings)

    return get


def save(engine: Engine, prompt: list[int] = PROMPT) -> dict[str, Any]:
    return asyncio.run(engine.kv.asave(prompt))


def disk_view(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = engine.kv.snapshot()["tiers"]["disk"]
    return found


def settle(engine: Engine) -> None:
    """The writer has done what it was given, and the engine knows."""
    assert engine._kv.disk is not None
    engine._kv.disk.written().result()
    engine.call(lambda: None).result()


# -- kv/save -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("host_bytes", HOST_BYTES)
def test_a_save_is_an_error_and_the_kv_stays(open_disk: Make, host_bytes: int, number: int) -> None:
    engine = open_disk(kv_host_bytes=host_bytes)
    with full_disk(number):
        text = one(engine, PROMPT).text
        with pytest.raises(DiskFull, match=r"^0 of 100 cached tokens are on disk: .*the disk is full") as caught:
            save(engine)
    assert (caught.value.status, caught.value.code) == (507, "disk_full")
    told = disk_view(engine)
    assert told["not_written"] >= 2 and "the disk is full" in told["error"] and told["bytes_used"] == 0
    again = one(engine, PROMPT)
    assert (again.text, again.profile.kv_cache_hit) == (text, 99)
    assert again.profile.kv_cache_source in ("in_place", "copy")
    assert save(engine)["tokens"] == 100  # there is room again
    assert disk_view(engine)["error"] is None
    assert engine.kv.audit() == []


def test_a_save_of_which_only_a_part_is_written_says_so(open_disk: Make) -> None:
    engine = open_disk()
    one(engine, PROMPT)
    settle(engine)
    longer = [*PROMPT, *tokens(2, 100)]
    with full_disk():
        one(engine, longer)
        with pytest.raises(DiskFull, match=r"^100 of 200 cached tokens are on disk"):
            save(engine, longer)
    assert save(engine, longer)["tokens"] == 200


def test_a_save_of_what_the_disk_has_needs_no_room(open_disk: Make) -> None:
    engine = open_disk()
    one(engine, PROMPT)
    settle(engine)
    with full_disk():
        assert save(engine)["tokens"] == 100


def test_an_unexpected_error_in_the_writer_is_one_too(open_disk: Make) -> None:
    """A thread that dies would leave everybody waiting."""
    engine = open_disk()
    disk = engine._kv.disk
    assert disk is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk.store, "put", lambda *a, **k: 1 / 0)
        one(engine, PROMPT)
        with pytest.raises(Exception, match="division by zero"):
            save(engine)
    assert save(engine)["tokens"] == 100


def test_more_than_the_writer_takes_at_once_is_saved_all_the_same(
    open_disk: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvdisk, "MAX_PENDING", 1)  # one stretch at a time
    engine = open_disk()
    with full_disk():  # four stretches that the disk does not have
        for length in (40, 70, 100, 130):
            one(engine, [*tokens(1, length), *tokens(length, 30)])
    settle(engine)
    before = disk_view(engine)["not_written"]
    whole = [*tokens(1, 130), *tokens(130, 30)]
    assert save(engine, whole)["tokens"] == 160
    assert disk_view(engine)["not_written"] == before


# -- sleep ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_bytes", HOST_BYTES)
def test_an_engine_does_not_sleep_on_a_full_disk(open_disk: Make, host_bytes: int) -> None:
    engine = open_disk(kv_host_bytes=host_bytes)
    with full_disk():
        text = one(engine, PROMPT).text
        with pytest.raises(DiskFull, match=r"the model stays awake, .*the disk is full"):
            engine.weights.sleep("disk")
    assert engine.is_ready()
    again = one(engine, PROMPT)
    assert (again.text, again.profile.kv_cache_hit) == (text, 99)
    report = engine.weights.sleep("disk")
    assert report.tokens >= 100 and report.disk_bytes > 0
    engine.weights.wake()
    again = one(engine, PROMPT)
    assert (again.text, again.profile.kv_cache_hit, again.profile.kv_cache_source) == (text, 99, "disk")


def test_host_memory_is_not_given_up_for_a_full_disk(open_disk: Make) -> None:
    """Prefixes of which only host memory knows, because there are fewer slots."""
    engine = open_disk(parallel=1)
    with full_disk():
        texts = [one(engine, tokens(k, 100)).text for k in (1, 2, 3)]
        with pytest.raises(DiskFull):
            engine.weights.sleep("disk")
    found = [one(engine, tokens(k, 100)) for k in (1, 2, 3)]
    assert [answer.text for answer in found] == texts
    assert [answer.profile.kv_cache_hit for answer in found] == [99, 99, 99]
    assert engine.kv.audit() == []


@pytest.mark.parametrize("host_bytes", HOST_BYTES)
def test_a_sleep_in_memory_keeps_what_the_disk_does_not_take(open_disk: Make, host_bytes: int) -> None:
    engine = open_disk(kv_host_bytes=host_bytes)
    with full_disk():
        text = one(engine, PROMPT).text
        report = engine.weights.sleep("host")
        assert report.tokens >= 100 and report.host_bytes > 0
        engine.weights.wake()
        again = one(engine, PROMPT)
    assert (again.text, again.profile.kv_cache_hit) == (text, 99)
    assert engine.kv.audit() == []


def test_more_than_the_writer_takes_at_once_sleeps_on_disk(open_disk: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_disk(parallel=2)
    with full_disk():
        for k in range(1, 7):
            one(engine, tokens(k, 100))
    settle(engine)
    before = disk_view(engine)["not_written"]
    monkeypatch.setattr(kvdisk, "MAX_PENDING", 1)
    assert engine.weights.sleep("disk").tokens >= 600
    engine.weights.wake()
    assert disk_view(engine)["not_written"] == before
    assert [one(engine, tokens(k, 100)).profile.kv_cache_hit for k in range(1, 7)] == [99] * 6


# -- the page ------------------------------------------------------------------------------------------------------


def test_a_page_for_which_there_is_no_room(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written into all the same, a mapping without blocks is a SIGBUS."""

    def fail(descriptor: int, offset: int, length: int) -> None:
        assert length >= os.fstat(descriptor).st_size
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    path = tmp_path / "x.page"
    with pytest.raises(ModelLoadError, match=r"page .* cannot be made: No space left on device"):
        Core(model, n_slots=1, n_ctx=512, page_path=str(path))
    core = Core(model, n_slots=1, n_ctx=512, page_path=str(path), page_needed=False)
    assert core.page.path == "" and len(core.page.buffer()) > 1000
    assert not path.exists()
    core.close()


def test_a_page_takes_no_file_that_is_there(model: Model, tmp_path: Path) -> None:
    """In a temporary folder that all may write to, somebody could have put a link."""
    other = tmp_path / "precious"
    other.write_text("not a page")
    link = tmp_path / "x.page"
    link.symlink_to(other)
    with pytest.raises(ModelLoadError, match="File exists"):
        Core(model, n_slots=1, n_ctx=512, page_path=str(link))
    assert other.read_text() == "not a page"
