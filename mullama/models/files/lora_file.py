"""LoRA adapter files: what must hold before one is loaded onto a model, and what tells it from others.

    check_adapter(path, base)    # the one call before: returns the file's facts, or raises with the reason

llama.cpp trusts an adapter in much: it takes metadata of any type for what it expects, and shapes it does not look at
meet only in a decode. Here the header is compared with the model's first, then a throw-away process loads both and
decodes a token, as for every new model file (``probe.py``).
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mullama.errors import AdapterMismatch, BadModelFile, ModelLoadError
from mullama.models.child.probe import Verdicts, probe
from mullama.models.files import gguf
from mullama.models.files.gguf import Header, Tensor
from mullama.models.store.digests import digest_of

log = logging.getLogger(__name__)

A, B = ".lora_a", ".lora_b"
#: Types that every backend multiplies with; converters write the first three.
TYPES = ("F32", "F16", "BF16", "Q8_0")
MAX_RANK = 4096


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What is known of a checked file."""

    digest: str  # its sha256
    rank: int  # the largest of its pairs
    n_matrices: int
    alpha: float
    name: str  # what the file calls itself; may be empty


def check_adapter(path: str | Path, base: str | Path, *, root: Path | None = None) -> AdapterFacts:
    """Make sure that a file may be loaded onto the model whose file is ``base``. ``root`` is the store's folder.

    Blocks: a file that is new for this model costs a child process. Raises AdapterMismatch (a sound adapter of another
    model) or BadModelFile, which name the file and the reason.
    """
    path = Path(path)
    label = str(path)
    try:
        header = gguf.check(path)
        facts = compare(header, gguf.check(base), label, digest_of(path, root=root))
        _probe(path, Path(base), facts.digest, root)
    except BadModelFile:
        raise
    except ModelLoadError as error:
        raise BadModelFile(error.message, param="path") from None
    return facts


def compare(header: Header, base: Header, label: str, digest: str = "") -> AdapterFacts:
    """The facts of an adapter whose header fits a model's. Raises AdapterMismatch, BadModelFile."""
    _check_kind(header, label)
    arch, wanted = header.get("general.architecture"), base.get("general.architecture")
    if arch != wanted:
        raise AdapterMismatch(f"{label}: it is for the architecture {_text(arch)}, the model's is {_text(wanted)}")
    alpha = header.get("adapter.lora.alpha", 0.0)
    if type(alpha) is not float or not math.isfinite(alpha):
        raise BadModelFile(f"{label}: adapter.lora.alpha is {_text(alpha)}; it must be a finite number", param="path")
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise BadModelFile(
            f"{label}: it is an activated LoRA, which works from certain tokens on; only plain LoRA is supported",
            param="path",
        )
    known = {tensor.name: tensor for tensor in base.tensors}
    pairs = _pairs(header, label)
    ranks = [_check_pair(name, a, b, known.get(name), label) for name, (a, b) in pairs.items()]
    name = header.get("general.name")
    return AdapterFacts(digest, max(ranks), len(ranks), alpha, name[:200] if isinstance(name, str) else "")


def _check_kind(header: Header, label: str) -> None:
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        found = header.get(key)
        if found != wanted:
            what = "missing" if found is None else _text(found)
            raise BadModelFile(f"{label}: it is no LoRA adapter: {key} is {what}, not '{wanted}'", param="path")


def _pairs(header: Header, label: str) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_a and lora_b by the name of the model's tensor. What else llama.cpp passes over (norms) is left out."""
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in header.tensors:
        name, ending = tensor.name[: -len(A)], tensor.name[-len(A) :]
        if ending in (A, B):
            halves.setdefault(name, {})[ending] = tensor
        elif not tensor.name.endswith("_norm.weight"):
            raise BadModelFile(f"{label}: the tensor {_text(tensor.name)} is not part of a LoRA adapter", param="path")
    for name, found in halves.items():
        if len(found) != 2:
            missing = B if A in found else A
            raise BadModelFile(f"{label}: the tensor {_text(name + missing)} is missing", param="path")
    if not halves:
        raise BadModelFile(f"{label}: it holds no LoRA tensors", param="path")
    return {name: (found[A], found[B]) for name, found in halves.items()}


def _check_pair(name: str, a: Tensor, b: Tensor, base: Tensor | None, label: str) -> int:
    """The rank of a pair whose shapes fit the model's tensor."""
    if base is None:
        raise AdapterMismatch(f"{label}: it changes the tensor {_text(name)}, which the model does not have")
    for tensor in (a, b):
        if tensor.type not in TYPES:
            raise BadModelFile(
                f"{label}: the tensor {_text(tensor.name)} is of type {tensor.type}; it must be one of "
                f"{', '.join(TYPES)}",
                param="path",
            )
    a_in, a_out, *a_rest = (*a.shape, 1, 1)[:4]
    b_in, b_out, *b_rest = (*b.shape, 1, 1)[:4]
    n_in, n_out, *rest = (*base.shape, 1, 1)[:4]
    # A token's embedding is looked up and not multiplied with: there both lie the other way round.
    is_embedding = name.endswith("token_embd.weight")
    if is_embedding:
        fits = (b_out, a_out) == (n_in, n_out) and a_in == b_in
        rank = a_in
    else:
        fits = (a_in, b_out) == (n_in, n_out) and a_out == b_in
        rank = a_out
    if len(base.shape) < 2 or not fits or _padded(a_rest) != _padded(rest) or _padded(b_rest) != _padded(rest):
        raise AdapterMismatch(
            f"{label}: the tensors of {_text(name)} have the shapes {a.shape} and {b.shape}, which do not fit the "
            f"model's {base.shape}"
        )
    if not 1 <= rank <= MAX_RANK:
        raise BadModelFile(f"{label}: {_text(name)} has the rank {rank}; it must be 1 to {MAX_RANK}", param="path")
    return rank


def _padded(dims: list[int]) -> tuple[int, int]:
    first, second, *_ = (*dims, 1, 1)
    return first, second


def _text(value: Any) -> str:
    """A value of the file for one line of a message."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in str(value)[:80])
    return f"'{shown}'"


def _probe(path: Path, base: Path, digest: str, root: Path | None) -> None:
    """Load both in a child, unless it is remembered how that went. Raises BadModelFile."""
    parts = [part.stat() for part in gguf.part_paths(base)]
    told = [digest, *(f"{part.st_dev} {part.st_ino} {part.st_size} {part.st_mtime_ns}" for part in parts)]
    key = hashlib.sha256("\n".join(told).encode()).hexdigest()
    found = Verdicts(root).of(path, key, lambda: probe(base, adapter=path), said=f"{path} on {base}")
    if not found.ok:
        reason = found.reason if found.reason.startswith(str(path)) else f"{path}: {found.reason}"
        raise BadModelFile(reason, param="path")
    if found.finite is False:
        raise BadModelFile(f"{path}: with it the model computes no finite numbers", param="path")
