"""Automatic sizes: context, parallel requests, GPU layers. Pure arithmetic on what is measured elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from mullama.errors import MemoryTooSmall, ModelLoadError
from mullama.machine import memory

DEFAULT_CTX = 4096
DEFAULT_PARALLEL = 8
KV_SHARE = 0.5  # of the free memory, at most


def default_host_bytes() -> int:
    """Host memory that KV of preempted requests may take, and the host tier: a quarter of what is free.

    1 GiB where that is unknown.
    """
    free = memory.available_memory()
    return (1 << 30) if free is None else free // 4


@dataclass(slots=True, frozen=True)
class Sizes:
    n_ctx: int
    n_parallel: int


def choose_sizes(ctx_size: int, parallel: int, n_ctx_train: int, token_bytes: int, memory: int | None) -> Sizes:
    """Context and parallelism, 0 meaning automatic: their KV takes a part of ``memory``. Explicit values are kept."""
    n_ctx = ctx_size or min(n_ctx_train or DEFAULT_CTX, DEFAULT_CTX)
    n_parallel = parallel or DEFAULT_PARALLEL
    if memory is not None and token_bytes > 0:
        n_tokens = max(int(memory * KV_SHARE) // token_bytes, 256)  # of KV
        if not parallel:
            n_parallel = max(1, min(n_parallel, n_tokens // n_ctx))
        if not ctx_size:
            n_ctx = max(256, min(n_ctx, n_tokens // n_parallel // 256 * 256))
    return Sizes(n_ctx, n_parallel)


def fit_sizes(ctx_size: int, parallel: int, n_ctx_train: int, token_bytes: int, memory: int | None) -> Sizes:
    """``choose_sizes``, refused when they cannot fit. Raises MemoryTooSmall."""
    sizes = choose_sizes(ctx_size, parallel, n_ctx_train, token_bytes, memory)
    needed = sizes.n_ctx * sizes.n_parallel * token_bytes
    if memory is not None and needed > memory:
        raise MemoryTooSmall(
            f"{sizes.n_parallel} x {sizes.n_ctx} tokens of context need {needed >> 20} MiB of KV cache, "
            f"{memory >> 20} MiB of memory are free; lower --ctx-size or --parallel",
            missing=needed - memory,
        )
    return sizes


def fit_gpu_layers(asked: str, n_layer: int, model_bytes: int, kv_bytes: int, free_bytes: int | None) -> int:
    """Layers for the GPU: -1 all, 0 none. ``asked`` is 'auto' or a number; ``free_bytes`` None: there is no GPU."""
    if asked != "auto":
        try:
            return int(asked)
        except ValueError:
            raise ModelLoadError(f"gpu_layers must be 'auto' or a number, got '{asked}'", param="gpu_layers") from None
    if free_bytes is None:
        return 0
    # Compute buffers and the runtime itself take some: leave a tenth and half a gigabyte.
    usable = int(free_bytes * 0.9) - (512 << 20)
    a_layer = max((model_bytes + kv_bytes) // max(n_layer + 1, 1), 1)
    fits = usable // a_layer
    return -1 if fits > n_layer else max(0, fits)
