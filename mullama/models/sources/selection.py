"""Which file of several is meant: by quantisation, by name, or by what most people want. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from mullama.errors import ReferenceNotFound
from mullama.models.files.gguf import SPLIT_NAME

#: Without a wish: four bits, which most people want, then more of them, then fewer. Within each the best-liked first;
#: ``UD-`` and other makers' mixtures come where their type does, types that are not listed after those that are.
_LIKED = {
    4: (
        *("Q4_K_M", "Q4_K_XL", "Q4_K_L", "Q4_K_S", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_1", "Q4_K", "MXFP4", "MXFP4_MOE"),
        "NVFP4",
    ),
    5: ("Q5_K_M", "Q5_K_XL", "Q5_K_L", "Q5_K_S", "Q5_1", "Q5_0", "Q5_K"),
    6: ("Q6_K", "Q6_K_L", "Q6_K_XL"),
    8: ("Q8_0", "Q8_K_XL"),
    3: ("Q3_K_L", "Q3_K_XL", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q3_K"),
    2: ("Q2_K_L", "Q2_K_XL", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0", "Q2_0"),
}
_FULL = ("F16", "BF16", "F32")
_BITS = tuple(_LIKED)
#: Types of forks of llama.cpp and of its past: it does not read them.
_FOREIGN = re.compile(r"IQ\d_K[A-Z]*|I?Q\d(?:_[A-Z0-9]+)*_R\d+|Q4_0_[48]_[48]|Q6_0|Q8_KV")
#: What ends in .gguf and is never the model: a vision projector, a drafter's head, an adapter, a bare vocabulary, and
#: what starts with a dot (``._x.gguf`` is what macOS leaves beside ``x.gguf``).
_NO_MODEL = re.compile(
    r"(?:^|/)(?:\.|__macosx/)|mmproj[^/]*$"
    r"|(?:^|/)(?:mtp|eagle\d|dflash|dspark|drafts?|drafters?|loras?|adapters?|mmproj)/"
    r"|(?:^|/)(?:mtp|eagle\d|dflash|dspark|lora|(?:ggml-)?vocab)(?:[-_.][^/]*)?$",
    re.IGNORECASE,
)
#: Words that tell such files from a model beside them, but that may be of the model's own name: a model is what lacks
#: them, as long as one does.
_MAYBE_NO_MODEL = re.compile(
    r"(?<![a-z0-9])(?:lora|adapter|draft|drafter|speculator|eagle\d|mtp[-_]head|nextn|vocoder|wavtokenizer|tokenizer)"
    r"(?![a-z0-9])[^/]*$",
    re.IGNORECASE,
)
_DATA_SHARE = 20  # an importance matrix is smaller than the model by this factor at least
_QUANT = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32|FP16|FP32))"
    r"(?![A-Za-z0-9_])",
    re.IGNORECASE,
)
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file of a repository or folder; ``path`` is relative to it, with slashes."""

    path: str
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class _Model:
    """One model among the candidates: a file, or the parts of one in order."""

    name: str  # the path without the ending of a part
    files: tuple[Candidate, ...]
    n_parts: int

    @property
    def quant(self) -> str | None:
        return quant_of(self.name)

    @property
    def size(self) -> int | None:
        """Bytes; None where the listing does not say."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def is_one_bit(self) -> bool:
        return self.quant is not None and bits_of(self.quant) == 1


def quant_of(path: str) -> str | None:
    """The quantisation that a file's name says, in upper case; else its folder's. The last one in the name counts."""
    pure = PurePosixPath(path)
    for text in (re.sub(r"-\d{5}-of-\d{5}$", "", re.sub(r"\.gguf$", "", pure.name, flags=re.I)), pure.parent.name):
        found = _QUANT.findall(text)
        if found:
            return _plain(str(found[-1]))
    return None


def _plain(quant: str) -> str:
    """In upper case; FP16 is another spelling of F16."""
    return re.sub(r"^FP(16|32)$", r"F\1", quant.upper())


def bits_of(quant: str) -> int | None:
    """The bits of a quantised weight, as its type's name says them; None: not quantised, or an unknown name."""
    match = re.match(r"(?:UD-)?(?:I?Q|TQ|MXFP|NVFP)(\d)", quant)
    return int(match[1]) if match else None


def _rank(quant: str | None) -> tuple[int, int, str]:
    """How well a type is liked when nobody asks for one; the least is the best."""
    n_classes = len(_BITS)
    if quant is None:
        return n_classes + 1, 0, ""
    plain = quant.removeprefix("UD-")
    bits = bits_of(quant)
    if _FOREIGN.fullmatch(plain):
        return n_classes + 2, 0, quant
    if bits is None:
        return n_classes, _FULL.index(plain) if plain in _FULL else len(_FULL), quant
    if bits == 1:
        return n_classes + 3, 0, quant
    # Seven bits are nobody's type today; they would be near to eight.
    near = min(_BITS, key=lambda known: (abs(known - bits), -known))
    liked = _LIKED[near]
    return _BITS.index(near), liked.index(plain) if plain in liked else len(liked), quant


def choose(
    files: Iterable[Candidate],
    *,
    where: str,
    quant: str | None = None,
    filename: str | None = None,
    needs_quant: bool = False,
) -> tuple[Candidate, ...]:
    """The files of one model, the parts of a split one in order.

    ``filename`` names one, ``quant`` a quantisation (in any case). Without both it is the best-liked of what is
    quantised, or with ``needs_quant`` the only one; never one of one bit while there are others. Raises
    ReferenceNotFound, which lists what is there.
    """
    candidates = [file for file in files if file.path.lower().endswith(".gguf")]
    if filename is not None:
        wanted = [file for file in candidates if filename in (file.path, PurePosixPath(file.path).name)]
        models = _models(candidates)
        found = [model for model in models if any(file in model.files for file in wanted)]
        return _one(found, models, f"{where} holds {{}} file '{filename}'")
    models = _only_models(_models(candidates))
    if quant is not None:
        found = [model for model in models if model.quant == _plain(quant)] or [
            model for model in models if _has_token(model.name, quant)
        ]
        return _one(_plainest(found), models, f"{where} holds {{}} model in {quant.upper()}")
    if needs_quant or len(models) < 2:
        return _one(models, models, f"{where} holds {{}} .gguf model", hint="; choose one with --quant")
    best = min(models, key=lambda model: _rank(model.quant))
    if _rank(best.quant)[0] >= len(_BITS) and any(model.is_one_bit for model in models):
        return _one([], models, f"{where} holds {{}} model of 2 to 8 bits; choose one with --quant")
    found = [model for model in models if model.quant == best.quant]
    if best.quant is None:  # names tell nothing: the first
        return _one(found[:1], models, f"{where} holds {{}} .gguf model")
    return _one(_plainest(found), models, f"{where} holds {{}} model in {best.quant}")


def _only_models(models: list[_Model]) -> list[_Model]:
    """Without what is no model to be served, as far as names and sizes tell."""
    largest = max((model.size or 0 for model in models), default=0)
    models = [model for model in models if not _NO_MODEL.search(model.name) and not _is_matrix(model, largest)]
    return [model for model in models if not _MAYBE_NO_MODEL.search(model.name)] or models


def _is_matrix(model: _Model, largest: int) -> bool:
    """Whether it is an importance matrix itself, and not a model that was made with one and says so in its name."""
    name = model.name.lower()
    if "imatrix" not in name:
        return False
    if model.quant is None or re.search(r"(?:^|/)imatrix[^/]*$|\.imatrix$", name):
        return True
    return model.size is not None and model.size * _DATA_SHARE < largest


def _has_token(name: str, quant: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(quant.lower())}(?![a-z0-9_])", name.lower()) is not None


def _models(candidates: Sequence[Candidate]) -> list[_Model]:
    """The candidates as models, by name: parts are put together."""
    parts: dict[tuple[str, int], dict[int, Candidate]] = {}
    models = []
    for file in candidates:
        match = SPLIT_NAME.fullmatch(file.path)
        if match:
            parts.setdefault((match["stem"], int(match["count"])), {})[int(match["number"])] = file
        else:
            models.append(_Model(file.path[: -len(".gguf")], (file,), 1))
    for (stem, count), found in parts.items():
        models.append(_Model(stem, tuple(found[number] for number in sorted(found)), count))
    return sorted(models, key=lambda model: model.name)


def _plainest(models: list[_Model]) -> list[_Model]:
    """Of several, the one with the shortest name, a single file before its own parts; all where that does not tell."""
    if len(models) < 2:
        return models
    ranked = sorted(models, key=lambda model: (model.name.count("/"), len(model.name), model.n_parts))
    first, second = ranked[:2]
    if (first.name.count("/"), len(first.name), first.n_parts) == (
        second.name.count("/"), len(second.name), second.n_parts,
    ):  # fmt: skip
        return models
    return ranked[:1]


def _one(found: list[_Model], models: list[_Model], problem: str, *, hint: str = "") -> tuple[Candidate, ...]:
    """The files of the only one. Raises ReferenceNotFound: none, several, or parts are missing."""
    if len(found) != 1:
        there = [model.name + ".gguf" for model in (found or models)]
        more = ", …" if len(there) > _LISTED else ""
        listed = f"; there are {', '.join(there[:_LISTED])}{more}" if there else ""
        raise ReferenceNotFound(problem.format("more than one" if found else "no") + (hint if found else "") + listed)
    (model,) = found
    if len(model.files) != model.n_parts:
        raise ReferenceNotFound(f"of {model.name} there are only {len(model.files)} of {model.n_parts} parts")
    return model.files
