"""A writer of GGUF files, version 3: keys, then tensors. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from mullama.models.files.gguf import MAGIC

_ALIGNMENT = 32
_VERSION = 3
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_TENSOR_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}

Value = str | bool | int | float | Sequence[str] | Sequence[int]


def write(file: BinaryIO, metadata: Mapping[str, Value], tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """The same file for the same values. ``tensors`` are F32 or F16, outermost dimension first; lists of numbers are
    written as 32-bit whole numbers. Raises OSError."""
    file.write(MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(_string(key) + _value(value))
    offset = 0
    for name, data in tensors.items():
        shape = data.shape[::-1]
        file.write(
            _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _TENSOR_TYPES[data.dtype], offset)
        )
        offset += _padded(data.nbytes)
    file.write(bytes(_padded(file.tell()) - file.tell()))
    for data in tensors.values():
        file.write(np.ascontiguousarray(data).data)
        file.write(bytes(_padded(data.nbytes) - data.nbytes))


def _value(value: Value) -> bytes:
    match value:
        case str():
            return struct.pack("<I", _STRING) + _string(value)
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _U32, value)
        case float():
            return struct.pack("<If", _F32, value)
        case [str(), *_]:
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, map(str, value)))
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _I32, len(value), *value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT
