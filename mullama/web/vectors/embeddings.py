"""``POST /v1/embeddings``, and ``/embedding`` and ``/embeddings`` as llama-server answers them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import falcon.asgi
import numpy as np
import orjson

from mullama.types import ModelKind, Pooling
from mullama.web.http.request import Request
from mullama.web.openapi.answer_types import EmbeddingObjects, VectorsOfText
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access
from mullama.web.services import Services
from mullama.web.vectors.texts import vector_work
from mullama.web.vectors.vector_bodies import (
    EmbeddingBody,
    cut_of,
    dimensions_of,
    normalises,
    parse_embedding,
    pooling_of,
    texts_of,
)

#: Numbers of an answer above which it is written in a text thread: a third of a millisecond.
LARGE_ANSWER = 16_000

Array = np.ndarray[Any, np.dtype[np.float32]]


class Embeddings:
    access = Access.CLIENT

    def __init__(self, services: Services, *, is_openai: bool = True) -> None:
        self._services = services
        self._is_openai = is_openai
        answer = EmbeddingObjects if is_openai else list[VectorsOfText]
        self.operations = {"POST": Operation("Vectors of texts", EmbeddingBody, answer)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Vectors of texts. Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises."""
        services = self._services
        body: EmbeddingBody = await services.parse(req, parse_embedding)
        texts = texts_of(body)
        name = services.models.get(body.model).name
        async with vector_work(services, req, name, ModelKind.EMBED, keep_alive=body.keep_alive) as work:
            info = work.info
            pooling = pooling_of(body, may_be_none=not self._is_openai)
            size = dimensions_of(body.dimensions, info)
            cut = cut_of(body, info)
            prompts = await work.tokens(texts, cut, add_special=body.add_special_tokens is not False)
            is_whole = pooling is Pooling.NONE
            vectors = await work.vectors(prompts, pooling=pooling, normalise=normalises(body) and not is_whole)
            item = partial(
                _item, n_out=info.n_out, size=size, normalise=normalises(body),
                is_base64=body.encoding_format == "base64", is_openai=self._is_openai,
            )  # fmt: skip
            n_tokens = sum(map(len, prompts))
            usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
            tail = orjson.dumps({"object": "list", "model": work.name, "usage": usage})
            around = (b'{"data":[', b"]," + tail[1:]) if self._is_openai else (b"[", b"]")
            is_large = sum(map(len, vectors)) // 4 > LARGE_ANSWER
            resp.data = await work.run(is_large, partial(written, vectors, item, around))


def written(
    vectors: Sequence[bytes], item: Callable[[int, bytes], Any], around: tuple[bytes, bytes],
    between: Callable[[], None],
) -> bytes:  # fmt: skip
    """JSON of one item a vector. PERF: each is written on its own, so that the GIL is free between two."""
    parts = []
    for i, vector in enumerate(vectors):
        between()
        parts.append(orjson.dumps(item(i, vector), option=orjson.OPT_SERIALIZE_NUMPY))
    return around[0] + b",".join(parts) + around[1]


def numbers_of(vector: bytes, size: int | None = None, *, normalise: bool = True) -> Array:
    """A vector, cut to ``size`` numbers, and then made of length 1 again where it is to be."""
    found = np.frombuffer(vector, np.float32)
    if size is None:
        return found
    found = found[:size]
    length = float(np.sqrt(np.dot(found, found)))
    return np.asarray(found / length, np.float32) if normalise and length else found


def _item(
    index: int, vector: bytes, *, n_out: int, size: int | None, normalise: bool, is_base64: bool, is_openai: bool
) -> dict[str, Any]:
    """A vector; as llama-server has it a list of them: one, or with the pooling ``none`` one a token."""
    step = n_out * np.dtype(np.float32).itemsize
    rows: list[Any] = [
        numbers_of(vector[at : at + step], size, normalise=normalise) for at in range(0, len(vector), step)
    ]
    if is_base64:
        rows = [base64.b64encode(row.tobytes()).decode() for row in rows]
    if is_openai:
        return {"object": "embedding", "index": index, "embedding": rows[0]}
    return {"index": index, "embedding": rows}
