"""Automatic sizes: context, parallel requests, GPU layers. Pure arithmetic on what is measured elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mullama.errors import MemoryTooSmall, ModelLoadError

DEFAULT_CTX = 4096
DEFAULT_PARALLEL = 8
KV_SHARE = 0.5  # of the free memory, at most


#: Bytes of a block of 32 values, by ggml's types.
BLOCK_BYTES = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
}


def kv_bytes_per_token(meta: Mapping[str, str], type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes of keys and values a token, from GGUF metadata; an upper bound where heads differ by layer."""
    arch = meta.get("general.architecture", "")

    def number(key: str, default: int = 0) -> int:
        try:
            return int(meta.get(f"{arch}.{key}", default))
        except ValueError:
            return default

    layers = number("block_count", 1)
    heads = number("attention.head_count", 1)
    heads_kv = number("attention.head_count_kv", heads) or heads
    width = number("embedding_length", 1) // max(heads, 1)
    key = number("attention.key_length", width) or width
    value = number("attention.value_length", width) or width
    return layers * heads_kv * (key * BLOCK_BYTES[type_k] + value * BLOCK_BYTES[type_v]) // 32


def available_memory() -> int | None:
    """Bytes of memory that can be used without swapping, and within a container; None where the system does not say."""
    return min((left for left in (_machine_left(), group_left()) if left is not None), default=None)


def _machine_left() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def group_left(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the limits of this process's control group leave, as those of a container or of a service have.

    None: there is no limit, or none of version 2. Pages of files count as free, as they do in ``MemAvailable``.
    """
    try:
        name = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    parts = [part for part in name.split("/") if part]
    if ".." in parts:  # it lies outside of what is mounted here
        parts = []
    found = [_left_of(root.joinpath(*parts[:n])) for n in range(len(parts) + 1)]
    return min((left for left in found if left is not None), default=None)


def _left_of(group: Path) -> int | None:
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        if limit == "max":
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(int(limit) - used + int(stat["active_file"]) + int(stat["inactive_file"]), 0)
    except (OSError, ValueError, KeyError):
        return None


def default_swap_bytes() -> int:
    """Host memory that the KV of preempted requests may take: a quarter of what is free, 1 GiB where unknown."""
    free = available_memory()
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
        room = max(int(memory * KV_SHARE) // token_bytes, 256)  # tokens of KV
        if not parallel:
            n_parallel = max(1, min(n_parallel, room // n_ctx))
        if not ctx_size:
            n_ctx = max(256, min(n_ctx, room // n_parallel // 256 * 256))
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
    room = int(free_bytes * 0.9) - (512 << 20)
    a_layer = max((model_bytes + kv_bytes) // max(n_layer + 1, 1), 1)
    fits = room // a_layer
    return -1 if fits > n_layer else max(0, fits)


def usable_cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
