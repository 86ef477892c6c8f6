"""The bodies of embeddings, rerank and score: their fields, and what is wrong with them.

The ``parse_*`` may run in a thread; they raise InvalidRequest with ``param`` naming the field.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mullama.engine.embedding.cutting import Cut
from mullama.errors import InvalidRequest
from mullama.types import ModelInfo, Pooling
from mullama.web.openai.fields import VECTORS, refuse_unbuilt
from mullama.web.openai.schemas import decode_body

MAX_TEXTS = 2048  # of one request, as OpenAI has it
FORMATS = ("float", "base64")

Text = str | list[int]
Texts = str | list[str | int | list[int]]


class VectorBody(msgspec.Struct, kw_only=True):
    """What all of them take."""

    model: str | None = None
    user: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    keep_alive: float | str | None = None


class EmbeddingBody(VectorBody, kw_only=True):
    """``content`` is llama-server's word for ``input``; ``normalize`` is vLLM's for ``embd_normalize``."""

    input: Texts | None = None
    content: Texts | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    add_special_tokens: bool | None = None
    normalize: bool | None = None
    embd_normalize: int | None = None
    pooling: str | None = None


class Document(msgspec.Struct):
    text: str


class RerankBody(VectorBody, kw_only=True):
    """``texts`` and ``return_text`` are text-embeddings-inference's words; it is answered as it answers."""

    query: str | None = None
    documents: list[str | Document] | None = None
    texts: list[str] | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    return_text: bool | None = None
    raw_scores: bool | None = None
    use_activation: bool | None = None


class ScoreBody(VectorBody, kw_only=True):
    """``queries`` and ``documents`` are the newer words for ``text_1`` and ``text_2``."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    use_activation: bool | None = None


_embedding_decoder = msgspec.json.Decoder(EmbeddingBody)
_rerank_decoder = msgspec.json.Decoder(RerankBody)
_score_decoder = msgspec.json.Decoder(ScoreBody)


def parse_embedding(data: bytes) -> EmbeddingBody:
    body = decode_body(_embedding_decoder, data)
    refuse_unbuilt(data, VECTORS)
    if body.encoding_format not in (None, *FORMATS):
        raise InvalidRequest(f"encoding_format: it must be one of {', '.join(FORMATS)}", param="encoding_format")
    if body.embd_normalize not in (None, -1, 2):
        raise InvalidRequest("embd_normalize: it must be 2 (to length 1) or -1 (not at all)", param="embd_normalize")
    return body


def parse_rerank(data: bytes) -> RerankBody:
    body = decode_body(_rerank_decoder, data)
    refuse_unbuilt(data, VECTORS)
    if body.query is None:
        raise InvalidRequest("query: it is missing; it must be a text", param="query")
    if not (body.documents or body.texts):
        raise InvalidRequest("documents: it must be a list with at least one text", param="documents")
    if body.top_n is not None and body.top_n < 1:
        raise InvalidRequest("top_n: it must be at least 1", param="top_n")
    check_number("documents", body.documents or body.texts or [])
    return body


def documents_of(body: RerankBody) -> list[str]:
    return [one.text if isinstance(one, Document) else one for one in body.documents or body.texts or []]


def parse_score(data: bytes) -> ScoreBody:
    body = decode_body(_score_decoder, data)
    refuse_unbuilt(data, VECTORS)
    pairs_of(body)
    return body


def pairs_of(body: ScoreBody) -> tuple[list[str], list[str]]:
    """The two sides, one of each a pair: a single first text goes with all second ones."""
    sides = []
    for names in (("text_1", "queries"), ("text_2", "documents")):
        given = [getattr(body, name) for name in names if getattr(body, name) is not None]
        if len(given) != 1:
            wrong = "it is missing" if not given else f"it and {names[1]} are both there"
            raise InvalidRequest(f"{names[0]}: {wrong}; give a text or a list of texts", param=names[0])
        sides.append([given[0]] if isinstance(given[0], str) else given[0])
        check_number(names[0], sides[-1])
    first, second = sides
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second) or not first:
        raise InvalidRequest(
            f"text_1, text_2: {len(first)} and {len(second)} texts make no pairs; give one first text, or as many as "
            "second ones",
            param="text_2",
        )
    return first, second


def texts_of(body: EmbeddingBody) -> list[Text]:
    """One entry a text. Raises InvalidRequest."""
    texts = body.input if body.input is not None else body.content
    if texts is None:
        raise InvalidRequest("input: it is missing; it must be a text, token ids, or a list of these", param="input")
    if isinstance(texts, str):
        return [texts]
    n_ids = sum(type(one) is int for one in texts)
    if n_ids not in (0, len(texts)):
        raise InvalidRequest("input: the list mixes texts and token ids; give lists of ids", param="input")
    found: list[Text] = [texts] if n_ids else texts  # type: ignore[list-item,assignment]
    check_number("input", found)
    return found


def check_number(field: str, texts: list[Any]) -> None:
    if not 0 < len(texts) <= MAX_TEXTS:
        raise InvalidRequest(f"{field}: it must have 1 to {MAX_TEXTS} texts, got {len(texts)}", param=field)


def cut_of(body: VectorBody, info: ModelInfo) -> Cut:
    """Raises InvalidRequest."""
    if body.truncation_side not in (None, "left", "right"):
        raise InvalidRequest("truncation_side: it must be left or right", param="truncation_side")
    most = body.truncate_prompt_tokens
    if most is None:
        return Cut()
    if most != -1 and not 1 <= most <= info.n_ctx:
        raise InvalidRequest(
            f"truncate_prompt_tokens: it must be -1 (as many as fit), or 1 to {info.n_ctx}, got {most}",
            param="truncate_prompt_tokens",
        )
    return Cut(info.n_ctx if most == -1 else most, keeps_end=body.truncation_side == "left")


def pooling_of(body: EmbeddingBody, *, may_be_none: bool) -> Pooling | None:
    """None: the model's own. Raises InvalidRequest."""
    if body.pooling is None:
        return None
    choices = [one for one in Pooling if one is not Pooling.RANK and (may_be_none or one is not Pooling.NONE)]
    if body.pooling not in choices:
        raise InvalidRequest(f"pooling: it must be one of {', '.join(choices)}", param="pooling")
    return Pooling(body.pooling)


def normalises(body: EmbeddingBody) -> bool:
    return body.normalize is not False and body.embd_normalize != -1


def dimensions_of(asked: int | None, info: ModelInfo) -> int | None:
    """How many numbers of each vector are wanted; None: all. Raises InvalidRequest."""
    if asked is None or asked == info.n_out:
        return None
    if not 1 <= asked <= info.n_out:
        raise InvalidRequest(f"dimensions: it must be 1 to {info.n_out}, got {asked}", param="dimensions")
    if not info.cuts_vectors:
        raise InvalidRequest(
            f"dimensions: '{info.name}' was not trained for vectors that are cut short; leave the field out, or give "
            f"{info.n_out}",
            param="dimensions",
        )
    return asked
