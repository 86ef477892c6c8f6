"""Damaged copies of a GGUF file, the same ones every time: cut short at every edge, or with a broken header.

    for case in cases(path): case.write(target)

``kind`` says what must become of a copy: "truncated" and "header" are refused; "weights" (bits of the tensor data are
flipped) is refused where the digest is known, and else may load but must not crash.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_U32, _I32, _F32 = 4, 5, 6


@dataclass(frozen=True)
class Entry:
    """A metadata key and where it lies; ``value`` is after the type."""

    key: str
    start: int
    kind: int
    kind_at: int
    value: int
    end: int


@dataclass(frozen=True)
class TensorInfo:
    name: str
    start: int
    dims_at: int  # the number of dimensions, 32 bits
    shape: tuple[int, ...]
    kind_at: int  # 32 bits, then the offset of 64 bits
    offset: int
    end: int


@dataclass
class Layout:
    """Where everything of a GGUF file lies, in bytes from its start."""

    entries: list[Entry] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    header_end: int = 0  # before the padding
    data: int = 0
    size: int = 0

    def entry(self, key: str) -> Entry:
        return next(entry for entry in self.entries if entry.key == key or entry.key.endswith("." + key))


@dataclass(frozen=True)
class Case:
    name: str
    kind: str  # "truncated", "header" or "weights"
    base: Path
    length: int | None = None  # of the copy
    patches: tuple[tuple[int, bytes], ...] = ()
    splice: tuple[int, int, bytes] | None = None  # start, end, what stands there instead; the data is moved along

    def write(self, path: Path) -> Path:
        data = bytearray(self.base.read_bytes())
        if self.splice is not None:
            layout = layout_of(self.base)
            start, end, new = self.splice
            head = data[:start] + new + data[end : layout.header_end]
            data = head + bytes(-len(head) % 32) + data[layout.data :]
        for at, new in self.patches:
            data[at : at + len(new)] = new
        path.write_bytes(data if self.length is None else data[: self.length])
        return path


def layout_of(path: Path) -> Layout:
    """Walk over a sound little-endian GGUF file of version 3."""
    data = path.read_bytes()
    at = 8

    def number(code: str) -> int:
        nonlocal at
        value: int = struct.unpack_from("<" + code, data, at)[0]
        at += struct.calcsize("<" + code)
        return value

    def text() -> str:
        nonlocal at
        length = number("Q")
        at += length
        return data[at - length : at].decode("utf-8", "replace")

    def skip(kind: int) -> None:
        nonlocal at
        if kind == _STRING:
            text()
        elif kind == _ARRAY:
            inner, count = number("I"), number("Q")
            if inner in _SIZES:
                at += _SIZES[inner] * count
            else:
                for _ in range(count):
                    skip(inner)
        else:
            at += _SIZES[kind]

    n_tensors, n_keys = number("Q"), number("Q")
    found = Layout(size=len(data))
    for _ in range(n_keys):
        start, key = at, text()
        kind_at, kind = at, number("I")
        value = at
        skip(kind)
        found.entries.append(Entry(key, start, kind, kind_at, value, at))
    for _ in range(n_tensors):
        start, name = at, text()
        dims_at, n_dims = at, number("I")
        shape = tuple(number("Q") for _ in range(n_dims))
        kind_at = at
        at += 4
        offset = number("Q")
        found.tensors.append(TensorInfo(name, start, dims_at, shape, kind_at, offset, at))
    found.header_end = at
    found.data = -(-at // 32) * 32
    return found


def cases(base: Path, *, most_tensors: int = 12) -> list[Case]:
    """Every damaged copy of a model; of its tensors at most so many are cut or broken each."""
    layout = layout_of(base)
    step = max(1, len(layout.tensors) // most_tensors)
    tensors = layout.tensors[::step]
    found = [*_truncated(base, layout, tensors), *_broken(base, layout, tensors), *_flipped(base, layout)]
    names = [case.name for case in found]
    assert len(names) == len(set(names)), "every case has a name of its own"
    return found


def _truncated(base: Path, layout: Layout, tensors: list[TensorInfo]) -> Iterator[Case]:
    edges: dict[int, str] = {
        0: "empty", 3: "in the magic", 4: "after the magic", 8: "after the version", 12: "in the counts",
        16: "after the number of tensors", 23: "before the last byte of the counts", 24: "after the counts",
    }  # fmt: skip
    for entry in layout.entries:
        edges[entry.start + 4] = f"in the length of the key {entry.key}"
        edges[entry.kind_at] = f"after the key {entry.key}"
        edges[entry.value] = f"before the value of {entry.key}"
        edges[(entry.value + entry.end) // 2] = f"in the value of {entry.key}"
        edges[entry.end] = f"after {entry.key}"
    for info in tensors:
        edges[info.dims_at] = f"after the name of {info.name}"
        edges[info.kind_at] = f"after the shape of {info.name}"
        edges[info.end] = f"after the tensor info of {info.name}"
    edges[layout.header_end] = "after the tensor infos"
    edges[layout.data] = "where the data starts"
    for info in tensors:
        edges[layout.data + info.offset] = f"before the data of {info.name}"
        edges[layout.data + info.offset + 17] = f"in the data of {info.name}"
    for share in (0.25, 0.5, 0.75, 0.95):
        edges[layout.data + int((layout.size - layout.data) * share)] = f"after {share:.0%} of the data"
    edges[layout.size - 4096] = "4 KiB short"
    for at, where in sorted(edges.items()):
        if 0 <= at < layout.size - 64:
            yield Case(f"cut {where}", "truncated", base, length=at)


def _broken(base: Path, layout: Layout, tensors: list[TensorInfo]) -> Iterator[Case]:
    def patch(name: str, *patches: tuple[int, bytes]) -> Case:
        return Case(name, "header", base, patches=patches)

    u32, u64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
    for magic in (b"GGUE", b"FUGG", b"GGML", b"\0\0\0\0"):
        yield patch(f"magic {magic!r}", (0, magic))
    for version in (0, 1, 4, 0x03000000, 0xFFFFFFFF):
        yield patch(f"version {version}", (4, u32(version)))
    for at, what, right in ((8, "tensors", len(layout.tensors)), (16, "keys", len(layout.entries))):
        for count in (0, right - 1, right + 1, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
            yield patch(f"{count} {what}", (at, u64(count)))
    for entry in layout.entries:
        for length in (0, 1 << 16, 1 << 34, (1 << 64) - 1):
            yield patch(f"the key {entry.key} is {length} bytes long", (entry.start, u64(length)))
        for kind in (13, 255, 0xFFFFFFFF):
            yield patch(f"{entry.key} is of type {kind}", (entry.kind_at, u32(kind)))
        if entry.kind == _STRING:
            for length in (1 << 24, 1 << 40, (1 << 64) - 1):
                yield patch(f"the text {entry.key} is {length} bytes long", (entry.value, u64(length)))
        if entry.kind == _ARRAY:
            for count in (1 << 30, 1 << 60, (1 << 64) - 1):
                yield patch(f"the array {entry.key} has {count} elements", (entry.value + 4, u64(count)))
            yield patch(f"the array {entry.key} is of arrays", (entry.value, u32(_ARRAY)))
            yield patch(f"the array {entry.key} is of type 99", (entry.value, u32(99)))
    yield from _wrong_numbers(base, layout)
    first, second = layout.entries[1], layout.entries[2]
    yield Case(
        "a key twice", "header", base, splice=(second.start, second.end, base.read_bytes()[first.start : first.end])
    )
    yield from _wrong_tensors(base, layout, tensors)
    yield from _templates(base, layout)


def _wrong_numbers(base: Path, layout: Layout) -> Iterator[Case]:
    """Hyper-parameters that no model has, and that llama.cpp may meet with an assertion."""
    data = base.read_bytes()
    wrong = {
        "embedding_length": (0, 1, 3, 65, 1 << 30, 0xFFFFFFFF),
        "block_count": (0, 1, 9, 1 << 16, 0xFFFFFFFF),
        "feed_forward_length": (0, 1, 1 << 30),
        "attention.head_count": (0, 3, 1 << 20, 0xFFFFFFFF),
        "attention.head_count_kv": (0, 3, 1 << 20, 0xFFFFFFFF),
        "attention.key_length": (0, 7, 1 << 20),
        "attention.value_length": (0, 7, 1 << 20),
        "rope.dimension_count": (3, 1 << 20, 0xFFFFFFFF),
        "context_length": (0, 0xFFFFFFFF),
        "bos_token_id": (1 << 20, 0xFFFFFFFE),
        "eos_token_id": (1 << 20, 0xFFFFFFFE),
    }  # fmt: skip
    for key, values in wrong.items():
        try:
            entry = layout.entry(key)
        except StopIteration:
            continue
        is_used = key != "feed_forward_length" or any("ffn" in info.name for info in layout.tensors)
        if entry.kind in (_U32, _I32) and is_used:
            right = int(struct.unpack_from("<I", data, entry.value)[0])
            for value in (value for value in values if value != right):
                yield Case(f"{key} is {value}", "header", base, patches=((entry.value, struct.pack("<I", value)),))
    for key, numbers in {
        "layer_norm_rms_epsilon": (-1.0, float("nan"), float("inf")),
        "freq_base": (float("nan"), -1.0),
    }.items():
        entry = next((entry for entry in layout.entries if entry.key.endswith(key) and entry.kind == _F32), None)
        for number in numbers if entry else ():
            assert entry is not None
            yield Case(f"{key} is {number}", "header", base, patches=((entry.value, struct.pack("<f", number)),))
    for alignment in (0, 3, 31, 1 << 30):
        text = b"general.alignment"
        new = struct.pack("<Q", len(text)) + text + struct.pack("<II", _U32, alignment)
        at = layout.entries[0].end
        yield Case(
            f"alignment {alignment}", "header", base, splice=(at, at, new),
            patches=((16, struct.pack("<Q", len(layout.entries) + 1)),),
        )  # fmt: skip
    architecture = layout.entry("general.architecture")
    yield Case(
        "an unknown architecture", "header", base,
        splice=(architecture.value, architecture.end, struct.pack("<Q", 5) + b"qwert"),
    )  # fmt: skip
    tokens = layout.entry("tokenizer.ggml.tokens")
    yield Case(
        "a vocabulary of no token", "header", base,
        splice=(tokens.value, tokens.end, struct.pack("<IQ", _STRING, 0)),
    )  # fmt: skip
    some = _first_texts(base, tokens, 100)
    yield Case("a vocabulary of 100 tokens", "header", base, splice=(tokens.value, tokens.end, some))
    yield Case(
        "no vocabulary", "header", base, splice=(tokens.start, tokens.end, b""),
        patches=((16, struct.pack("<Q", len(layout.entries) - 1)),),
    )  # fmt: skip


def _first_texts(base: Path, tokens: Entry, count: int) -> bytes:
    data, at = base.read_bytes(), tokens.value + 12
    for _ in range(count):
        at += 8 + int(struct.unpack_from("<Q", data, at)[0])
    return struct.pack("<IQ", _STRING, count) + data[tokens.value + 12 : at]


def _wrong_tensors(base: Path, layout: Layout, tensors: list[TensorInfo]) -> Iterator[Case]:
    def patch(name: str, at: int, new: bytes) -> Case:
        return Case(name, "header", base, patches=((at, new),))

    for info in tensors:
        for n_dims in (0, 5, 0xFFFFFFFF):
            yield patch(f"{info.name} has {n_dims} dimensions", info.dims_at, struct.pack("<I", n_dims))
        for dim in (0, 1, 33, info.shape[0] * 2, 1 << 62, (1 << 64) - 32):
            yield patch(f"{info.name} is {dim} wide", info.dims_at + 4, struct.pack("<Q", dim))
        for kind in (4, 5, 31, 200, 0xFFFFFFFF):
            yield patch(f"{info.name} is of type {kind}", info.kind_at, struct.pack("<I", kind))
        for offset in (1, layout.size, 1 << 40, (1 << 64) - 32):
            yield patch(f"{info.name} lies at {offset}", info.kind_at + 4, struct.pack("<Q", offset))
        yield patch(f"{info.name} has another name", info.start + 8, b"z" * len(info.name.encode()))
    one, other = layout.tensors[0], layout.tensors[1]
    data = base.read_bytes()
    yield Case("two tensors of one name", "header", base, splice=(other.start, other.end, data[one.start : one.end]))


def crashers(base: Path, architecture: str) -> list[Case]:
    """Files that end or hang the process that opens them with llama.cpp: assertions, and a loop without end."""
    layout = layout_of(base)
    at, count = layout.entries[0].end, struct.pack("<Q", len(layout.entries) + 1)
    model = layout.entry("tokenizer.ggml.model")
    found = [
        Case("a tokeniser named none", "header", base, splice=(model.value, model.end, struct.pack("<Q", 4) + b"none"))
    ]
    added = [("expert_count", 3), ("expert_used_count", 3)]
    if architecture == "gemma3":
        # With 0 dimensions the decode never ends.
        added += [("rope.dimension_count_swa", 3), ("rope.dimension_count_swa", 0)]
    for key, value in added:
        name = f"{architecture}.{key}".encode()
        new = struct.pack("<Q", len(name)) + name + struct.pack("<II", _U32, value)
        found.append(Case(f"{key} is {value}", "header", base, patches=((16, count),), splice=(at, at, new)))
    return found


LOOP = "{% for i in range(1000000000) %}{% for j in range(1000000000) %}{% endfor %}{% endfor %}"
EXPLODE = (
    "{% set ns = namespace(s='0123456789') %}{% for i in range(30) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
)


def _templates(base: Path, layout: Layout) -> Iterator[Case]:
    entry = next((entry for entry in layout.entries if entry.key == "tokenizer.chat_template"), None)
    if entry is None:
        return
    for name, source in {"loops": LOOP, "explodes": EXPLODE}.items():
        new = struct.pack("<Q", len(source)) + source.encode()
        yield Case(f"a template that {name}", "header", base, splice=(entry.value, entry.end, new))


def _flipped(base: Path, layout: Layout, count: int = 24) -> Iterator[Case]:
    """Bits of the weights: single ones, and stretches that set scales to infinity or not a number."""
    chance, data = random.Random(11), base.read_bytes()
    room = layout.size - layout.data
    for number in range(count):
        places = [layout.data + chance.randrange(room - 64) for _ in range(1 if number < count // 2 else 50)]
        if number % 3 == 2:
            patches = tuple((at, bytes([0xFF]) * 34) for at in places)
        else:
            patches = tuple((at, bytes([data[at] ^ chance.randrange(1, 256)])) for at in places)
        yield Case(f"weights {number}", "weights", base, patches=patches)
