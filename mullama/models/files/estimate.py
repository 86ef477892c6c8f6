"""What a model will take in memory, from its header alone: weights, KV, compute buffers, logits.

The parts are those that llama.cpp allocates, under the names of ``Core.memory()``, for a model whose layers all run on
the CPU. KV, output and weights are exact. The compute buffer follows the layout that ggml's allocator arrives at for a
dense transformer; for other kinds of layers it is a bound from their widths. ``docs/memory.md`` has the figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mullama.errors import ConfigError, MemoryTooSmall
from mullama.files import human_size
from mullama.machine.processor import processor
from mullama.models.files import gguf
from mullama.models.files.gguf import Header, Tensor
from mullama.models.files.kind import kind_of
from mullama.models.files.shape import Shape, shape_of
from mullama.types import CELL_TYPES, ModelKind

_PLAIN_CELLS = ("f32", "f16", "bf16")

_PAD = 256  # cells
#: What AMX keeps in memory of its own (``amx.cpp``): values of a block, and bytes that packing adds to each of them.
_AMX = {
    "F16": (1, 0),
    "Q4_0": (32, 0),
    "Q4_1": (32, 0),
    "Q8_0": (32, 4),
    "Q4_K": (256, 4),
    "Q5_K": (256, 4),
    "Q6_K": (256, 0),
    "IQ4_XS": (256, 2),
}
_AMX_ROWS = 32  # a multiple
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, as llama.cpp will allocate them."""

    n_ctx: int  # tokens a request may use, rounded up to 256
    n_parallel: int
    weights_mapped: int  # of the file, shared with the page cache; 0 when it is read instead of mapped
    weights_copied: int  # in memory of the process's own: repacked for the CPU, or read
    kv: dict[str, int]  # "full", "window", "recurrent"; what the model does not have is missing
    compute: int
    output: int
    adapters: int = 0  # LoRA adapters that are loaded with it

    @property
    def weights(self) -> int:
        return self.weights_mapped + self.weights_copied

    @property
    def kv_total(self) -> int:
        return sum(self.kv.values())

    @property
    def total(self) -> int:
        return self.weights + self.kv_total + self.compute + self.output + self.adapters

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "weights": self.weights, "kv_total": self.kv_total, "total": self.total}


def estimate(
    model: Header | str | Path,
    *,
    n_ctx: int,
    n_parallel: int = 1,
    type_k: str = "f16",
    type_v: str = "f16",
    n_batch: int = 512,
    flash_attn: str = "auto",
    kv_layout: str = "streams",
    kv_tokens: int = 0,
    mmap: bool = True,
    adapters: int = 0,
) -> Estimate:
    """What loading takes with these settings of ``serve``; ``kv_tokens`` counts in the ``unified`` layout only.

    ``adapters``: bytes of LoRA adapters that come with it.

    Raises ModelLoadError (not a sound GGUF, or a shape that no model has), ConfigError (an unknown type of cells).
    """
    label = "this model" if isinstance(model, Header) else str(model)
    header = model if isinstance(model, Header) else gguf.check(model)
    shape = shape_of(header, label)
    if kind_of(header) is not ModelKind.GENERATE:
        return _of_vectors(header, shape, n_ctx, n_batch, mmap, flash_attn != "off")
    n_ctx = _padded(n_ctx)
    cells = n_ctx if kv_layout == "streams" else _padded(kv_tokens or n_ctx * n_parallel)
    n_streams = n_parallel if kv_layout == "streams" else 1
    n_batch = max(n_batch, n_parallel)
    window = _window_cells(shape, cells, n_batch, 1 if kv_layout == "streams" else n_parallel)
    mapped, copied = _weights(header, mmap)
    return Estimate(
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        weights_mapped=mapped,
        weights_copied=copied,
        kv=_kv(shape, cells, window, n_streams, n_parallel, _cell(type_k), _cell(type_v), flash_attn),
        compute=_compute(shape, cells, window, n_streams, n_parallel, n_batch, flash_attn != "off"),
        output=shape.n_vocab * n_parallel * _FLOAT,
        adapters=adapters,
    )


def _of_vectors(header: Header, shape: Shape, n_ctx: int, n_batch: int, mmap: bool, flash_attn: bool) -> Estimate:
    """What a model that embeds takes: room for one ubatch of texts, and for the vectors of its tokens."""
    n_ctx = min(n_ctx, shape.n_ctx_train or n_ctx)
    n_batch = max(n_batch, n_ctx)
    cells = _padded(n_batch)
    mapped, copied = _weights(header, mmap)
    kv = _kv(shape, cells, 0, 1, 1, _cell("f16"), _cell("f16"), "auto")
    mask = 0 if kv else n_batch * n_batch * (2 if flash_attn else _FLOAT)
    return Estimate(
        n_ctx=n_ctx,
        n_parallel=1,
        weights_mapped=mapped,
        weights_copied=copied,
        kv=kv,
        compute=mask + _compute(shape, cells, 0, 1, 1, n_batch, flash_attn),
        output=n_batch * shape.n_embd * _FLOAT,
    )


def token_bytes(header: Header, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes that one more token of context takes in each slot: of the layers that keep every token. 0: it is free."""
    k, v = _cell(type_k), _cell(type_v)
    return sum((a.k * k + a.v * v) // 32 for a in shape_of(header).layers if not a.is_window)


def is_enough(found: Estimate, free: int | None) -> bool:
    """Whether so many bytes of free memory hold it. ``free`` None: nobody knows, so it may try."""
    return free is None or found.total <= free


def verdict(found: Estimate, free: int | None, label: str, parts: str = "") -> str:
    """Whether it fits, in a sentence with the amounts; ``parts`` follows what it takes."""
    there = f"{human_size(free)} are free" if free is not None else "this system does not say what is free"
    return (
        f"{label} with {found.n_parallel} x {found.n_ctx} tokens {'fits' if is_enough(found, free) else 'does not fit'}"
        f": {human_size(found.total)} of memory{parts}, {there}"
    )


def way_out(found: Estimate) -> str:
    """What helps where it does not fit."""
    if found.n_parallel == 1 and found.n_ctx <= _PAD:  # there is nothing to lower
        return "choose a smaller quantisation, or free memory"
    return "lower --ctx-size or --parallel, choose a smaller --kv-type-k and --kv-type-v, or a smaller quantisation"


def check_fits(found: Estimate, free: int | None, label: str) -> None:
    """Raise MemoryTooSmall, with the amounts and what helps, unless so many bytes of free memory hold it."""
    if free is None or is_enough(found, free):
        return
    adapters = f", adapters {human_size(found.adapters)}" if found.adapters else ""
    parts = (
        f" (weights {human_size(found.weights)}, KV {human_size(found.kv_total)}, "
        f"buffers {human_size(found.compute + found.output)}{adapters})"
    )
    raise MemoryTooSmall(
        f"{verdict(found, free, label, parts)}; {way_out(found)}", param="model", missing=found.total - free
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """The most that fits, for one type of cells. None: not even the least does."""

    kv_type: str
    n_ctx: int | None  # the largest context, at the parallelism asked for
    n_parallel: int | None  # the largest parallelism, at the context asked for
    total: int  # bytes with the context and the parallelism asked for
    fits: bool  # whether that is no more than is free


MAX_PARALLEL = 256  # llama_max_parallel_sequences()


def fit(
    header: Header,
    free: int,
    *,
    n_ctx: int,
    n_parallel: int,
    kv_types: Iterable[str] = ("f16", "q8_0", "q4_0"),
    **settings: Any,
) -> list[Fit]:
    """Sizes that fit ``free`` bytes, for each type of cells that the model can have. ``settings`` are those of
    :func:`estimate`. Raises as it does."""
    heads = shape_of(header).heads
    most_ctx = max(_padded(shape_of(header).n_ctx_train), _PAD)
    found = []
    for kv_type in kv_types:
        if kv_type not in _PLAIN_CELLS and any(size % 32 for size in heads):
            continue  # llama.cpp refuses: a block has 32 values

        def total(ctx: int, parallel: int, kv_type: str = kv_type) -> int:
            found = estimate(header, n_ctx=ctx, n_parallel=parallel, type_k=kv_type, type_v=kv_type, **settings)
            return found.total

        found.append(
            Fit(
                kv_type=kv_type,
                n_ctx=largest(lambda n: total(n * _PAD, n_parallel) <= free, most_ctx // _PAD, _PAD),
                n_parallel=largest(lambda n: total(n_ctx, n) <= free, MAX_PARALLEL, 1),
                total=total(n_ctx, n_parallel),
                fits=total(n_ctx, n_parallel) <= free,
            )
        )
    return found


def largest(fits: Callable[[int], bool], most: int, unit: int) -> int | None:
    """The largest n of 1 to ``most`` for which ``fits(n)``, times ``unit``; what fits at n fits below it."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * unit if low else None


# -- weights


def _weights(header: Header, mmap: bool) -> tuple[int, int]:
    """Bytes that are mapped, and bytes in buffers of the process's own."""
    repacked = _repacked_types()
    is_tied = not any(tensor.name == "output.weight" for tensor in header.tensors)
    copied, plain = 0, []
    for tensor in header.tensors:
        size = tensor.size or 0
        if _is_repacked(tensor, repacked):
            copied += _aligned(size + _amx_adds(tensor))
            continue
        plain.append(tensor)
        # A tied output is a second copy of the embedding where its type is repacked.
        if is_tied and tensor.name == "token_embd.weight" and tensor.type in repacked and _has_rows(tensor, repacked):
            copied += _aligned(size + _amx_adds(tensor))
    if not mmap:
        return 0, copied + sum(_aligned(tensor.size or 0) for tensor in plain)
    if not plain:
        return 0, copied
    if header.n_parts > 1:  # offsets are counted in each part
        return sum(tensor.size or 0 for tensor in plain), copied
    # The mapping is one span, over what was repacked as well where that lies between.
    return max(t.offset + (t.size or 0) for t in plain) - min(t.offset for t in plain), copied


def _is_repacked(tensor: Tensor, repacked: dict[str, int]) -> bool:
    """Whether ggml's CPU back end keeps the tensor in an order of its own: matrices that are multiplied with."""
    is_looked_up = tensor.name.startswith(("token_embd.", "per_layer_token_embd.", "position_embd.", "token_types."))
    return len(tensor.shape) >= 2 and not is_looked_up and tensor.type in repacked and _has_rows(tensor, repacked)


def _has_rows(tensor: Tensor, repacked: dict[str, int]) -> bool:
    if _is_expert(tensor) and repacked[tensor.type] == _AMX_ROWS:
        return False  # AMX multiplies no experts
    return tensor.shape[1] % repacked[tensor.type] == 0


def _is_expert(tensor: Tensor) -> bool:
    return "_exps." in tensor.name


def _amx_adds(tensor: Tensor) -> int:
    """Bytes by which a tensor is larger in AMX's packing than in the file."""
    if not _has_amx() or tensor.shape[1] % _AMX_ROWS or _is_expert(tensor):
        return 0
    block, extra = _AMX.get(tensor.type, (1, 0))
    return math.prod(tensor.shape) // block * extra


def _has_amx() -> bool:
    return {"amx_int8", "avx512_vnni"} <= processor().flags


@functools.cache
def _repacked_types() -> dict[str, int]:
    """Types that this processor's build repacks, and of how many rows a multiple a tensor must have.

    ``ggml_repack_get_optimal_repack_type`` and ``amx.cpp``; the build is taken to use what the processor has.
    """
    flags, machine = processor().flags, processor().architecture
    found: dict[str, int] = {}
    if machine in ("x86_64", "amd64"):
        if "avx2" in flags or not flags:
            found = {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8}
        if "avx512f" in flags:
            found["Q2_K"] = 8
        if _has_amx():
            found = dict.fromkeys(_AMX, _AMX_ROWS) | found
    elif machine in ("arm64", "aarch64"):
        found = {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "IQ4_NL": 4, "MXFP4": 4, "Q8_0": 4}
        if flags and "asimddp" not in flags:
            found = {}
    return found


# -- context


def _window_cells(shape: Shape, cells: int, n_batch: int, n_sequences: int) -> int:
    """Cells of the cache of a sliding window (``llama_kv_cache_iswa``)."""
    return _padded(min(cells, shape.n_window * n_sequences + n_batch)) if shape.n_window else 0


def _kv(
    shape: Shape, cells: int, window: int, n_streams: int, n_parallel: int, k: int, v: int, flash_attn: str
) -> dict[str, int]:
    """``k`` and ``v`` are bytes of a block of 32 values."""
    # Without flash attention V is transposed, and as wide in every layer as in the widest.
    widest = max((layer.v for layer in shape.layers), default=0)
    found: dict[str, int] = {}
    for layer in shape.layers:
        if layer.k:
            name, size = ("window", window) if layer.is_window else ("full", cells)
            wide = widest if flash_attn == "off" and layer.v else layer.v
            found[name] = found.get(name, 0) + size * n_streams * (layer.k * k + wide * v) // 32
        if layer.state:
            found["recurrent"] = found.get("recurrent", 0) + layer.state * n_parallel * _FLOAT
    return found


def _compute(
    shape: Shape, cells: int, window: int, n_streams: int, n_parallel: int, n_batch: int, flash_attn: bool
) -> int:
    """The larger of what is alive while a layer attends, while it feeds forward, and while the logits are computed."""
    tokens = math.ceil(min(n_batch, cells * n_streams) / n_parallel) * n_parallel
    row = tokens * _FLOAT
    full_layers = any(layer.k and not layer.is_window for layer in shape.layers)
    kv_cells = [size for size, there in ((cells, full_layers), (window, window > 0)) if there]
    masks = sum(kv_cells) * tokens * (2 if flash_attn else _FLOAT)
    widest = max((layer.v for layer in shape.layers), default=0)
    base = 3 * shape.n_embd + shape.n_query
    feed = (base + 3 * shape.n_ff) * row
    if shape.n_expert_used:
        n_used, n_ff = shape.n_expert_used, shape.n_ff_expert
        feed = max(feed, (base + n_used * max(3 * n_ff, n_ff + 2 * shape.n_embd)) * row)
    attend = 0
    if kv_cells:
        attend = (base + shape.n_query + 2 * widest) * row
        if not flash_attn:
            scores = shape.n_head * max(kv_cells) * row
            # Where each value of V goes is told in 64 bits, for each cache.
            attend = (base + shape.n_query) * row + scores + len(kv_cells) * widest * tokens * 8
    inner = 0
    if shape.n_inner:
        inner = (3 * shape.n_embd + 6 * shape.n_inner) * row + shape.n_state * n_parallel * _FLOAT
    logits = n_parallel * shape.n_vocab * _FLOAT + shape.n_embd * row
    return masks + max(feed, attend, inner, logits)


def _cell(name: str) -> int:
    if name not in CELL_TYPES:
        raise ConfigError(f"'{name}' is not a type of KV cells; there are {', '.join(CELL_TYPES)}")
    return CELL_TYPES[name]


def _padded(n: int) -> int:
    return -(-n // _PAD) * _PAD


def _aligned(n: int) -> int:
    return -(-n // 32) * 32
