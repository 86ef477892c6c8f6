"""Whether a model fits the memory that is free, asked before anything of it is loaded.

    sizes = sizes_for(path, config, name)    # the automatic sizes with which it fits, or MemoryTooSmall
    model = load_model(path, …)

It is known from the file's header alone. Weights that are mapped count as well: their pages are needed again and again,
and what is available to a process includes the page cache.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from mullama.config import ServeConfig
from mullama.engine.memory import sizing
from mullama.engine.memory.sizing import Sizes
from mullama.engine.weights import sharing
from mullama.errors import ModelLoadError
from mullama.files import identity_of
from mullama.home import expand
from mullama.machine import memory
from mullama.models.files import gguf, lora_file
from mullama.models.files.estimate import Estimate, check_fits, estimate, is_enough, largest, token_bytes
from mullama.models.files.gguf import Header
from mullama.models.files.kind import kind_of
from mullama.models.files.shape import shape_of
from mullama.types import ModelKind

log = logging.getLogger("mullama.engine")

MIN_CTX = 256


def free_memory(config: ServeConfig) -> int | None:
    """Bytes that a load may take; None: nobody knows, or nobody wants to know."""
    return memory.available_memory() if config.memory_check == "on" else None


def expected(path: str | Path, config: ServeConfig, *, n_ctx: int, n_parallel: int) -> Estimate | None:
    """What a file will take with these sizes; None where nobody can say, as with layers on a GPU.

    Raises ModelLoadError for what is no model.
    """
    if _has_gpu():
        return None
    return _needs(header_of(path), config, n_ctx, n_parallel)


def check(path: str | Path, config: ServeConfig, name: str, n_ctx: int, n_parallel: int) -> None:
    """Raise MemoryTooSmall unless a file fits with these sizes. What else is wrong with it, loading it tells."""
    free = free_memory(config)
    if free is None:
        return
    try:
        needs = expected(path, config, n_ctx=n_ctx, n_parallel=n_parallel)
    except ModelLoadError:
        return
    if needs is not None:
        check_fits(_less_shared(needs, path, config), free, name)


def sizes_for(path: str | Path, config: ServeConfig, name: str, *, tell: bool = True) -> Sizes | None:
    """The context and the parallelism with which a file fits; None where that is known only when it is loaded.

    Automatic sizes shrink as far as they must (``tell``: log it). Raises MemoryTooSmall where it does not fit even so.
    What else is wrong with the file, loading it tells.
    """
    free = free_memory(config)
    if free is None or _has_gpu():
        return None
    if _embeds(path):
        return Sizes(embedding_ctx(path, config, name), 1)
    try:
        header = header_of(path)
        if sharing.is_loaded(path, config):
            # They take nothing more, which is as if so much more were free.
            free += _needs(header, config, MIN_CTX, 1).weights
        sizes = _sizes(header, config, free)
        needs = _needs(header, config, sizes.n_ctx, sizes.n_parallel, _adapter_bytes(config, header))
    except ModelLoadError:
        return None
    if not is_enough(needs, free):
        sizes = _shrunk(header, config, sizes, free - needs.adapters)
        needs = _needs(header, config, sizes.n_ctx, sizes.n_parallel, needs.adapters)
    check_fits(needs, free, name)
    if tell and sizes != _sizes(header, config, None):
        log.warning("%s: %d x %d tokens, because little memory is free", name, sizes.n_parallel, sizes.n_ctx)
    return sizes


def embedding_ctx(path: str | Path, config: ServeConfig, name: str) -> int:
    """The most tokens of a text for a model that embeds. Raises MemoryTooSmall where that does not fit."""
    header = header_of(path)
    trained = shape_of(header).n_ctx_train
    n_ctx = min(config.ctx_size or sizing.DEFAULT_CTX, trained or sizing.DEFAULT_CTX)
    free = free_memory(config)
    if free is not None and not _has_gpu():
        check_fits(_less_shared(_needs(header, config, n_ctx, 1), path, config), free, name)
    return n_ctx


def _embeds(path: str | Path) -> bool:
    try:
        return kind_of(header_of(path)) is not ModelKind.GENERATE
    except ModelLoadError:
        return False


def token_bytes_of(path: str | Path, config: ServeConfig) -> int:
    """KV that one more token of context takes in each slot; 0 where it is free, or nobody can say."""
    try:
        return token_bytes(header_of(path), config.kv_type_k, config.kv_type_v)
    except ModelLoadError:
        return 0


def state_bytes_of(path: str | Path) -> int:
    """What a sequence of a recurrent model takes whatever its length; 0 where there is no state, or nobody can say."""
    try:
        return 4 * sum(layer.state for layer in shape_of(header_of(path)).layers)
    except ModelLoadError:
        return 0


def _less_shared(needs: Estimate, path: str | Path, config: ServeConfig) -> Estimate:
    """Without the weights, where they are loaded already."""
    return replace(needs, weights_mapped=0, weights_copied=0) if sharing.is_loaded(path, config) else needs


def _sizes(header: Header, config: ServeConfig, free: int | None) -> Sizes:
    """What is chosen where there is enough: KV takes a part of what is free when the weights are there."""
    if free is not None:
        free = max(free - _needs(header, config, MIN_CTX, 1).weights_copied, 0)
    return sizing.choose_sizes(
        config.ctx_size,
        config.parallel,
        shape_of(header).n_ctx_train,
        token_bytes(header, config.kv_type_k, config.kv_type_v),
        free,
    )


def _shrunk(header: Header, config: ServeConfig, sizes: Sizes, free: int) -> Sizes:
    """The largest that fits, of what is automatic: fewer requests at once first, then a shorter context."""

    def fits(n_ctx: int, n_parallel: int) -> bool:
        return _needs(header, config, n_ctx, n_parallel).total <= free

    n_ctx, n_parallel = sizes.n_ctx, sizes.n_parallel
    if not config.parallel:
        most = largest(lambda n: fits(n_ctx, n), n_parallel, 1)
        if most is not None:
            return Sizes(n_ctx, most)
        n_parallel = 1
    if not config.ctx_size:
        least = min(n_ctx, MIN_CTX)
        n_ctx = largest(lambda n: fits(n * MIN_CTX, n_parallel), n_ctx // MIN_CTX, MIN_CTX) or least
    return Sizes(n_ctx, n_parallel)


def _needs(header: Header, config: ServeConfig, n_ctx: int, n_parallel: int, adapter_bytes: int = 0) -> Estimate:
    return estimate(
        header,
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        type_k=config.kv_type_k,
        type_v=config.kv_type_v,
        n_batch=config.batch_size,
        flash_attn=config.flash_attn,
        kv_layout=config.kv_layout,
        kv_tokens=config.kv_tokens or n_ctx * n_parallel,
        mmap=config.mmap,
        adapters=adapter_bytes,
    )


def _adapter_bytes(config: ServeConfig, header: Header) -> int:
    """Bytes of the adapters that will be loaded with a model: those that are of it."""
    found = 0
    for spec in config.lora:
        path = expand(spec.partition("=")[2])
        try:
            own = header_of(path)
            lora_file.compare(own, header, str(path))
        except ModelLoadError:  # of another model, or no adapter: loading it tells
            continue
        found += sum(tensor.size or 0 for tensor in own.tensors)
    return found


def devices() -> list[dict[str, Any]]:
    """What llama.cpp could compute on."""
    from mullama import _core

    return _core.devices()


def _has_gpu() -> bool:
    return any(device["type"] in ("gpu", "igpu") for device in devices())


def header_of(path: str | Path) -> Header:
    """The checked header of a file, remembered as long as the file is the same. Raises ModelLoadError."""
    return _read(Path(path), tuple(identity_of(part) for part in gguf.part_paths(path)))


@functools.lru_cache(maxsize=16)
def _read(path: Path, identities: tuple[tuple[int, int, int] | None, ...]) -> Header:
    """PERF: 10 ms for a large vocabulary, and somebody may be waiting for the model."""
    return gguf.check(path)
