"""A reader of GGUF headers: what ``mullama show`` prints, and the check before llama.cpp sees a file.

Pure Python over a memory map, every access bounds-checked by ``struct``. Nothing is believed before it was compared
with the file's size, so that a damaged file costs a clear message and never memory or time.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and ``gguf.cpp`` for what llama.cpp accepts.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mullama.errors import ModelLoadError

MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"
#: The names by which llama.cpp finds the parts of a split model, counted from 1.
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)

# gguf_type -> (name, struct format); llama.cpp knows no arrays of arrays.
_SCALARS = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_STRING, _ARRAY, _U32 = 8, 9, 4

#: ggml_type -> (name, elements in a block, bytes of a block). A test compares it with the vendored gguf-py.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_STRINGS = 1 << 24  # in one array: 60 times the largest vocabulary; bounds the time spent on a damaged count
_MAX_TEXT = 1 << 20  # bytes of a text that is decoded; longer ones (an embedded tokenizer.json) are summarised
_MAX_TOKEN = 1 << 13  # bytes of a token or a merge: llama.cpp calls itself once for each of them
_MAX_DIMS = 4
_MAX_TENSOR_NAME = 63  # bytes; GGML_MAX_NAME less the NUL
_MAX_PARTS = 1000
_HEAD = 3  # elements of an array that are kept
_SHORT = 1024  # of an array of numbers that is kept whole: a setting for each layer

_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class Summary:
    """Stands for a value that was skipped: an array, or a very long text (``type`` "string", its bytes counted)."""

    type: str
    count: int
    head: tuple[Any, ...] = ()
    values: tuple[Any, ...] = field(default=(), compare=False, repr=False)  # all, of a short array of numbers

    def __str__(self) -> str:
        if not self.head:
            return f"[{self.count} × {self.type}]"
        more = ", …" if self.count > len(self.head) else ""
        return f"[{self.count} × {self.type}: {', '.join(map(repr, self.head))}{more}]"


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # innermost dimension first, as ggml counts
    type_id: int
    offset: int  # from the start of the tensor data

    @property
    def type(self) -> str:
        return TENSOR_TYPES[self.type_id][0] if self.type_id in TENSOR_TYPES else f"type {self.type_id}"

    @property
    def n_elements(self) -> int:
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    @property
    def size(self) -> int | None:
        """Bytes, or None for a type this reader does not know."""
        if self.type_id not in TENSOR_TYPES:
            return None
        _, block, size = TENSOR_TYPES[self.type_id]
        return self.n_elements // block * size


@dataclass(slots=True)
class Header:
    """Everything before the tensor data."""

    version: int
    file_size: int
    metadata: dict[str, Any] = field(default_factory=dict)  # arrays and very long texts as Summary
    tensors: list[Tensor] = field(default_factory=list)
    data_start: int = 0  # byte at which the tensor data starts
    n_parts: int = 1  # files that ``file_size`` and ``tensors`` are summed over

    def get(self, key: str, default: Any = None) -> Any:
        """A value by its key; ``{arch}`` in it stands for the architecture."""
        return self.metadata.get(key.replace("{arch}", str(self.metadata.get("general.architecture"))), default)

    def count(self, key: str) -> int | None:
        """Elements of the array under a key; None where there is none, or something else."""
        value = self.get(key)
        return value.count if isinstance(value, Summary) else None

    def name_of(self, key: str) -> str:
        """A key as ``get`` takes it, for a message."""
        return printable(key.replace("{arch}", str(self.metadata.get("general.architecture"))))

    @property
    def n_params(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors)


def read_header(path: str | Path, *, label: str | None = None) -> Header:
    """Read a header. Raises ModelLoadError in one line that starts with ``label`` (default: the path)."""
    label = str(path) if label is None else label
    try:
        # Before the file is opened: opening a pipe would wait for its writer.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ModelLoadError(f"{label}: not a regular file")
        with Path(path).open("rb") as file:
            info = os.fstat(file.fileno())
            if info.st_size < 24:
                raise ModelLoadError(f"{label}: too short to be a GGUF file ({info.st_size} bytes)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, label).read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or a file emptied since fstat
        raise ModelLoadError(f"{label}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def check(path: str | Path, *, label: str | None = None) -> Header:
    """``read_header``, and every tensor of a known type lies inside the file. Raises ModelLoadError.

    Of a split model ``path`` is the first part, and every part is checked; ``tensors`` and ``file_size`` are then those
    of all parts. Takes a few milliseconds; the weights themselves are not read.
    """
    header = check_part(path, label=label)
    count = header.get("split.count")
    if not isinstance(count, int) or count <= 1:
        return header
    label = str(path) if label is None else label
    number = header.get("split.no", 0)
    if type(number) is not int:
        raise ModelLoadError(f"{label}: damaged GGUF header: split.no is {_shown(str(number))}, which is not a number")
    if number != 0:
        raise ModelLoadError(f"{label}: this is part {number + 1} of {count}; name the first part")
    paths = part_paths(path)
    if len(paths) != count:
        raise ModelLoadError(
            f"{label}: it is the first of {count} files, and llama.cpp finds the others only if its name ends in "
            f"-00001-of-{count:05}.gguf"
        )
    for number, part in enumerate(paths[1:], 2):
        if not part.exists():
            raise ModelLoadError(f"{label}: part {number} of {count} is missing: there is no {part.name} beside it")
        other = check_part(part, label=f"{label}, part {number} of {count}")
        if (other.get("split.no"), other.get("split.count")) != (number - 1, count):
            raise ModelLoadError(f"{label}: {part.name} is not part {number} of {count} of a split model")
        header.tensors.extend(other.tensors)
        header.file_size += other.file_size
    header.n_parts = count
    total = header.get("split.tensors.count")
    if isinstance(total, int) and total != len(header.tensors):
        raise ModelLoadError(
            f"{label}: its {count} parts hold {len(header.tensors)} tensors where {total} are expected"
        )
    return header


def part_paths(path: str | Path) -> list[Path]:
    """The files of a model whose first part is ``path``, by its name; itself alone when that is no name of a part."""
    path = Path(path)
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["number"]) != 1 or not 1 < int(match["count"]) <= _MAX_PARTS:
        return [path]
    ending = path.name[-5:]
    names = (f"{match['stem']}-{number:05}-of-{match['count']}{ending}" for number in range(1, int(match["count"]) + 1))
    return [path.with_name(name) for name in names]


def check_part(path: str | Path, *, label: str | None = None) -> Header:
    """``check`` of one file, whether or not it is part of a split model. Raises ModelLoadError."""
    header = read_header(path, label=label)
    label = str(path) if label is None else label
    room = header.file_size - header.data_start
    for tensor in header.tensors:
        size = tensor.size
        missing = tensor.offset + (size or 0) - room
        if missing > 0:
            raise ModelLoadError(
                f"{label}: truncated: the tensor {_shown(tensor.name)} ends {missing} bytes behind the file"
            )
    return header


def _shown(text: str) -> str:
    """A text of the file for a message. SAFETY: a damaged one may be long, have lines, or steer a terminal."""
    return f"'{printable(text)}'"


def printable(text: str) -> str:
    """The same without quotes."""
    text = text if len(text) <= 64 else text[:63] + "…"
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


class _Damaged(Exception):
    pass


class _Reader:
    """One pass over the map; ``at`` is the next byte."""

    def __init__(self, data: mmap.mmap, label: str) -> None:
        self.data = data
        self.label = label
        self.size = len(data)
        self.at = 0

    def read(self) -> Header:
        try:
            return self._read()
        except _Damaged as error:
            raise ModelLoadError(f"{self.label}: damaged GGUF header: {error}") from None
        except (struct.error, OverflowError):
            raise ModelLoadError(f"{self.label}: truncated or damaged: its header runs past the file's end") from None

    def _read(self) -> Header:
        if self.data[:4] != MAGIC:
            raise ModelLoadError(f"{self.label}: not a GGUF file (it starts with {self.data[:4]!r})")
        self.at = 4
        version = self.u32()
        if version not in (2, 3):
            hint = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise ModelLoadError(f"{self.label}: GGUF version {version} is not supported, only 2 and 3{hint}")
        n_tensors, n_keys = self.u64(), self.u64()
        if n_tensors > min(_MAX_TENSORS, self.size // 24):
            raise _Damaged(f"it claims {n_tensors} tensors")
        if n_keys > min(_MAX_KEYS, self.size // 13):
            raise _Damaged(f"it claims {n_keys} metadata keys")
        header = Header(version, self.size)
        for _ in range(n_keys):
            self.entry(header.metadata)
        alignment = self.alignment(header.metadata)
        names: set[str] = set()
        for _ in range(n_tensors):
            tensor = self.tensor(alignment)
            if tensor.name in names:
                raise _Damaged(f"two tensors are called {_shown(tensor.name)}")
            names.add(tensor.name)
            header.tensors.append(tensor)
        header.data_start = -(-self.at // alignment) * alignment
        return header

    def entry(self, metadata: dict[str, Any]) -> None:
        key = self.string(65535)
        if not key or key in metadata:
            raise _Damaged(f"the metadata key {_shown(key)} is {'there twice' if key else 'empty'}")
        metadata[key] = self.value(self.u32(), key)

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind == _STRING:
            length = self.u64()
            if length <= _MAX_TEXT:
                return self.text(length)
            self.skip(length)
            return Summary("string", length)
        if kind == _ARRAY:
            return self.array(key)
        raise _Damaged(f"the metadata key {_shown(key)} has the unknown type {kind}")

    def array(self, key: str) -> Summary:
        kind, count = self.u32(), self.u64()
        if kind in _SCALARS:
            name, code = _SCALARS[kind]
            start = self.at
            self.skip(count * struct.calcsize("<" + code))
            head = struct.unpack_from(f"<{count if count <= _SHORT else _HEAD}{code}", self.data, start)
            return Summary(name, count, head[:_HEAD], head if count <= _SHORT else ())
        if kind != _STRING:
            raise _Damaged(f"the metadata key {_shown(key)} is an array of the unknown type {kind}")
        if count > min(_MAX_STRINGS, (self.size - self.at) // 8):
            raise _Damaged(f"the metadata key {_shown(key)} claims {count} texts")
        most = _MAX_TOKEN if key.startswith("tokenizer.") else _MAX_TEXT
        head = tuple(self.string(most) for _ in range(min(count, _HEAD)))
        # PERF: a vocabulary is here, so this loop is the cost of the whole reader (60 ns an element). A length that
        # leaves the file makes the next unpack_from fail.
        at, data, u64 = self.at, self.data, _u64
        for _ in range(count - len(head)):
            length = u64(data, at)[0]
            if length > most:
                raise _Damaged(f"a text of {length} bytes where at most {most} are allowed")
            at += 8 + length
        self.at = at
        self.skip(0)
        return Summary("string", count, head)

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get(ALIGNMENT_KEY, 32)
        if type(value) is not int or value <= 0 or value & (value - 1) or value > 1 << 20:
            raise _Damaged(f"{ALIGNMENT_KEY} is {_shown(str(value))}, which is not a power of two")
        return value

    def tensor(self, alignment: int) -> Tensor:
        name = self.string(_MAX_TENSOR_NAME)
        n_dims = self.u32()
        if n_dims > _MAX_DIMS:
            raise _Damaged(f"the tensor {_shown(name)} has {n_dims} dimensions")
        shape = tuple(self.u64() for _ in range(n_dims))
        tensor = Tensor(name, shape, self.u32(), self.u64())
        if tensor.n_elements >= 1 << 63:
            raise _Damaged(f"the tensor {_shown(name)} has the impossible shape {shape}")
        if tensor.offset % alignment:
            raise _Damaged(f"the tensor {_shown(name)} lies at the offset {tensor.offset}, which is not aligned")
        known = TENSOR_TYPES.get(tensor.type_id)
        if known and shape and shape[0] % known[1]:
            raise _Damaged(
                f"the tensor {_shown(name)} of type {known[0]} has rows of {shape[0]}, no multiple of {known[1]}"
            )
        return tensor

    # -- primitives; struct.error at the end of the file

    def u32(self) -> int:
        value: int = _u32(self.data, self.at)[0]
        self.at += 4
        return value

    def u64(self) -> int:
        value: int = _u64(self.data, self.at)[0]
        self.at += 8
        return value

    def scalar(self, kind: int) -> Any:
        code = _SCALARS[kind][1]
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def string(self, limit: int) -> str:
        length = self.u64()
        if length > limit:
            raise _Damaged(f"a text of {length} bytes where at most {limit} are allowed")
        return self.text(length)

    def text(self, length: int) -> str:
        start = self.at
        self.skip(length)
        return self.data[start : self.at].decode("utf-8", "replace")

    def skip(self, length: int) -> None:
        self.at += length
        if self.at > self.size:
            raise struct.error
