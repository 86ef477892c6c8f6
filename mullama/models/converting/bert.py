"""BERT with a WordPiece vocabulary (MiniLM, bge, e5, cross-encoders) to GGUF, architecture ``bert``.

What llama.cpp wants of such a file is in ``src/models/bert.cpp`` and, for the vocabulary, in ``llama-vocab.cpp``: there
a token that begins a word has U+2581 in front, and one that goes on with a word has lost its ``##``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from mullama.errors import ModelLoadError
from mullama.models.converting import gguf_writer
from mullama.models.converting.safetensors import Safetensors
from mullama.types import Pooling

#: llama.cpp's numbers (enum llama_pooling_type).
_POOLING = {Pooling.NONE: 0, Pooling.MEAN: 1, Pooling.CLS: 2, Pooling.LAST: 3, Pooling.RANK: 4}
_NORMAL, _CONTROL = 1, 3  # types of tokens
_F16 = 1  # general.file_type
_SPECIALS = {
    "cls_token": ("bos", "cls"), "sep_token": ("seperator",), "unk_token": ("unknown",), "pad_token": ("padding",),
    "mask_token": ("mask",),
}  # fmt: skip

_OUTER = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm": "token_embd_norm",
}
_INNER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_HEAD = {"pooler.dense": "cls", "classifier": "cls.output"}
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
#: Kept in 32 bits, as llama.cpp reads them.
_WIDE = ("position_embd.weight", "token_types.weight")


class Config(msgspec.Struct, kw_only=True):
    """What ``config.json`` says, as far as it matters."""

    model_type: str
    architectures: list[str] = msgspec.field(default_factory=list)
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    type_vocab_size: int = 2
    position_embedding_type: str = "absolute"
    id2label: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def ranks(self) -> bool:
        return any(name.endswith("ForSequenceClassification") for name in self.architectures)


class _Pooling(msgspec.Struct, kw_only=True):
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


class _TokenizerConfig(msgspec.Struct, kw_only=True):
    do_lower_case: bool = True
    strip_accents: bool | None = None
    cls_token: str | dict[str, Any] = "[CLS]"
    sep_token: str | dict[str, Any] = "[SEP]"
    unk_token: str | dict[str, Any] = "[UNK]"
    pad_token: str | dict[str, Any] = "[PAD]"
    mask_token: str | dict[str, Any] = "[MASK]"


def convert(folder: Path, out: BinaryIO, *, name: str) -> None:
    """Write the GGUF of the model in ``folder``: matrices in F16, all else in F32.

    Raises ModelLoadError for what is no such model, or damaged.
    """
    config = _read(folder / "config.json", Config)
    if config.model_type != "bert" or config.position_embedding_type != "absolute" or config.hidden_act != "gelu":
        raise ModelLoadError(
            f"only BERT models with absolute positions and gelu are converted; this is '{config.model_type[:40]}' with "
            f"{config.position_embedding_type[:40]} positions and {config.hidden_act[:40]}"
        )
    tokens = _tokens(folder)
    tensors = _tensors(Safetensors(folder / "model.safetensors"), config)
    if tensors["token_embd.weight"].shape != (len(tokens), config.hidden_size):
        raise ModelLoadError(
            f"the vocabulary has {len(tokens)} tokens of {config.hidden_size} values, "
            f"the weights {' x '.join(map(str, tensors['token_embd.weight'].shape))}"
        )
    gguf_writer.write(out, _metadata(folder, config, tokens, name), tensors)


def _metadata(folder: Path, config: Config, tokens: list[str], name: str) -> dict[str, gguf_writer.Value]:
    tokenizer = _read(folder / "tokenizer_config.json", _TokenizerConfig)
    ids = {token: number for number, token in enumerate(tokens)}
    specials: dict[str, gguf_writer.Value] = {}
    control = set()
    for field, words in _SPECIALS.items():
        given = getattr(tokenizer, field)
        token = given if isinstance(given, str) else str(given.get("content"))
        if token not in ids:
            raise ModelLoadError(f"its {field} '{token[:40]}' is not in the vocabulary")
        control.add(token)
        specials |= {f"tokenizer.ggml.{word}_token_id": ids[token] for word in words}
    found: dict[str, gguf_writer.Value] = {
        "general.architecture": "bert",
        "general.name": name,
        "general.file_type": _F16,
        "bert.context_length": config.max_position_embeddings,
        "bert.embedding_length": config.hidden_size,
        "bert.feed_forward_length": config.intermediate_size,
        "bert.block_count": config.num_hidden_layers,
        "bert.attention.head_count": config.num_attention_heads,
        "bert.attention.layer_norm_epsilon": config.layer_norm_eps,
        "bert.attention.causal": False,
        "bert.pooling_type": _POOLING[_pooling(folder, config)],
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.token_type_count": config.type_vocab_size,
        "tokenizer.ggml.tokens": [_spelled(token, control) for token in tokens],
        "tokenizer.ggml.token_type": [_CONTROL if token in control else _NORMAL for token in tokens],
        "tokenizer.ggml.normalizer.lowercase": tokenizer.do_lower_case,
        "tokenizer.ggml.normalizer.strip_accents": (
            tokenizer.do_lower_case if tokenizer.strip_accents is None else tokenizer.strip_accents
        ),
        **specials,
    }
    if config.ranks:
        found["bert.classifier.output_labels"] = [config.id2label[key] for key in sorted(config.id2label, key=int)]
    return found


def _spelled(token: str, control: set[str]) -> str:
    if token in control:
        return token
    return token[2:] if token.startswith("##") and len(token) > 2 else f"\u2581{token}"


def _pooling(folder: Path, config: Config) -> Pooling:
    """What ``1_Pooling`` says; the mean where there is none, as sentence-transformers has it."""
    if config.ranks:
        return Pooling.RANK
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return Pooling.MEAN
    modes = _read(path, _Pooling)
    chosen = [
        kind
        for kind, is_on in (
            (Pooling.CLS, modes.pooling_mode_cls_token),
            (Pooling.MEAN, modes.pooling_mode_mean_tokens),
            (Pooling.LAST, modes.pooling_mode_lasttoken),
        )
        if is_on
    ]
    if len(chosen) != 1:
        raise ModelLoadError(
            "its pooling is neither the mean nor one token's vector, which is all that is computed here"
        )
    return chosen[0]


def _tensors(file: Safetensors, config: Config) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name in sorted(file.names):
        target = _target(name.removeprefix("bert."), config)
        if target is None:
            continue
        data = file.read(name)
        if not np.isfinite(data).all():
            raise ModelLoadError(f"'{name[:80]}' holds values that are no finite numbers")
        is_narrow = data.ndim == 2 and target not in _WIDE
        found[target] = data.astype(np.float16) if is_narrow else data
    wanted = [new for new in _OUTER.values() if new.endswith(".weight")]
    wanted += [f"blk.{i}.{new}.weight" for i in range(config.num_hidden_layers) for new in _INNER.values()]
    wanted += [f"{new}.weight" for new in _HEAD.values()] if config.ranks else []
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ModelLoadError(f"its weights lack what becomes {', '.join(missing[:4])}")
    return found


def _target(name: str, config: Config) -> str | None:
    """What a tensor is called in the GGUF; None: it is not needed."""
    if name in _OUTER:
        return _OUTER[name]
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    if stem in _HEAD:
        return f"{_HEAD[stem]}.{kind}" if config.ranks else None
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in _INNER and int(layer[1]) < config.num_hidden_layers:
        return f"blk.{int(layer[1])}.{_INNER[layer[2]]}.{layer[3]}"
    return None


def _tokens(folder: Path) -> list[str]:
    """The vocabulary, in the order of its ids. Raises ModelLoadError."""
    try:
        tokens = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"its vocab.txt cannot be read: {error}") from None
    tokens = [token.removesuffix("\r") for token in tokens[:-1] if not tokens[-1]] or tokens
    if len(set(tokens)) != len(tokens) or "" in tokens:
        raise ModelLoadError("its vocab.txt has a token twice, or an empty one")
    return tokens


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelLoadError(f"its {path.name} cannot be used: {error}") from None
