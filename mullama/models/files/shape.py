"""The shape of a model as its header tells it: which layers keep what for each token, and how wide they are.

Follows ``llama-hparams.cpp`` and the ``load_arch_hparams`` of each architecture; a test compares what comes of it with
what llama.cpp allocates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mullama.errors import ModelLoadError
from mullama.models.files.gguf import Header, Summary, printable

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS

#: Every so manieth layer attends to everything, where the file does not say which: llama.cpp's defaults.
_SWA_PERIOD = {
    "afmoe": 4, "cohere2": 4, "cohere2moe": 4, "exaone-moe": 4, "exaone4": 4, "gemma-embedding": 6, "gemma2": 2,
    "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "laguna": 4, "llama4": 4, "mellum": 4, "modern-bert": 3, "muse-glimmer": 4,
    "olmo2": 4, "plamo3": 8, "smallthinker": 4,
}  # fmt: skip
_DENSE_FIRST = {"cohere2moe", "laguna", "modern-bert", "smallthinker"}
#: Architectures whose ``sliding_window`` llama.cpp reads and does not use.
_NO_WINDOW = {"phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "llama", "mistral3"}
_RECURRENT = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
_EVERY_LAYER_BOTH = {"falcon-h1"}
_INTERVAL = {"qwen3next", "qwen35", "qwen35moe", "minimax-01"}  # the fourth layer attends, where the file is silent
#: Architectures that cannot continue a text token by token, and keep no KV.
_NO_MEMORY = {"bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert",
              "wavtokenizer-dec", "modern-bert", "gemma-embedding", "gemma-embedding2", "dream", "llada", "llada-moe",
              "rnd1", "clef"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps: values of K and V for each token, and 32-bit values of state for each sequence."""

    k: int = 0
    v: int = 0
    is_window: bool = False
    state: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    architecture: str
    layers: tuple[Layer, ...]
    n_ctx_train: int
    n_vocab: int
    n_embd: int
    n_head: int
    n_query: int  # values of all query heads of a token
    heads: tuple[int, int]  # values of one head of K, and of V
    n_ff: int
    n_expert_used: int
    n_ff_expert: int
    n_inner: int  # width of a state-space layer
    n_window: int  # tokens; 0: no layer has a window

    @property
    def n_state(self) -> int:
        return max((layer.state for layer in self.layers), default=0)


class _Facts:
    """Numbers of the metadata. SAFETY: a damaged file may hold anything under any key."""

    def __init__(self, header: Header, label: str) -> None:
        self.header = header
        self.label = label

    def name(self, key: str) -> str:
        return self.header.name_of("{arch}." + key)

    def raw(self, key: str) -> Any:
        return self.header.get("{arch}." + key)

    def number(self, key: str, default: int = 0, most: int = 1 << 31) -> int:
        value = self.raw(key)
        if value is None or isinstance(value, Summary):
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ModelLoadError(
                f"{self.label}: {self.name(key)} is {printable(str(value))}; it must be a whole number of 0 to {most}"
            )
        return value

    def per_layer(self, key: str, n_layer: int, default: int) -> list[int]:
        """A number for each layer, from an array or from one number for all."""
        value = self.raw(key)
        if isinstance(value, Summary) and len(value.values) >= n_layer:
            found = [int(item) if isinstance(item, int) else -1 for item in value.values[:n_layer]]
            if min(found) < 0 or max(found) > 1 << 31:
                raise ModelLoadError(f"{self.label}: {self.name(key)} is damaged")
            return found
        return [self.number(key, default)] * n_layer


def shape_of(header: Header, label: str = "this model") -> Shape:
    """Read the shape. Raises ModelLoadError for numbers that no model has."""
    facts = _Facts(header, label)
    arch = str(header.get("general.architecture"))
    n_layer = facts.number("block_count", 0, _MAX_LAYERS)
    n_embd = facts.number("embedding_length", 0, 1 << 20)
    if not n_layer or not n_embd:
        raise ModelLoadError(f"{label}: its header names no {'block_count' if not n_layer else 'embedding_length'}")
    heads = facts.per_layer("attention.head_count", n_layer, 0)
    n_head = max(heads)
    key = facts.number("attention.key_length", n_embd // n_head if n_head else 0, 1 << 16)
    n_ff = max(facts.per_layer("feed_forward_length", n_layer, 0))
    embedding = next((t.shape[1] for t in header.tensors if t.name == "token_embd.weight" and len(t.shape) == 2), 0)
    n_used = facts.number("expert_used_count", 0, 1 << 16)
    layers = _layers(facts, arch, n_layer, heads, key)
    return Shape(
        architecture=arch,
        layers=tuple(layers),
        n_ctx_train=facts.number("context_length"),
        n_vocab=embedding or header.count("tokenizer.ggml.tokens") or 0,
        n_embd=n_embd,
        n_head=n_head,
        n_query=n_head * key,
        heads=(key, facts.number("attention.value_length", key, 1 << 16)),
        n_ff=n_ff,
        n_expert_used=n_used,
        n_ff_expert=facts.number("expert_feed_forward_length", n_ff if n_used else 0),
        n_inner=facts.number("ssm.inner_size"),
        n_window=_window_size(facts, arch) if any(layer.is_window for layer in layers) else 0,
    )


def check_sense(header: Header, label: str) -> None:
    """Refuse what llama.cpp takes and what makes a model useless. Raises ModelLoadError."""
    if header.get("tokenizer.ggml.model") in ("no_vocab", "none"):
        # SAFETY: it would make room for as many tokens as the header claims.
        raise ModelLoadError(f"{label}: it has no vocabulary, so that no text can be made into tokens for it")
    context = header.get("{arch}.context_length")
    if isinstance(context, int) and not 0 < context < 1 << 31:
        raise ModelLoadError(f"{label}: {header.name_of('{arch}.context_length')} is {context}; the file is damaged")
    base = header.get("{arch}.rope.freq_base")
    if isinstance(base, float) and not (math.isfinite(base) and base >= 0):
        raise ModelLoadError(f"{label}: {header.name_of('{arch}.rope.freq_base')} is {base}; the file is damaged")
    n_tokens = header.count("tokenizer.ggml.tokens")
    for which in ("bos", "eos"):
        token = header.get(f"tokenizer.ggml.{which}_token_id")
        # Converters write -1 for a model that has no such token.
        if n_tokens and isinstance(token, int) and token not in (-1, (1 << 32) - 1) and not 0 <= token < n_tokens:
            raise ModelLoadError(
                f"{label}: its {which} token is number {token} of a vocabulary of {n_tokens}; the file is damaged"
            )


def _layers(facts: _Facts, arch: str, n_layer: int, heads: list[int], key: int) -> list[Layer]:
    if arch in _NO_MEMORY:
        return [Layer()] * n_layer
    kv_heads = [own or 0 for own in facts.per_layer("attention.head_count_kv", n_layer, -1 if heads else 0)]
    kv_heads = [own if own >= 0 else head for own, head in zip(kv_heads, heads, strict=True)]
    value = facts.number("attention.value_length", key, 1 << 16)
    key_window = facts.number("attention.key_length_swa", key, 1 << 16)
    value_window = facts.number("attention.value_length_swa", value, 1 << 16)
    is_mla = facts.number("attention.key_length_mla") > 0
    window = _windows(facts, arch, n_layer)
    recurrent = _recurrent(facts, arch, n_layer, kv_heads)
    state = _state(facts)
    n_with_kv = n_layer
    if arch == "gemma3n":
        n_with_kv = 20
    elif shared := facts.number("attention.shared_kv_layers", 0, n_layer):
        n_with_kv = n_layer - shared
    found = []
    for i in range(n_layer):
        attends = (not recurrent[i] or arch in _EVERY_LAYER_BOTH) and arch not in _RECURRENT and i < n_with_kv
        k = kv_heads[i] * (key_window if window[i] else key) if attends else 0
        v = kv_heads[i] * (value_window if window[i] else value) if attends and not is_mla else 0
        found.append(Layer(k, v, window[i] and attends, state if recurrent[i] else 0))
    return found


def _window_size(facts: _Facts, arch: str) -> int:
    """Tokens of the window; llama 4's has a fixed size, unless the file says that there is none."""
    if arch == "llama4":
        return 0 if facts.raw("attention.sliding_window") == 0 else 8192
    return 0 if arch in _NO_WINDOW else facts.number("attention.sliding_window")


def _windows(facts: _Facts, arch: str, n_layer: int) -> list[bool]:
    """Which layers attend to a window only."""
    pattern = facts.raw("attention.sliding_window_pattern")
    if not _window_size(facts, arch) or (not isinstance(pattern, Summary) and not pattern and arch not in _SWA_PERIOD):
        return [False] * n_layer
    if isinstance(pattern, Summary) and len(pattern.values) >= n_layer:
        return [bool(item) for item in pattern.values[:n_layer]]
    period = facts.number("attention.sliding_window_pattern", _SWA_PERIOD.get(arch, 0))
    if period == 0:
        return [True] * n_layer
    full = 0 if arch in _DENSE_FIRST else period - 1
    return [i % period != full for i in range(n_layer)]


def _recurrent(facts: _Facts, arch: str, n_layer: int, kv_heads: list[int]) -> list[bool]:
    """Which layers keep a state."""
    if arch in _RECURRENT or arch in _EVERY_LAYER_BOTH:
        return [True] * n_layer
    if arch in _INTERVAL:
        interval = facts.number("full_attention_interval", 4) or 4
        return [(i + 1) % interval != 0 for i in range(n_layer)]
    if not facts.raw("ssm.inner_size") and not facts.raw("shortconv.l_cache"):
        return [False] * n_layer
    feeds = facts.per_layer("feed_forward_length", n_layer, 0)
    return [own == 0 and (arch != "nemotron_h" or feed == 0) for own, feed in zip(kv_heads, feeds, strict=True)]


def _state(facts: _Facts) -> int:
    """Values of state of a recurrent layer, a sequence: ``n_embd_r() + n_embd_s()``."""
    n_embd = facts.number("embedding_length")
    if head := facts.number("wkv.head_size"):
        return facts.number("token_shift_count", 2) * n_embd + n_embd * head
    if cache := facts.number("shortconv.l_cache"):
        return n_embd * max(cache - 1, 0)
    inner, size = facts.number("ssm.inner_size"), facts.number("ssm.state_size")
    kernel, groups = facts.number("ssm.conv_kernel"), facts.number("ssm.group_count")
    return max(kernel - 1, 0) * (inner + 2 * groups * size) + size * inner
