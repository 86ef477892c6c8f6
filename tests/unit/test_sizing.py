"""Automatic sizes are arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama.engine.memory.sizing import (
    DEFAULT_CTX,
    DEFAULT_PARALLEL,
    fit_gpu_layers,
    fit_sizes,
)
from mullama.errors import ModelLoadError

GB = 1 << 30


def test_defaults_with_plenty_of_memory() -> None:
    sizes = fit_sizes(0, 0, 8192, 23040, 64 * GB)
    assert (sizes.n_ctx, sizes.n_parallel) == (DEFAULT_CTX, DEFAULT_PARALLEL)


def test_a_model_trained_on_little_gets_little() -> None:
    assert fit_sizes(0, 0, 2048, 23040, 64 * GB).n_ctx == 2048
    assert fit_sizes(0, 0, 0, 23040, 64 * GB).n_ctx == DEFAULT_CTX


def test_what_was_asked_for_is_kept() -> None:
    sizes = fit_sizes(1000, 3, 8192, 23040, 64 * GB)
    assert (sizes.n_ctx, sizes.n_parallel) == (1000, 3)


def test_what_cannot_fit_is_refused_with_the_flags_to_change() -> None:
    with pytest.raises(ModelLoadError, match="lower --ctx-size or --parallel"):
        fit_sizes(100_000, 8, 8192, 23040, GB)


def test_unknown_memory_or_cost_leaves_the_defaults() -> None:
    assert fit_sizes(0, 0, 8192, 23040, None).n_parallel == DEFAULT_PARALLEL
    assert fit_sizes(0, 0, 8192, 0, 1).n_parallel == DEFAULT_PARALLEL


@given(
    st.integers(0, 1 << 17), st.integers(0, 64), st.integers(0, 1 << 18), st.integers(1, 1 << 20),
    st.one_of(st.none(), st.integers(0, 1 << 40)),
)  # fmt: skip
def test_sizes_fit_or_are_refused(ctx: int, parallel: int, trained: int, cost: int, memory: int | None) -> None:
    try:
        sizes = fit_sizes(ctx, parallel, trained, cost, memory)
    except ModelLoadError:
        assert memory is not None
        return
    assert sizes.n_ctx >= 1 and sizes.n_parallel >= 1
    assert not ctx or sizes.n_ctx == ctx
    assert not parallel or sizes.n_parallel == parallel
    if memory is not None:
        assert sizes.n_ctx * sizes.n_parallel * cost <= memory


def test_gpu_layers() -> None:
    assert fit_gpu_layers("12", 30, GB, GB, None) == 12
    assert fit_gpu_layers("auto", 30, GB, GB, None) == 0
    assert fit_gpu_layers("auto", 30, GB, GB, 16 * GB) == -1
    assert fit_gpu_layers("auto", 30, GB, GB, 100 << 20) == 0
    some = fit_gpu_layers("auto", 30, 8 * GB, GB, 6 * GB)
    assert 0 < some < 30
    with pytest.raises(ModelLoadError, match="'auto' or a number") as failed:
        fit_gpu_layers("many", 30, GB, GB, None)
    assert failed.value.param == "gpu_layers"


@given(st.integers(1, 200), st.integers(1, 1 << 38), st.integers(0, 1 << 36), st.integers(0, 1 << 38))
def test_layers_on_the_gpu_fit_it(n_layer: int, model: int, kv: int, free: int) -> None:
    layers = fit_gpu_layers("auto", n_layer, model, kv, free)
    assert -1 <= layers <= n_layer
    if layers == -1:
        assert (model + kv) // (n_layer + 1) * (n_layer + 1) <= free
    else:
        assert layers * ((model + kv) // (n_layer + 1)) <= free
