"""An engine that sleeps: weights and context go, what its KV cache held is found again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_support import greedy
from kv_engine_support import EXACT, KINDS, tokens
from weights_support import Streams, request, say, wait_for_tokens

from mullama.engine.engine import Engine
from mullama.errors import InvalidRequest, MemoryTooSmall, ModelBusy, ModelLoadError, ModelNotLoaded
from mullama.types import Finish, Request

PROMPT = list(b"a prompt that is long enough to be worth keeping in memory, and then some more of it")


def finish_of(engine: Engine, prompt: list[int]) -> tuple[str, Finish]:
    generation = engine.submit_sync(Request("again", prompt, greedy(12)))
    text = "".join(delta.text for delta in generation)
    assert generation.finish is not None
    return text, generation.finish


def plain(make_engine: Callable[..., Engine]) -> str:
    engine = make_engine()
    say(engine, PROMPT)
    return finish_of(engine, [*PROMPT, 65])[0]


@pytest.mark.parametrize("level", ["host", "disk"])
def test_cached_kv_is_found_after_the_wake(make_engine: Callable[..., Engine], tmp_path: Path, level: str) -> None:
    expected = plain(make_engine)
    engine = make_engine(kv_host_bytes=1 << 24, kv_disk_dir=str(tmp_path / "kv"))
    say(engine, PROMPT)
    weights, spoken = engine.info.weights, engine.tokenize("ab")
    awake = engine.memory_report_sync()
    report = engine.weights.sleep(level)
    assert report.tokens >= len(PROMPT)
    assert (report.host_bytes > 0) is (level == "host")
    assert report.disk_bytes > 0 or level == "host"  # there it is written when there is time
    asleep = engine.memory_report_sync()
    assert asleep["weights"]["allocated_bytes"] == asleep["kv"]["allocated_bytes"] == 0
    assert awake["weights"]["allocated_bytes"] > 0 < awake["kv"]["allocated_bytes"]
    assert asleep["host_tier_bytes"] + asleep["staging_bytes"] == report.host_bytes
    assert engine.tokenize("ab") == spoken  # of the vocabulary, which stays
    assert engine.is_ready()
    assert engine.weights.wake() > 0
    text, finish = finish_of(engine, [*PROMPT, 65])
    assert text == expected
    assert (finish.profile.kv_cache_hit, str(finish.profile.kv_cache_source)) == (len(PROMPT), level)
    assert engine.info.weights == weights
    assert engine.kv.audit() == []


def test_without_a_tier_the_slots_are_saved(make_engine: Callable[..., Engine]) -> None:
    expected = plain(make_engine)
    engine = make_engine(kv_host_bytes=0)
    say(engine, PROMPT)
    report = engine.weights.sleep()
    assert report.host_bytes > 0
    assert engine.memory_report_sync()["staging_bytes"] == report.host_bytes
    engine.weights.wake()
    text, finish = finish_of(engine, [*PROMPT, 65])
    assert (text, finish.profile.kv_cache_hit) == (expected, len(PROMPT))


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("host_bytes", [0, 1 << 26])
def test_every_memory_sleeps(make_engine: Callable[..., Engine], tiny_model: Any, arch: str, host_bytes: int) -> None:
    """However KV is kept, answers are those of an engine that never slept, and of plain KV nothing is lost."""
    long = tokens(1, 150)
    awake, sleeper = (make_engine(tiny_model(arch), kv_host_bytes=host_bytes, **EXACT) for _ in range(2))
    for _ in range(3):
        text, finish = finish_of(awake, long)
        again, found = finish_of(sleeper, long)
        assert again == text
        assert found.profile.kv_cache_hit == finish.profile.kv_cache_hit or arch != "llama"
        assert sleeper.weights.sleep("host").tokens >= len(long)
        sleeper.weights.wake()


def test_a_busy_engine_does_not_sleep(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    streams = Streams(engine, [request("r", "the sun is here", 300)])
    wait_for_tokens(engine, 5)
    with pytest.raises(ModelBusy):
        engine.weights.sleep()
    streams.join()
    assert all(one.finish is not None and one.finish.error is None for one in streams.generations)
    engine.weights.sleep()  # and nothing is left of the one that was refused


def test_what_cannot_be(make_engine: Callable[..., Engine], tiny_model: Any, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_model(), tmp_path / "own.gguf"))
    engine = make_engine(path)
    with pytest.raises(InvalidRequest, match="--kv-disk-dir"):
        engine.weights.sleep("disk")
    with pytest.raises(InvalidRequest, match="level must be one of host, disk"):
        engine.weights.sleep("deep")
    assert engine.weights.wake() == 0.0
    say(engine, PROMPT)
    engine.weights.sleep()
    with pytest.raises(InvalidRequest, match="asleep already"):
        engine.weights.sleep()
    with pytest.raises(ModelNotLoaded):
        say(engine, PROMPT)
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(ModelLoadError, match="has changed, or gone"):
        engine.weights.wake()
    path.write_bytes(kept)
    with pytest.raises(ModelLoadError, match="has changed, or gone"):
        engine.weights.wake()  # another file, for all that anybody knows
    engine.close()


def test_a_load_that_fails_leaves_it_asleep(make_engine: Callable[..., Engine], monkeypatch: Any) -> None:
    from mullama.engine.weights import load

    engine = make_engine()
    say(engine, PROMPT)
    engine.weights.sleep()

    def fail(*_: Any) -> Any:
        raise ModelLoadError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(load, "load_model", fail)
        with pytest.raises(ModelLoadError, match="no memory"):
            engine.weights.wake()
    engine.weights.wake()
    assert finish_of(engine, [*PROMPT, 65])[1].profile.kv_cache_hit == len(PROMPT)


def test_a_wake_that_does_not_fit_loads_nothing(make_engine: Callable[..., Engine], monkeypatch: Any) -> None:
    from mullama.engine.memory import fits
    from mullama.engine.weights import load
    from mullama.machine import memory

    engine = make_engine()
    say(engine, PROMPT)
    needs = fits.expected(engine.info.path, engine.config, n_ctx=512, n_parallel=4)
    assert needs is not None
    engine.weights.sleep()

    def never(*_: Any) -> Any:
        raise AssertionError("something was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(load, "load_model", never)
        patch.setattr(memory, "available_memory", lambda: needs.total - 1)
        with pytest.raises(MemoryTooSmall, match=f"{engine.info.name} with 4 x 512 tokens does not fit"):
            engine.weights.wake()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: needs.total)
        engine.weights.wake()
    assert finish_of(engine, [*PROMPT, 65])[1].profile.kv_cache_hit == len(PROMPT)
