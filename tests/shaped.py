"""Models of any shape, for what depends on sizes and not on sense: the weights are zeros in a sparse file, or random.

A sparse file costs no disk and next to no time; llama.cpp allocates for it exactly what it would for a trained model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny

from mullama.models.files import gguf

_writer = tiny._writer
_types = tiny._constants.GGMLQuantizationType


@dataclass(frozen=True)
class Shape:
    """A llama-like model; ``arch`` may be ``llama``, ``qwen2`` or ``gemma3``."""

    arch: str = "llama"
    n_layer: int = 2
    n_embd: int = 256
    n_ff: int = 512
    n_head: int = 4
    n_head_kv: int = 2
    head: int = 64
    n_vocab: int = 512
    window: int = 0
    is_tied: bool = False
    kind: str = "Q8_0"  # of every matrix
    embd_kind: str = ""  # of the embedding; empty: the same


#: The shape of Qwen2.5 1.5B.
QWEN_1_5B = Shape(
    arch="qwen2", n_layer=28, n_embd=1536, n_ff=8960, n_head=12, n_head_kv=2, head=128, n_vocab=151936, is_tied=True
)


def build(path: Path, shape: Shape, *, random: bool = False) -> Path:
    """Write a model of that shape to ``path`` and return it."""
    w = _writer.GGUFWriter(str(path), shape.arch)
    w.add_context_length(32768)
    w.add_embedding_length(shape.n_embd)
    w.add_block_count(shape.n_layer)
    w.add_feed_forward_length(shape.n_ff)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(shape.n_vocab)
    w.add_head_count(shape.n_head)
    w.add_head_count_kv(shape.n_head_kv)
    w.add_key_length(shape.head)
    w.add_value_length(shape.head)
    w.add_rope_dimension_count(shape.head)
    w.add_rope_freq_base(10000.0)
    if shape.window:
        w.add_sliding_window(shape.window)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    tokens = (tiny.TOKENS + [f"<{i}>" for i in range(shape.n_vocab)])[: shape.n_vocab]
    w.add_token_list(tokens)
    w.add_token_types((tiny.TYPES + [1] * shape.n_vocab)[: shape.n_vocab])
    w.add_token_merges(tiny.MERGES)
    w.add_bos_token_id(tiny.BOS)
    w.add_eos_token_id(tiny.EOS)
    for name, dims, kind in _tensors(shape):
        block, size = tiny._constants.GGML_QUANT_SIZES[_types[kind]]
        n_bytes = int(np.prod(dims)) // block * size
        w.add_tensor_info(name, dims, np.dtype(np.float32), n_bytes, raw_dtype=_types[kind])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    header = gguf.read_header(path)
    last = max(header.tensors, key=lambda tensor: tensor.offset)
    with path.open("r+b") as file:
        file.truncate(header.data_start + last.offset + (last.size or 0))
        if random:
            _fill(file, header)
    return path


def _tensors(s: Shape) -> list[tuple[str, list[int], str]]:
    """Names, dimensions as gguf-py wants them (outermost first), types."""
    found = [
        ("token_embd.weight", [s.n_vocab, s.n_embd], s.embd_kind or s.kind),
        ("output_norm.weight", [s.n_embd], "F32"),
    ]
    if not s.is_tied:
        found.append(("output.weight", [s.n_vocab, s.n_embd], s.kind))
    for i in range(s.n_layer):
        b = f"blk.{i}."
        found += [
            (b + "attn_norm.weight", [s.n_embd], "F32"),
            (b + "attn_q.weight", [s.n_head * s.head, s.n_embd], s.kind),
            (b + "attn_k.weight", [s.n_head_kv * s.head, s.n_embd], s.kind),
            (b + "attn_v.weight", [s.n_head_kv * s.head, s.n_embd], s.kind),
            (b + "attn_output.weight", [s.n_embd, s.n_head * s.head], s.kind),
            (b + "ffn_norm.weight", [s.n_embd], "F32"),
            (b + "ffn_gate.weight", [s.n_ff, s.n_embd], s.kind),
            (b + "ffn_up.weight", [s.n_ff, s.n_embd], s.kind),
            (b + "ffn_down.weight", [s.n_embd, s.n_ff], s.kind),
        ]
        if s.arch == "qwen2":
            found += [
                (b + "attn_q.bias", [s.n_head * s.head], "F32"),
                (b + "attn_k.bias", [s.n_head_kv * s.head], "F32"),
                (b + "attn_v.bias", [s.n_head_kv * s.head], "F32"),
            ]
        if s.arch == "gemma3":
            found += [
                (b + "attn_q_norm.weight", [s.head], "F32"),
                (b + "attn_k_norm.weight", [s.head], "F32"),
                (b + "post_attention_norm.weight", [s.n_embd], "F32"),
                (b + "post_ffw_norm.weight", [s.n_embd], "F32"),
            ]
    return found


def _fill(file, header: gguf.Header) -> None:  # type: ignore[no-untyped-def]
    """Random blocks of Q8_0 and Q4_0 with a scale of about a thousandth, ones for the rest."""
    rng = np.random.default_rng(5)
    for tensor in header.tensors:
        file.seek(header.data_start + tensor.offset)
        size, name = tensor.size or 0, tensor.type
        if name in ("Q8_0", "Q4_0"):
            _, _, block = gguf.TENSOR_TYPES[tensor.type_id]
            data = rng.integers(0, 256, (size // block, block), dtype=np.uint8)
            data[:, :2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
            file.write(data.tobytes())
        else:
            file.write(np.ones(tensor.n_elements, np.float32).tobytes())
