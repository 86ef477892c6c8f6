"""What a model file is for, by its header: generating text, vectors of texts, or ranking pairs of texts."""

from __future__ import annotations

import re

from mullama.models.files.gguf import Header
from mullama.types import ModelKind, Pooling

#: Architectures that read a text in both directions at once, and so cannot go on with it.
_ENCODERS = frozenset(
    {"bert", "eurobert", "gemma-embedding", "gemma-embedding2", "jina-bert-v2", "jina-bert-v3", "modern-bert",
     "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder"}
)  # fmt: skip
#: llama.cpp's numbers (enum llama_pooling_type).
_POOLING = {1: Pooling.MEAN, 2: Pooling.CLS, 3: Pooling.LAST, 4: Pooling.RANK}
#: Models that were trained so that the beginning of a vector is one itself; no key of a file says so.
_MATRYOSHKA = re.compile(
    r"nomic-embed-text-v(1\.5|2)|qwen3-embedding|embeddinggemma|jina-embeddings-v[345]|mxbai-embed-(large|xsmall)"
    r"|arctic-embed-(m-v1\.5|[ml]-v2)|text-embedding-3"
)


def kind_of(header: Header) -> ModelKind:
    pooling = pooling_of(header)
    if pooling is None:
        return ModelKind.GENERATE
    return ModelKind.RANK if pooling is Pooling.RANK else ModelKind.EMBED


def pooling_of(header: Header) -> Pooling | None:
    """How the vectors of tokens become the text's; None: the model generates.

    An encoder whose file does not say takes the mean, as sentence-transformers does.
    """
    number = header.get("{arch}.pooling_type")
    if isinstance(number, int) and number in _POOLING:
        return _POOLING[number]
    return Pooling.MEAN if header.get("general.architecture") in _ENCODERS else None


def cuts_vectors(header: Header) -> bool:
    """Whether the model was trained for vectors that are cut short (Matryoshka), as far as its name tells."""
    names = (header.get("general.name"), header.get("general.basename"))
    text = " ".join(name for name in names if isinstance(name, str)).lower()
    return _MATRYOSHKA.search(re.sub(r"[\s_]+", "-", text)) is not None
