"""Random LoRA adapters for any model file: shapes are taken from its header, and every number is fixed by the seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from mullama.models.files import gguf

TARGETS = ("attn_q.weight", "attn_v.weight", "ffn_up.weight")


def build(
    path: Path,
    base: Path,
    *,
    rank: int = 4,
    seed: int = 1,
    alpha: float = 8.0,
    size: float = 1.0,
    targets: tuple[str, ...] = TARGETS,
    arch: str | None = None,
    general_type: str = "adapter",
    adapter_type: str = "lora",
    change: Callable[[dict[str, np.ndarray[Any, Any]]], None] = lambda tensors: None,
    extra: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """Write an adapter for the model ``base`` to ``path`` and return it.

    ``size`` is about how large its change is beside the weights. ``change`` may spoil the tensors (by name, as numpy
    has them), ``extra`` may write more metadata.
    """
    header = gguf.read_header(base)
    writer = tiny._writer.GGUFWriter(str(path), arch or header.get("general.architecture"))
    writer.add_type(general_type)
    writer.add_string("adapter.type", adapter_type)
    writer.add_float32("adapter.lora.alpha", alpha)
    extra(writer)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in header.tensors:
        if tensor.name.endswith(targets):
            n_in, n_out = tensor.shape[:2]
            a = rng.standard_normal((rank, n_in)) / np.sqrt(n_in)
            b = rng.standard_normal((n_out, rank)) * size / np.sqrt(rank)
            tensors[f"{tensor.name}.lora_a"] = a.astype(np.float32)
            tensors[f"{tensor.name}.lora_b"] = b.astype(np.float32)
    change(tensors)
    for name, data in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
