"""Weights that are loaded already: a file under two names lies in memory once.

A Model never changes, so that any number of engines may compute with its weights; each has a Model of its own, and the
weights go with the last of them. Loaded again is what is to lie elsewhere or has changed on disk.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from mullama.config import ServeConfig
from mullama.errors import ModelLoadError
from mullama.models.files import gguf

if TYPE_CHECKING:
    from mullama._core import Model

Key = tuple[object, ...]

_loaded: dict[Key, weakref.WeakSet[Model]] = {}


def key_of(path: str | Path, config: ServeConfig) -> Key | None:
    """What tells loaded weights from others: the files, and all that decides where and how they lie in memory."""
    files = []
    for part in gguf.part_paths(path):
        try:
            found = part.stat()
        except OSError:
            return None
        files.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    place = (config.gpu_layers, tuple(config.device), config.split_mode, config.tensor_split, config.mmap)
    return (*files, *place, config.deterministic, config.kernels)  # the last two: in which layout they are


def note(key: Key | None, model: Model) -> None:
    """These weights have been loaded."""
    for old in [old for old, models in _loaded.items() if not any(model.is_open for model in models)]:
        _loaded.pop(old, None)
    if key is not None:
        _loaded.setdefault(key, weakref.WeakSet()).add(model)


def find(key: Key | None, *, chat_template: str = "") -> Model | None:
    """Another Model on weights that are loaded; None: they are not. Raises ModelLoadError for a broken template."""
    for model in list(_loaded.get(key, ())) if key is not None else ():
        try:
            twin = model.twin(chat_template=chat_template)
        except ModelLoadError:
            if model.is_open:
                raise
            continue
        note(key, twin)
        return twin
    return None


def is_loaded(path: str | Path, config: ServeConfig) -> bool:
    """Whether loading this file costs no memory for its weights."""
    key = key_of(path, config)
    return key is not None and any(model.is_open for model in list(_loaded.get(key, ())))
