"""A tiny random BERT as it is trained and stored (``config.json``, ``vocab.txt``, ``model.safetensors``), and what it
computes, in numpy: the reference of the tests of the converter and of embeddings. Nothing here knows of GGUF."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

N_EMBD, N_FF, N_HEAD, N_LAYER, N_CTX = 64, 128, 4, 2, 128
WORDS = (
    "the of and to in is it sky blue red sea cat dog sat on mat fish swim bird fly tree green one two three four how "
    "are you king queen man woman river bank money walk run small large house home"
)
VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,!?-", *"abcdefghijklmnopqrstuvwxyz0123456789",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"), *WORDS.split(" "), "##ing",
    "##ed", "##s2",
]  # fmt: skip
CLS, SEP, UNK = (VOCABULARY.index(token) for token in ("[CLS]", "[SEP]", "[UNK]"))

Array = np.ndarray[Any, Any]


def write_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, data in tensors.items():
        kind = {"float32": "F32", "float16": "F16", "int64": "I64"}[data.dtype.name]
        header[name] = {"dtype": kind, "shape": list(data.shape), "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data.tobytes() for data in tensors.values()))


class TinyBert:
    """The weights, values of 16 bits in 32, so that what is computed does not depend on the file's type."""

    def __init__(self, *, seed: int = 5, pooling: str = "mean", ranks: bool = False, prefix: str = "") -> None:
        self.pooling, self.ranks, self.prefix = pooling, ranks, prefix
        rng = np.random.default_rng(seed)

        def matrix(n_out: int, n_in: int, scale: float = 1.0) -> Array:
            data = rng.standard_normal((n_out, n_in)) * scale / np.sqrt(n_in)
            return data.astype(np.float16).astype(np.float32)

        def vector(n: int, centre: float = 0.0) -> Array:
            return (centre + 0.1 * rng.standard_normal(n)).astype(np.float32)

        w: dict[str, Array] = {
            "embeddings.word_embeddings.weight": matrix(len(VOCABULARY), N_EMBD, 4),
            "embeddings.position_embeddings.weight": matrix(N_CTX, N_EMBD),
            "embeddings.token_type_embeddings.weight": matrix(2, N_EMBD),
            "embeddings.LayerNorm.weight": vector(N_EMBD, 1),
            "embeddings.LayerNorm.bias": vector(N_EMBD),
        }
        for i in range(N_LAYER):
            at = f"encoder.layer.{i}."
            for name in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
            ):
                w[f"{at}{name}.weight"], w[f"{at}{name}.bias"] = matrix(N_EMBD, N_EMBD, 2), vector(N_EMBD)
            w[f"{at}intermediate.dense.weight"], w[f"{at}intermediate.dense.bias"] = (
                matrix(N_FF, N_EMBD, 2),
                vector(N_FF),
            )
            w[f"{at}output.dense.weight"], w[f"{at}output.dense.bias"] = matrix(N_EMBD, N_FF, 2), vector(N_EMBD)
            for name in ("attention.output.LayerNorm", "output.LayerNorm"):
                w[f"{at}{name}.weight"], w[f"{at}{name}.bias"] = vector(N_EMBD, 1), vector(N_EMBD)
        w["pooler.dense.weight"], w["pooler.dense.bias"] = matrix(N_EMBD, N_EMBD), vector(N_EMBD)
        if ranks:
            w["classifier.weight"], w["classifier.bias"] = matrix(1, N_EMBD, 3), vector(1)
        self.weights = w

    def write(self, folder: Path) -> Path:
        """The folder of the model, as it is found in a wheel or a repository."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "model_type": "bert", "architectures": ["BertForSequenceClassification" if self.ranks else "BertModel"],
            "hidden_size": N_EMBD, "num_hidden_layers": N_LAYER, "num_attention_heads": N_HEAD,
            "intermediate_size": N_FF, "max_position_embeddings": N_CTX, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
            "type_vocab_size": 2, "vocab_size": len(VOCABULARY), "id2label": {"0": "LABEL_0"},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "unk_token": "[UNK]"}))
        if not self.ranks:
            (folder / "1_Pooling").mkdir(exist_ok=True)
            modes = {
                "cls": "pooling_mode_cls_token",
                "mean": "pooling_mode_mean_tokens",
                "max": "pooling_mode_max_tokens",
            }
            chosen = {name: mode == self.pooling for mode, name in modes.items()}
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(chosen))
        ids = {"embeddings.position_ids": np.arange(N_CTX, dtype=np.int64)[None]}
        named = {f"{self.prefix}{name}": data for name, data in (self.weights | ids).items()}
        write_safetensors(folder / "model.safetensors", named)
        return folder

    def tokens(self, tokens: Sequence[int]) -> Array:
        """The vectors of all tokens of one text, in 64 bits."""
        w, n, head = self.weights, len(tokens), N_EMBD // N_HEAD
        x = w["embeddings.word_embeddings.weight"][list(tokens)].astype(np.float64)
        x = x + w["embeddings.position_embeddings.weight"][:n] + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for i in range(N_LAYER):
            at = f"encoder.layer.{i}."
            q, k, v = (
                self._linear(x, f"{at}attention.self.{name}").reshape(n, N_HEAD, head).swapaxes(0, 1)
                for name in ("query", "key", "value")
            )
            scores = q @ k.swapaxes(1, 2) / np.sqrt(head)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            attended = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(n, N_EMBD)
            x = self._norm(x + self._linear(attended, f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
            inner = self._linear(x, f"{at}intermediate.dense")
            erf = np.vectorize(__import__("math").erf)
            inner = 0.5 * inner * (1 + erf(inner / np.sqrt(2)))
            x = self._norm(x + self._linear(inner, f"{at}output.dense"), f"{at}output.LayerNorm")
        return x

    def embed(self, tokens: Sequence[int], pooling: str | None = None) -> Array:
        """One text's vector, of length 1."""
        rows = self.tokens(tokens)
        pooling = pooling or self.pooling
        found = rows.mean(0) if pooling == "mean" else rows[0 if pooling == "cls" else -1]
        return np.asarray(found / np.linalg.norm(found))

    def rank(self, tokens: Sequence[int]) -> float:
        """What the head says of a text."""
        pooled = np.tanh(self._linear(self.tokens(tokens)[0], "pooler.dense"))
        return float(self._linear(pooled, "classifier")[0])

    def _linear(self, x: Array, name: str) -> Array:
        return np.asarray(x @ self.weights[f"{name}.weight"].T.astype(np.float64) + self.weights[f"{name}.bias"])

    def _norm(self, x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return np.asarray(x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])


def cosine(a: Array, b: Array) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
