"""``system_fingerprint``: a short name for what an answer was computed with. With another one they may differ."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache

from mullama.installation import VERSION, llama_commit
from mullama.machine.ways import words_of
from mullama.types import ModelInfo


def fingerprint_of(info: ModelInfo) -> str:
    """Of the weights, the build and the ways of computing."""
    kernels = sorted(words_of(info.kernels).items())
    return _short(repr((info.description, info.weights, info.size_bytes, info.n_params, kernels)))


@lru_cache(256)
def _short(words: str) -> str:
    return f"fp_{hashlib.sha256(f'{_build()} {words}'.encode()).hexdigest()[:12]}"


@cache
def _build() -> str:
    return f"{VERSION} {llama_commit()}"
