"""Importance matrices: how much each column of a weight matters, measured by llama.cpp's ``llama-imatrix``.

Two forms are read: a GGUF (sums of squares and counts by tensor) and the older binary one (``.dat``).
"""

from __future__ import annotations

import array
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from mullama.errors import ModelLoadError
from mullama.models.files import gguf
from mullama.models.files.gguf import Header, Tensor

_SUMS, _COUNTS = ".in_sum2", ".counts"
_F32 = 0
_MAX_ENTRIES = 1 << 17
_MAX_NAME = 255  # bytes
_MAX_FILE = 1 << 30  # bytes; a matrix of the largest models has a few hundred megabytes


def read_imatrix(path: str | Path) -> dict[str, bytes]:
    """By tensor name, a 32-bit float for each column (of each expert). Raises ModelLoadError: not a sound matrix."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ModelLoadError(f"{path}: there is no such importance matrix")
        if path.stat().st_size > _MAX_FILE:
            raise ModelLoadError(f"{path}: too large to be an importance matrix")
        data = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    found = _from_gguf(path, data) if data[:4] == gguf.MAGIC else _from_dat(path, data)
    if not found:
        raise ModelLoadError(f"{path}: an importance matrix of no tensors")
    for name, values in found.items():
        if not all(map(math.isfinite, values)):
            raise ModelLoadError(f"{path}: the importance of {_shown(name)} is not finite; the matrix is damaged")
    return {name: values.tobytes() for name, values in found.items()}


def check_matches(imatrix: Mapping[str, bytes], header: Header, path: str | Path) -> None:
    """Raise ModelLoadError unless the matrix was made of this model: same tensors, same widths."""
    tensors = {tensor.name: tensor for tensor in header.tensors}
    common = [name for name in imatrix if name in tensors]
    if not common:
        raise ModelLoadError(f"{path}: the importance matrix belongs to another model: no tensor's name is the same")
    for name in common:
        shape = tensors[name].shape
        wanted = shape[0] * (shape[2] if len(shape) > 2 else 1)
        if len(imatrix[name]) // 4 != wanted and not name.startswith("token_embd."):
            raise ModelLoadError(
                f"{path}: the importance matrix belongs to another model: {_shown(name)} has {len(imatrix[name]) // 4} "
                f"columns in it and {wanted} in the model"
            )


def _from_gguf(path: Path, data: bytes) -> dict[str, array.array[float]]:
    header = gguf.check(path)
    if header.get("general.type") not in ("imatrix", None):
        raise ModelLoadError(f"{path}: a GGUF of the type {_shown(str(header.get('general.type')))}, not an imatrix")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(_SUMS):
            continue
        base = name.removesuffix(_SUMS)
        counts = tensors.get(base + _COUNTS)
        if counts is None or tensor.type_id != _F32 or counts.type_id != _F32:
            raise ModelLoadError(f"{path}: a damaged importance matrix: {_shown(base)} has no counts")
        sums, of = _floats(data, header, tensor), _floats(data, header, counts)
        if not of or len(sums) % len(of):
            raise ModelLoadError(f"{path}: a damaged importance matrix: sums and counts of {_shown(base)} do not match")
        found[base] = _means(sums, of)
    if not found:
        raise ModelLoadError(f"{path}: a GGUF file, but not an importance matrix (no tensor ends in {_SUMS})")
    return found


def _floats(data: bytes, header: Header, tensor: Tensor) -> array.array[float]:
    start = header.data_start + tensor.offset
    return array.array("f", data[start : start + (tensor.size or 0)])


def _means(sums: array.array[float], counts: array.array[float]) -> array.array[float]:
    """Each expert's sums by its own count; an expert that was never used has the importance 1."""
    width = len(sums) // len(counts)
    means = array.array("f")
    for expert, count in enumerate(counts):
        own = sums[expert * width : (expert + 1) * width]
        means.extend([value / count for value in own] if count > 0 else [1.0] * width)
    return means


def _from_dat(path: Path, data: bytes) -> dict[str, array.array[float]]:
    """Entries of: length and name, number of calls, number of values, the sums."""
    found: dict[str, array.array[float]] = {}
    try:
        (n_entries,), at = struct.unpack_from("<i", data, 0), 4
        if not 0 < n_entries <= _MAX_ENTRIES:
            raise ValueError
        for _ in range(n_entries):
            (length,) = struct.unpack_from("<i", data, at)
            if not 0 < length <= _MAX_NAME:
                raise ValueError
            name = data[at + 4 : at + 4 + length].decode("ascii")
            n_calls, n_values = struct.unpack_from("<ii", data, at + 4 + length)
            at += 12 + length
            if n_values <= 0 or at + 4 * n_values > len(data):
                raise ValueError
            sums = array.array("f", data[at : at + 4 * n_values])
            found[name] = array.array("f", [value / n_calls for value in sums]) if n_calls > 0 else sums
            at += 4 * n_values
    except (struct.error, ValueError):
        raise ModelLoadError(f"{path}: not an importance matrix, or a damaged one") from None
    return found


def _shown(text: str) -> str:
    return "'" + "".join(c if c.isprintable() else "\ufffd" for c in text[:64]) + "'"
