"""Small GGUF files: made of a description, and changed piece by piece so that most of a file stays sound.

A description is ``{"version": 3, "pairs": [[key, type, value], ...], "tensors": [[name, shape, type, offset], ...]}``;
a type is a name of ``CODES``, "string", or either in brackets for an array. ``tail`` is bytes of tensor data.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from typing import Any

CODES = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
    "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip
SIZES = {kind: struct.calcsize(code) for kind, code in CODES.values()}
STRING, ARRAY = 8, 9
ODD = (0, 1, 2, 3, 7, 31, 32, 255, 256, 511, 512, 4096, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
       1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
#: Keys that make llama.cpp or us look at more.
KEYS = [b"general.architecture", b"general.alignment", b"split.count", b"split.no", b"split.tensors.count",
        b"llama.block_count", b"llama.context_length", b"llama.embedding_length", b"llama.feed_forward_length",
        b"llama.attention.head_count", b"llama.attention.head_count_kv", b"llama.attention.key_length",
        b"llama.attention.value_length", b"llama.attention.layer_norm_rms_epsilon", b"llama.rope.freq_base",
        b"llama.rope.dimension_count", b"llama.rope.scaling.type", b"llama.rope.scaling.factor", b"llama.vocab_size",
        b"llama.attention.sliding_window", b"llama.attention.sliding_window_pattern", b"llama.ssm.conv_kernel",
        b"llama.expert_count", b"llama.expert_used_count", b"general.type", b"adapter.type", b"adapter.lora.alpha",
        b"tokenizer.ggml.model", b"tokenizer.ggml.pre", b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores",
        b"tokenizer.ggml.token_type", b"tokenizer.ggml.merges", b"tokenizer.ggml.bos_token_id",
        b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.unknown_token_id", b"tokenizer.ggml.padding_token_id",
        b"tokenizer.ggml.add_bos_token", b"tokenizer.ggml.add_space_prefix", b"tokenizer.ggml.token_type_count",
        b"tokenizer.ggml.precompiled_charsmap", b"tokenizer.ggml.remove_extra_whitespaces", b"tokenizer.chat_template",
        b"tokenizer.ggml.fim_pre_token_id", b"tokenizer.ggml.eot_token_id"]  # fmt: skip


@dataclass
class Pieces:
    """A file taken apart: values as bytes, behind their types."""

    version: int = 3
    pairs: list[tuple[bytes, bytes]] = field(default_factory=list)
    tensors: list[tuple[bytes, list[int], int, int]] = field(default_factory=list)
    tail: bytes = b""

    def joined(self, n_tensors: int | None = None, n_pairs: int | None = None) -> bytes:
        """The file; other counts than are true may be claimed."""
        counts = (
            len(self.tensors) if n_tensors is None else n_tensors,
            len(self.pairs) if n_pairs is None else n_pairs,
        )
        out = bytearray(struct.pack("<4sIQQ", b"GGUF", self.version, *counts))
        for key, value in self.pairs:
            out += text(key) + value
        for name, shape, kind, offset in self.tensors:
            out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        if self.tail:
            out += bytes(-len(out) % 32) + self.tail
        return bytes(out)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def value_of(kind: str, value: Any) -> bytes:
    """A typed value as a file has it."""
    if kind == "string":
        return struct.pack("<I", STRING) + text(value.encode("utf-8", "surrogatepass"))
    if kind == "[string]":
        items = b"".join(text(one.encode("utf-8", "surrogatepass")) for one in value)
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + items
    if kind.startswith("["):
        number, code = CODES[kind[1:-1]]
        return struct.pack(f"<IIQ{len(value)}{code}", ARRAY, number, len(value), *value)
    number, code = CODES[kind]
    return struct.pack("<I" + code, number, value)


def made_of(description: dict[str, Any]) -> bytes:
    """The file that a description tells of."""
    pairs = [(key.encode(), value_of(kind, value)) for key, kind, value in description.get("pairs", [])]
    tensors = [(name.encode(), shape, kind, offset) for name, shape, kind, offset in description.get("tensors", [])]
    return Pieces(description.get("version", 3), pairs, tensors, bytes(description.get("tail", 0))).joined()


def taken_apart(data: bytes) -> Pieces:
    """Raises struct.error or IndexError where it is not sound."""
    version, n_tensors, n_pairs = struct.unpack_from("<IQQ", data, 4)
    if n_tensors > 1000 or n_pairs > 1000:
        raise IndexError
    found, at = Pieces(version), 24

    def string() -> bytes:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        if length > len(data) - at:
            raise IndexError
        at += 8 + length
        return data[at - length : at]

    for _ in range(n_pairs):
        key, start = string(), at
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        if kind == ARRAY:
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            if count > len(data):
                raise IndexError
            if inner == STRING:
                for _ in range(count):
                    string()
            else:
                at += SIZES[inner] * count
        elif kind == STRING:
            string()
        else:
            at += SIZES[kind]
        found.pairs.append((key, data[start:at]))
    for _ in range(n_tensors):
        name = string()
        (n_dims,) = struct.unpack_from("<I", data, at)
        if n_dims > 8:
            raise IndexError
        *shape, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, at + 4)
        at += 4 + 8 * n_dims + 12
        found.tensors.append((name, shape, kind, offset))
    found.tail = data[-(-at // 32) * 32 :]
    return found


def change_file(rng: random.Random, data: bytes) -> bytes:
    """The file with one to three of its pieces changed, as far as it can be taken apart; else with odd counts."""
    try:
        pieces = taken_apart(data)
    except (struct.error, IndexError, KeyError):
        return struct.pack("<4sIQQ", b"GGUF", 3, rng.choice(ODD), rng.choice(ODD)) + data[24:]
    n_tensors: int | None = None
    n_pairs: int | None = None
    for _ in range(rng.randint(1, 3)):
        how = rng.randrange(12)
        if how < 6 and pieces.pairs:
            at = rng.randrange(len(pieces.pairs))
            key, value = pieces.pairs[at]
            pieces.pairs[at] = (key, _changed_value(rng, value))
        elif how == 6 and pieces.pairs:
            at = rng.randrange(len(pieces.pairs))
            pieces.pairs[at] = (rng.choice(KEYS), pieces.pairs[at][1])
        elif how == 7 and pieces.pairs:
            del pieces.pairs[rng.randrange(len(pieces.pairs))]
        elif how == 8:
            kind = rng.choice([*CODES, "string", "[string]", "[i32]", "[f32]", "[u32]"])
            pieces.pairs.append((rng.choice(KEYS), _some_value(rng, kind)))
        elif how == 9 and pieces.tensors:
            at = rng.randrange(len(pieces.tensors))
            name, shape, number, offset = pieces.tensors[at]
            shape = [rng.choice(ODD) if rng.random() < 0.4 else dim for dim in shape]
            pieces.tensors[at] = (name, shape, rng.choice((number, rng.randrange(45))), rng.choice((offset, *ODD)))
        elif how == 10:
            shape = [rng.choice(ODD) for _ in range(rng.randrange(5))]
            pieces.tensors.append((b"t%d" % rng.randrange(9), shape, rng.randrange(45), 0))
        else:
            n_tensors = rng.choice((None, rng.choice(ODD)))
            n_pairs = rng.choice((None, rng.choice(ODD)))
    return pieces.joined(n_tensors, n_pairs)


def _some_value(rng: random.Random, kind: str) -> bytes:
    plain = kind.strip("[]")
    n = rng.choice((0, 1, 2, 5, 40))
    if plain == "string":
        words = ["", "llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "no_vocab", "a", "▁a", "Ġa", "<s>", "<0x41>",
                 "a b", "default", "llama-bpe", "qwen2", "gpt-4o", "linear", "yarn", "\0", "x" * 70]  # fmt: skip
        return value_of(kind, rng.choice(words) if kind == "string" else [rng.choice(words) for _ in range(n)])
    _, code = CODES[plain]
    if code in "fd":
        numbers: list[Any] = [0.0, -1.0, 1e-5, 1.0, 1e30, float("inf"), float("nan")]
    elif code == "?":
        numbers = [False, True]
    else:
        bits = 8 * struct.calcsize(code)
        numbers = [(one & ((1 << bits) - 1)) - (1 << bits if code.islower() and one >> (bits - 1) & 1 else 0)
                   for one in ODD if one < 1 << bits]  # fmt: skip
    return value_of(kind, rng.choice(numbers) if kind == plain else [rng.choice(numbers) for _ in range(n)])


def _changed_value(rng: random.Random, value: bytes) -> bytes:
    """Another value, of the same type mostly."""
    (kind,) = struct.unpack_from("<I", value)
    names = {number: name for name, (number, _) in CODES.items()} | {STRING: "string"}
    if rng.random() < 0.15:
        return _some_value(rng, rng.choice([*CODES, "string", "[string]", "[i32]", "[f32]", "[bool]"]))
    if kind != ARRAY:
        return _some_value(rng, names[kind])
    inner, count = struct.unpack_from("<IQ", value, 4)
    if inner != STRING:
        if rng.random() < 0.5 or not count:
            return _some_value(rng, f"[{names[inner]}]")
        size = SIZES[inner]
        at = 16 + rng.randrange(count) * size
        return value[:at] + _some_value(rng, names[inner])[4:] + value[at + size :]
    items, at = [], 16
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", value, at)
        items.append(value[at : at + 8 + length])
        at += 8 + length
    how = rng.randrange(4)
    if how == 0 and items:
        del items[rng.randrange(len(items)) :]
    elif how == 1 and items:
        items[rng.randrange(len(items))] = rng.choice(items)
    elif items:
        odd = (
            b"",
            b" ",
            b"\xff",
            "Ġ".encode(),
            "▁".encode(),
            b"<0x0A>",
            b"a",
            bytes(rng.randrange(256) for _ in range(4)),
        )
        items[rng.randrange(len(items))] = text(rng.choice(odd))
    return value[:8] + struct.pack("<Q", len(items)) + b"".join(items)
