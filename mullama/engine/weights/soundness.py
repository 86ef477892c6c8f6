"""What becomes of the KV cache under other weights: whether it can be carried over, whether there is anything to keep.

Carrying is sound between two quantisations (or fine-tunes) of one model: what the tokens mean, how positions are
turned and the shape of KV must be equal, and ``why_unsound`` says what is not.
"""

from __future__ import annotations

from pathlib import Path

from mullama._core import Model
from mullama.engine.memory import fits
from mullama.engine.weights.comparing import not_comparable
from mullama.errors import InvalidRequest, ModelLoadError, NeedsAnotherEngine
from mullama.models.files.shape import shape_of
from mullama.types import KvMode


def why_unsound(old: Model, new: Model) -> str | None:
    """Why KV computed by ``old`` means something else to ``new``; None: it does not."""
    before, after = old.metadata(), new.metadata()
    arch = before.get("general.architecture", "")
    if after.get("general.architecture", "") != arch:
        return f"its architecture is {after.get('general.architecture')}, not {arch}"
    # Shape, heads, windows, RoPE: all that llama.cpp computes KV by lies under the architecture's name.
    ignored = {f"{arch}.context_length", f"{arch}.vocab_size"}
    for key in sorted((before.keys() | after.keys()) - ignored):
        if key.startswith(f"{arch}.") and before.get(key) != after.get(key):
            return f"{key} is {after.get(key, 'missing')}, not {before.get(key, 'there')}"
    if old.vocab_digest() != new.vocab_digest():
        return "its vocabulary is another one"
    return None


def mode_of(old: Model, new: Model, kv: KvMode, kl: bool) -> KvMode:
    """CARRY or RECOMPUTE. Raises InvalidRequest where what was asked for cannot be, NeedsAnotherEngine."""
    reason = why_unsound(old, new)
    if reason is None:
        return KvMode.CARRY if kv is KvMode.AUTO else kv
    if kv is KvMode.CARRY:
        raise InvalidRequest(f"the KV cache cannot be carried over to {new.path}: {reason}", param="kv")
    if old.n_vocab != new.n_vocab or old.vocab_digest() != new.vocab_digest():
        if kl:
            raise not_comparable(new.path)
        raise NeedsAnotherEngine(f"{new.path} is another model: {reason}", param="to")
    return KvMode.RECOMPUTE


def mode_of_file(old: Model, path: str | Path, kv: KvMode, kl: bool) -> KvMode:
    """``mode_of`` for a file of which nothing but the vocabulary is loaded."""
    newcomer = Model(path, vocab_only=True)
    try:
        return mode_of(old, newcomer, kv, kl)
    finally:
        newcomer.close()


def check_shape(old: Model, path: str | Path, kv: KvMode, kl: bool) -> None:
    """Raise NeedsAnotherEngine for a file of another shape: a context of one would not have the sizes of the other.

    The header tells, so that it is loaded once only, there.
    """
    if not Path(path).is_file():
        raise ModelLoadError(f"{path}: no such file")
    a, b = (shape_of(fits.header_of(one), str(one)) for one in (old.path, path))
    if (a.layers, a.n_vocab) == (b.layers, b.n_vocab):
        return
    if kv is KvMode.CARRY or kl:
        mode_of_file(old, path, kv, kl)  # says what is in the way
    raise NeedsAnotherEngine(f"{path} has another shape", param="to")
