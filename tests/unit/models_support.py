"""Shared by the tests of the models room: small valid GGUF files, wheels around them, a pip without network."""

from __future__ import annotations

import shutil
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_CODES = {4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}


def gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value_bytes(value: Any) -> bytes:
    """A value with its type in front."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_string, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.license": "mit",
    "llama.context_length": 2048,
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "ä", "hello"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1],
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
#: Name, shape, ggml type, bytes: F32 and Q8_0.
TENSORS: list[tuple[str, tuple[int, ...], int, int]] = [
    ("token_embd.weight", (32, 5), 8, 5 * 34),
    ("output_norm.weight", (32,), 0, 128),
]


def make_gguf(
    metadata: Mapping[str, Any] | None = None,
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
    seed: int = 0,
) -> bytes:
    """The bytes of a GGUF file; ``seed`` makes its weights, and so its sha256, another one."""
    metadata = METADATA if metadata is None else metadata
    tensors = TENSORS if tensors is None else tensors
    out = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += gguf_string(key) + value_bytes(value)
    offset, data = 0, b""
    for name, shape, kind, size in tensors:
        out += gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        padded = -(-size // alignment) * alignment
        data += bytes([seed % 256]) * size + bytes(padded - size)
        offset += padded
    return out + bytes(-len(out) % alignment) + data


def make_wheel(folder: Path, package: str, files: Mapping[str, bytes], version: str = "1.0") -> Path:
    """A wheel with these members; nothing but its name and its zip form matters to mullama."""
    path = folder / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


class FakePip:
    """Stands in for ``run_pip`` of ``sources/pypi.py``: serves the wheels of a folder and counts what was asked."""

    def __init__(self, index: Path, lines: Iterable[str] = ()) -> None:
        self.index = index
        self.lines = list(lines)
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], env: Mapping[str, str], watch: Any) -> int:
        self.commands.append(list(command))
        for line in self.lines:
            watch.line(line)
        name, _, version = command[-1].partition("==")
        wheels = sorted(self.index.glob(f"{name.replace('-', '_')}-{version or '*'}-py3-none-any.whl"))
        if not wheels:
            watch.line(
                f"ERROR: Could not find a version that satisfies the requirement {command[-1]} (from versions: 0.9)"
            )
            watch.line(f"ERROR: No matching distribution found for {command[-1]}")
            return 1
        watch.tick()
        shutil.copy(wheels[-1], Path(command[command.index("--dest") + 1]))
        return 0
