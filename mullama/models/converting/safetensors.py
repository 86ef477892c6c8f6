"""A reader of ``.safetensors``: 8 bytes that say how long the header is, a JSON header, the tensors' bytes.

SAFETY: nothing is believed before it was compared with the file's size. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mullama.errors import ModelLoadError

#: Types by their name in the header; BF16 is read as its 16 bits.
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
_MOST_HEADER = 100 << 20  # bytes, as the reference reader has it


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Safetensors:
    """The tensors of a file, mapped. Raises ModelLoadError for one that is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                n = int.from_bytes(file.read(8), "little")
                if not 2 <= n <= min(_MOST_HEADER, size - 8):
                    raise ModelLoadError(f"{path.name}: damaged: its header would have {n} bytes")
                members = msgspec.json.decode(file.read(n), type=dict[str, msgspec.Raw])
            members.pop("__metadata__", None)
            self._entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in members.items()}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ModelLoadError(f"{path.name}: it cannot be read as safetensors: {error}") from None
        self._data = np.memmap(path, np.uint8, "r", offset=8 + n) if size > 8 + n else np.zeros(0, np.uint8)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name].shape)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor in 32-bit floats (whole numbers stay what they are). Raises ModelLoadError."""
        entry = self._entries[name]
        start, end = entry.data_offsets
        kind = np.dtype(_TYPES[entry.dtype]) if entry.dtype in _TYPES else None
        if kind is None:
            raise ModelLoadError(
                f"{self._path.name}: '{name[:80]}' is of the type {entry.dtype[:20]}, which is not read"
            )
        if min(entry.shape, default=0) < 0 or end - start != math.prod(entry.shape) * kind.itemsize:
            raise ModelLoadError(f"{self._path.name}: damaged: the bytes of '{name[:80]}' are not what its shape says")
        if not 0 <= start <= end <= self._data.size:
            raise ModelLoadError(f"{self._path.name}: truncated: '{name[:80]}' ends behind the file")
        values = self._data[start:end].view(kind).reshape(entry.shape)
        if entry.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if kind.kind == "f" else np.asarray(values)
