"""Tiny random models for the tests of the core: a few hundred kilobytes, well under a millisecond a token.

Five architectures, one a kind of memory: ``llama`` (full attention), ``gemma3`` (sliding window of WINDOW tokens),
``mamba`` (recurrent), ``lfm2`` (hybrid), ``bert`` (none). The weights are random but fixed. Printable ASCII gets the
large logits and control tokens get zero, so that greedy text is readable and ends only where a test makes it end.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

# The vendored gguf package, without its __init__: that one wants yaml and more for things that are not used here.
_package = types.ModuleType("vendored_gguf")
_package.__path__ = [str(Path(__file__).resolve().parents[1] / "vendor" / "llama.cpp" / "gguf-py" / "gguf")]
sys.modules.setdefault("vendored_gguf", _package)
_constants = importlib.import_module("vendored_gguf.constants")
_quants = importlib.import_module("vendored_gguf.quants")
_writer = importlib.import_module("vendored_gguf.gguf_writer")

N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD = 64, 128, 4, 2, 16
WINDOW = 32  # of the gemma3 model
N_CTX_TRAIN = 4096
LONG_TOKEN_BYTES = 600  # more than the core's first buffer
WIDE_TOKEN_BYTES = 400  # fills the token ring quickly

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORDS = ["the", "her", "and", "ing", " the", " and", " of", " to", " in", "ion", " is", " it", "you", " we", "all"]
_CONTROL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet() -> list[str]:
    """GPT-2's visible stand-in for each of the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    extra = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(extra)}
    return [table[b] for b in range(256)]


def _vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types, merges. Token ids 0 to 255 are the bytes of that number."""
    alphabet = byte_alphabet()
    tokens, merges = list(alphabet), []
    for word in _WORDS:
        text = "".join(alphabet[b] for b in word.encode())
        for end in range(2, len(text) + 1):
            if text[:end] not in tokens:
                merges.append(f"{text[: end - 1]} {text[end - 1]}")
                tokens.append(text[:end])
    tokens.append("B" * WIDE_TOKEN_BYTES)  # never the result of merges, but a model may choose it
    tokens.append("A" * LONG_TOKEN_BYTES)
    types = [int(_constants.TokenType.NORMAL)] * len(tokens) + [int(_constants.TokenType.CONTROL)] * len(_CONTROL)
    return tokens + _CONTROL, types, merges


TOKENS, TYPES, MERGES = _vocabulary()
N_VOCAB = len(TOKENS)
WIDE_TOKEN = TOKENS.index("B" * WIDE_TOKEN_BYTES)
LONG_TOKEN = TOKENS.index("A" * LONG_TOKEN_BYTES)
BOS, EOS, IM_START, IM_END = (TOKENS.index(t) for t in _CONTROL)
EMOJI = list("😀".encode())  # one character, four tokens


class _Builder:
    def __init__(self, path: Path, arch: str, n_layer: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.rope_base = 10_000.0
        self.writer = _writer.GGUFWriter(str(path), arch)
        w = self.writer
        w.add_name(f"tiny-{arch}")
        w.add_context_length(N_CTX_TRAIN)
        w.add_embedding_length(N_EMBD)
        w.add_block_count(n_layer)
        w.add_feed_forward_length(N_FF)
        w.add_layer_norm_rms_eps(1e-5)
        w.add_vocab_size(N_VOCAB)

    def vocabulary(self, chat_template: str | None, add_bos: bool, turned: bool) -> None:
        w = self.writer
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        wide, long = TOKENS[WIDE_TOKEN : LONG_TOKEN + 1]
        turned_pair = [long, wide] if turned else [wide, long]
        w.add_token_list([*TOKENS[:WIDE_TOKEN], *turned_pair, *TOKENS[LONG_TOKEN + 1 :]])
        w.add_token_types(TYPES)
        w.add_token_merges(MERGES)
        w.add_bos_token_id(BOS)
        w.add_eos_token_id(EOS)
        w.add_eot_token_id(IM_END)
        w.add_add_bos_token(add_bos)
        if chat_template is not None:
            w.add_chat_template(chat_template)

    def matrix(self, name: str, n_in: int, n_out: int, scale: float = 1.0) -> None:
        data = (self.rng.standard_normal((n_out, n_in)) * scale / np.sqrt(n_in)).astype(np.float32)
        self.quantised(name, data)

    def quantised(self, name: str, data: np.ndarray[Any, Any]) -> None:
        kind = _constants.GGMLQuantizationType.Q8_0
        self.writer.add_tensor(name, _quants.quantize(data, kind), raw_dtype=kind)

    def plain(self, name: str, data: np.ndarray[Any, Any]) -> None:
        self.writer.add_tensor(name, np.ascontiguousarray(data, dtype=np.float32))

    def ones(self, name: str, n: int) -> None:
        self.plain(name, 1.0 + 0.1 * self.rng.standard_normal(n))

    def norm(self, name: str) -> None:
        """A norm with a bias."""
        self.ones(f"{name}.weight", N_EMBD)
        self.plain(f"{name}.bias", np.zeros(N_EMBD))

    def ends(self, output_norm: str = "output_norm.weight", scale: float = 8.0) -> None:
        """Embedding (of that scale) and output."""
        self.matrix("token_embd.weight", N_EMBD, N_VOCAB, scale)
        self.ones(output_norm, N_EMBD)
        output = self.rng.standard_normal((N_VOCAB, N_EMBD)) * 4.0 / np.sqrt(N_EMBD)
        for token in range(N_VOCAB):
            if not 0x20 <= token < 0x7F:
                output[token] *= 0.25 if token < WIDE_TOKEN and token >= 256 else 0.0
        self.quantised("output.weight", output.astype(np.float32))

    def attention(self, i: int, *, norms: bool) -> None:
        self.matrix(f"blk.{i}.attn_q.weight", N_EMBD, N_HEAD * HEAD, 2.0)
        self.matrix(f"blk.{i}.attn_k.weight", N_EMBD, N_HEAD_KV * HEAD, 2.0)
        self.matrix(f"blk.{i}.attn_v.weight", N_EMBD, N_HEAD_KV * HEAD, 2.0)
        self.matrix(f"blk.{i}.attn_output.weight", N_HEAD * HEAD, N_EMBD, 2.0)
        if norms:
            self.ones(f"blk.{i}.attn_q_norm.weight", HEAD)
            self.ones(f"blk.{i}.attn_k_norm.weight", HEAD)

    def feed_forward(self, i: int) -> None:
        self.ones(f"blk.{i}.ffn_norm.weight", N_EMBD)
        self.matrix(f"blk.{i}.ffn_gate.weight", N_EMBD, N_FF, 2.0)
        self.matrix(f"blk.{i}.ffn_up.weight", N_EMBD, N_FF)
        self.matrix(f"blk.{i}.ffn_down.weight", N_FF, N_EMBD)

    def heads(self, kv: int | list[int] = N_HEAD_KV) -> None:
        w = self.writer
        w.add_head_count(N_HEAD)
        w.add_head_count_kv(kv)
        w.add_key_length(HEAD)
        w.add_value_length(HEAD)
        w.add_rope_freq_base(self.rope_base)

    def finish(self) -> None:
        w = self.writer
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()


def build(
    path: Path,
    arch: str = "llama",
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    add_bos: bool = False,
    seed: int = 7,
    rope_base: float | None = None,
    turned: bool = False,
) -> Path:
    """Write the tiny model of an architecture to ``path`` and return it. Other seeds are other weights of one shape;
    ``turned`` is another vocabulary of the same size, in which two tokens have changed places."""
    n_layer = {"llama": 2, "gemma3": 3, "mamba": 2, "lfm2": 3, "bert": 2}[arch]
    b = _Builder(path, arch, n_layer, seed=seed)
    b.vocabulary(chat_template, add_bos, turned)
    b.rope_base = rope_base or b.rope_base
    if arch == "llama":
        b.heads()
        b.writer.add_rope_dimension_count(HEAD)
        b.ends()
        for i in range(n_layer):
            b.ones(f"blk.{i}.attn_norm.weight", N_EMBD)
            b.attention(i, norms=False)
            b.feed_forward(i)
    elif arch == "gemma3":
        b.heads()
        b.writer.add_sliding_window(WINDOW)
        b.writer.add_sliding_window_pattern([True, False, True])
        b.ends(scale=0.5)  # gemma multiplies embeddings by sqrt(N_EMBD)
        for i in range(n_layer):
            b.ones(f"blk.{i}.attn_norm.weight", N_EMBD)
            b.attention(i, norms=True)
            b.ones(f"blk.{i}.post_attention_norm.weight", N_EMBD)
            b.feed_forward(i)
            b.ones(f"blk.{i}.post_ffw_norm.weight", N_EMBD)
    elif arch == "mamba":
        inner, state, conv, rank = 2 * N_EMBD, 16, 4, 32
        b.writer.add_ssm_conv_kernel(conv)
        b.writer.add_ssm_inner_size(inner)
        b.writer.add_ssm_state_size(state)
        b.writer.add_ssm_time_step_rank(rank)
        b.ends()
        for i in range(n_layer):
            b.ones(f"blk.{i}.attn_norm.weight", N_EMBD)
            b.matrix(f"blk.{i}.ssm_in.weight", N_EMBD, 2 * inner, 2.0)
            b.plain(f"blk.{i}.ssm_conv1d.weight", b.rng.standard_normal((inner, conv)))
            b.plain(f"blk.{i}.ssm_conv1d.bias", np.zeros(inner))
            b.matrix(f"blk.{i}.ssm_x.weight", inner, rank + 2 * state, 2.0)
            b.matrix(f"blk.{i}.ssm_dt.weight", rank, inner)
            b.plain(f"blk.{i}.ssm_dt.bias", np.full(inner, -2.0))
            b.plain(f"blk.{i}.ssm_a", -np.tile(np.arange(1, state + 1, dtype=np.float32) / 8, (inner, 1)))
            b.plain(f"blk.{i}.ssm_d", np.ones(inner))
            b.matrix(f"blk.{i}.ssm_out.weight", inner, N_EMBD, 2.0)
    elif arch == "bert":
        b.writer.add_head_count(N_HEAD)
        b.writer.add_layer_norm_eps(1e-12)
        b.writer.add_causal_attention(False)
        b.writer.add_token_type_count(2)
        b.matrix("token_embd.weight", N_EMBD, N_VOCAB)
        b.matrix("position_embd.weight", N_EMBD, N_CTX_TRAIN)
        b.norm("token_embd_norm")
        for i in range(n_layer):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                b.matrix(f"blk.{i}.{name}.weight", N_EMBD, N_EMBD)
            b.norm(f"blk.{i}.attn_output_norm")
            b.matrix(f"blk.{i}.ffn_up.weight", N_EMBD, N_FF)
            b.matrix(f"blk.{i}.ffn_down.weight", N_FF, N_EMBD)
            b.norm(f"blk.{i}.layer_output_norm")
    else:
        b.heads(kv=[0, N_HEAD_KV, 0])  # no KV heads: a recurrent layer
        b.writer.add_shortconv_l_cache(3)
        b.ends("token_embd_norm.weight")
        for i in range(n_layer):
            b.ones(f"blk.{i}.attn_norm.weight", N_EMBD)
            if i == 1:
                b.attention(i, norms=True)
            else:
                b.plain(f"blk.{i}.shortconv.conv.weight", b.rng.standard_normal((N_EMBD, 3)))
                b.matrix(f"blk.{i}.shortconv.in_proj.weight", N_EMBD, 3 * N_EMBD, 2.0)
                b.matrix(f"blk.{i}.shortconv.out_proj.weight", N_EMBD, N_EMBD, 2.0)
            b.feed_forward(i)
    b.finish()
    return path
