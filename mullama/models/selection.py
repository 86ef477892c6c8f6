"""Which file of several is meant: by quantisation, by name, or by what most people want. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from mullama.errors import ReferenceNotFound
from mullama.models.gguf import SPLIT_NAME

#: Without a wish: the size and quality most people want, then the nearest to it. Others follow by name.
PREFERRED = (
    *("Q4_K_M", "Q8_0", "Q4_K_S", "Q4_0", "Q5_K_M", "Q5_K_S", "Q6_K", "Q4_1", "IQ4_NL", "IQ4_XS", "MXFP4"),
    *("Q5_0", "Q5_1", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "F16", "BF16", "F32"),
)
#: Files that end in .gguf and are no model to be served: a vision projector, an importance matrix.
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
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


def choose(
    files: Iterable[Candidate],
    *,
    where: str,
    quant: str | None = None,
    filename: str | None = None,
    needs_quant: bool = False,
) -> tuple[Candidate, ...]:
    """The files of one model, the parts of a split one in order.

    ``filename`` names one, ``quant`` a quantisation (in any case). Without both it is the first of PREFERRED, or with
    ``needs_quant`` the only one. Raises ReferenceNotFound, which lists what is there.
    """
    candidates = [file for file in files if file.path.lower().endswith(".gguf")]
    if filename is not None:
        wanted = [file for file in candidates if filename in (file.path, PurePosixPath(file.path).name)]
        models = _models(candidates)
        found = [model for model in models if any(file in model.files for file in wanted)]
        return _one(found, models, f"{where} holds {{}} file '{filename}'")
    models = [model for model in _models(candidates) if not _NO_MODEL.search(PurePosixPath(model.name).name)]
    if quant is not None:
        found = [model for model in models if model.quant == _plain(quant)] or [
            model for model in models if _has_token(model.name, quant)
        ]
        return _one(_plainest(found), models, f"{where} holds {{}} model in {quant.upper()}")
    if needs_quant:
        return _one(models, models, f"{where} holds {{}} .gguf model", hint="; choose one with --quant")
    for preferred in PREFERRED:
        found = [model for model in models if model.quant == preferred]
        if found:
            return _one(_plainest(found), models, f"{where} holds {{}} model in {preferred}")
    return _one(models[:1], models, f"{where} holds {{}} .gguf model")


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
