"""A load that cannot fit is refused before anything of it is loaded; automatic sizes shrink first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mullama.config import ServeConfig
from mullama.engine.engine import Engine
from mullama.engine.memory import fits, sizing
from mullama.engine.memory.sizing import DEFAULT_CTX, DEFAULT_PARALLEL, Sizes
from mullama.engine.weights import load
from mullama.errors import MemoryTooSmall, ModelLoadError
from mullama.machine import memory as machine_memory
from mullama.models.files.estimate import Estimate, estimate

PLENTY = 1 << 50


class Memory:
    """What is free, as ``memory.available_memory`` tells it."""

    free: int | None = PLENTY


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory()
    monkeypatch.setattr(machine_memory, "available_memory", lambda: found.free)
    return found


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No weights and no context may be made."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was loaded")

    with monkeypatch.context() as patch:
        for module, name in ((load, "load_model"), (load, "make_core"), (load, "Model"), (load, "Core")):
            patch.setattr(module, name, never)
        yield


def needs(path: Path, config: ServeConfig, n_ctx: int, n_parallel: int) -> Estimate:
    found = fits.expected(path, config, n_ctx=n_ctx, n_parallel=n_parallel)
    assert found is not None
    return found


@pytest.mark.usefixtures("untouched")
def test_nothing_is_loaded_of_what_cannot_fit(tiny_model: Callable[..., Path], memory: Memory) -> None:
    config = ServeConfig(ctx_size=4096, parallel=4)
    total = needs(tiny_model(), config, 4096, 4).total
    memory.free = total - 5
    with pytest.raises(
        MemoryTooSmall,
        match=r"^big with 4 x 4096 tokens does not fit: [\d.]+ MB of memory \(weights .*, KV .*, buffers .*\), "
        r"[\d.]+ MB are free; lower --ctx-size or --parallel, ",
    ) as refused:
        Engine.load(tiny_model(), name="big", config=config)
    assert (refused.value.missing, refused.value.status, refused.value.code) == (5, 409, "memory_too_small")
    memory.free = 1000
    with pytest.raises(MemoryTooSmall, match=r"m with 1 x 256 tokens does not fit.*; choose a smaller quantisation"):
        Engine.load(tiny_model(), name="m")


def test_what_just_fits_is_loaded_with_the_sizes_that_were_checked(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "KV_SHARE", 1.0)
    config = ServeConfig(ctx_size=512, parallel=4, batch_size=64)
    memory.free = needs(tiny_model(), config, 512, 4).total
    engine = make_engine()
    assert (engine.info.n_ctx, engine.info.n_parallel) == (512, 4)
    memory.free = needs(tiny_model(), ServeConfig(batch_size=64), 1024, 3).total
    engine = make_engine(ctx_size=1024, parallel=0)
    assert (engine.info.n_ctx, engine.info.n_parallel) == (1024, 3)


def test_automatic_sizes_shrink_to_what_fits(
    tiny_model: Callable[..., Path], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "KV_SHARE", 1.0)  # else a half of it is left free first
    path, config = tiny_model(), ServeConfig()
    least = needs(path, config, 256, 1).total
    assert fits.sizes_for(path, config, "m") == Sizes(min(DEFAULT_CTX, trained(path)), DEFAULT_PARALLEL)
    memory.free = least
    assert fits.sizes_for(path, config, "m") == Sizes(256, 1)
    memory.free = least - 1
    with pytest.raises(MemoryTooSmall):
        fits.sizes_for(path, config, "m")
    wide = ServeConfig(parallel=3)
    memory.free = needs(path, wide, 768, 3).total
    assert fits.sizes_for(path, wide, "m") == Sizes(768, 3)
    memory.free = needs(path, config, 256, 3).total - 1
    with pytest.raises(MemoryTooSmall, match="3 x 256"):
        fits.sizes_for(path, wide, "m")


def trained(path: Path) -> int:
    return int(fits.header_of(path).get("{arch}.context_length"))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "lfm2"])
@given(free=st.integers(0, 1 << 26), ctx=st.sampled_from([0, 300, 2048]), parallel=st.sampled_from([0, 1, 5]))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_chosen_fits_and_what_is_refused_does_not(
    tiny_model: Callable[..., Path], memory: Memory, arch: str, free: int, ctx: int, parallel: int
) -> None:
    path, config = tiny_model(arch), ServeConfig(ctx_size=ctx, parallel=parallel)
    memory.free = free
    try:
        sizes = fits.sizes_for(path, config, "m")
    except MemoryTooSmall as refused:
        least = needs(path, config, ctx or 256, parallel or 1).total
        assert (refused.missing, least > free) == (least - free, True)
        return
    assert sizes is not None
    assert needs(path, config, sizes.n_ctx, sizes.n_parallel).total <= free
    assert sizes.n_ctx == ctx or (not ctx and sizes.n_ctx <= DEFAULT_CTX)
    assert sizes.n_parallel == parallel or (not parallel and 1 <= sizes.n_parallel <= DEFAULT_PARALLEL)


def test_settings_count(tiny_model: Callable[..., Path], memory: Memory) -> None:
    """Each setting that changes what is allocated changes what is refused."""
    path = tiny_model()
    memory.free = 1
    plain = ServeConfig(ctx_size=2048, parallel=4)
    totals = []
    for more in ({}, {"kv_type_k": "q8_0"}, {"flash_attn": "off"}, {"batch_size": 64}, {"kv_type_v": "q4_0"},
                 {"kv_layout": "unified", "kv_tokens": 4096}):  # fmt: skip
        config = ServeConfig(**{"ctx_size": 2048, "parallel": 4, **more})
        with pytest.raises(MemoryTooSmall) as refused:
            fits.sizes_for(path, config, "m")
        totals.append(refused.value.missing + 1)
    assert totals[0] == needs(path, plain, 2048, 4).total
    assert totals[5] == estimate(path, n_ctx=2048, n_parallel=4, kv_layout="unified", kv_tokens=4096).total
    assert len(set(totals)) == len(totals)


def test_adapters_of_the_model_count(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], tmp_path: Path, memory: Memory
) -> None:
    own = adapters.build(tmp_path / "own.gguf", tiny_model(), rank=8)
    foreign = adapters.build(tmp_path / "foreign.gguf", tiny_model("gemma3"))
    lora = [f"own={own}", f"foreign={foreign}", f"none={tmp_path / 'none.gguf'}", "odd"]
    config = ServeConfig(ctx_size=512, parallel=4, batch_size=64, lora=lora)
    memory.free = 1
    with pytest.raises(MemoryTooSmall, match=", adapters ") as refused:
        fits.sizes_for(tiny_model(), config, "m")
    memory.free = PLENTY
    (loaded,) = make_engine(lora=lora[:2]).weights.loras()
    counted = refused.value.missing + 1 - needs(tiny_model(), config, 512, 4).total
    assert counted == pytest.approx(loaded["size_bytes"], rel=0.1)


def test_switched_off_it_is_tried(make_engine: Callable[..., Engine], memory: Memory) -> None:
    memory.free = 1000
    engine = make_engine(memory_check="off", kv_host_bytes=0)
    assert (engine.info.n_ctx, engine.info.n_parallel) == (512, 4)
    with pytest.raises(MemoryTooSmall):
        make_engine()


def test_nothing_is_said_where_nobody_knows(
    tiny_model: Callable[..., Path], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.free = None
    assert fits.sizes_for(tiny_model(), ServeConfig(), "m") is None
    memory.free = 1
    monkeypatch.setattr(fits, "devices", lambda: [{"type": "gpu", "name": "CUDA0", "memory_free": 1 << 40}])
    assert fits.sizes_for(tiny_model(), ServeConfig(ctx_size=1 << 20), "m") is None
    fits.check(tiny_model(), ServeConfig(), "m", 1 << 20, 8)


def test_what_is_wrong_with_a_file_loading_it_tells(
    tiny_model: Callable[..., Path], tmp_path: Path, memory: Memory
) -> None:
    memory.free = 1
    for name, data in (("absent", None), ("cut", tiny_model().read_bytes()[:5000]), ("text", b"no model at all" * 9)):
        path = tmp_path / f"{name}.gguf"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ModelLoadError, match=name) as failed:
            Engine.load(path)
        assert not isinstance(failed.value, MemoryTooSmall)
        fits.check(path, ServeConfig(), "m", 512, 4)


def test_a_file_that_was_replaced_is_read_again(
    tiny_model: Callable[..., Path], tmp_path: Path, memory: Memory
) -> None:
    path = Path(shutil.copy(tiny_model(), tmp_path / "model.gguf"))
    config = ServeConfig(ctx_size=512, parallel=1)
    before = needs(path, config, 512, 1)
    assert needs(path, config, 512, 1) == before
    shutil.copy(tiny_model("gemma3"), tmp_path / "new.gguf")
    (tmp_path / "new.gguf").replace(path)
    assert needs(path, config, 512, 1) == needs(tiny_model("gemma3"), config, 512, 1) != before
