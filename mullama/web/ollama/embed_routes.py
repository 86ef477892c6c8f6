"""``POST /api/embed`` and the older ``/api/embeddings``."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import falcon.asgi
import msgspec
import orjson

from mullama.engine.embedding.cutting import Cut
from mullama.types import ModelKind
from mullama.web.http.request import Request
from mullama.web.ollama.answers import OllamaRoute
from mullama.web.ollama.ollama_bodies import served_name
from mullama.web.openai.schemas import decode_body
from mullama.web.openapi.answer_types import OllamaVector, OllamaVectors
from mullama.web.openapi.operation import Operation
from mullama.web.services import Services
from mullama.web.vectors.embeddings import LARGE_ANSWER, numbers_of, written
from mullama.web.vectors.texts import vector_work
from mullama.web.vectors.vector_bodies import check_number, dimensions_of


class EmbedBody(msgspec.Struct, kw_only=True):
    """``prompt`` is the older spelling of ``input``, for one text. ``options`` say how a model is loaded there."""

    model: str | None = None
    input: str | list[str] | None = None
    prompt: str | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: float | str | None = None


_decoder = msgspec.json.Decoder(EmbedBody)


class Embed(OllamaRoute):
    """``is_old``: one text, and its vector as the model gives it."""

    def __init__(self, services: Services, *, is_old: bool = False) -> None:
        super().__init__(services)
        self._is_old = is_old
        answer = OllamaVector if is_old else OllamaVectors
        self.operations = {"POST": Operation("Vectors of texts", EmbedBody, answer)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Vectors of texts; what is too long is cut unless ``truncate`` says no. Without a text the model is loaded.

        Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what the engine raises.
        """
        services = self._services
        body: EmbedBody = await services.parse(req, partial(decode_body, _decoder))
        given: Any = body.prompt if self._is_old else body.input
        texts = given if isinstance(given, list) else [given] if given else []
        if texts:
            check_number("input", texts)
        name = services.models.get(served_name(body.model, services.models)).name
        async with vector_work(services, req, name, ModelKind.EMBED, keep_alive=body.keep_alive) as work:
            load_ns = time.monotonic_ns() - req.arrival_ns
            size = dimensions_of(body.dimensions, work.info)
            cut = Cut() if body.truncate is False else Cut(work.info.n_ctx)
            prompts = await work.tokens(texts, cut)
            vectors = await work.vectors(prompts, normalise=not self._is_old) if prompts else []

            def item(index: int, vector: bytes) -> Any:
                return numbers_of(vector, size)

            rest = {
                "model": body.model,
                "total_duration": time.monotonic_ns() - req.arrival_ns,
                "load_duration": load_ns,
                "prompt_eval_count": sum(map(len, prompts)),
            }
            around = (b'{"embeddings":[', b"]," + orjson.dumps(rest)[1:])
            if self._is_old:
                around = (b'{"embedding":' if vectors else b'{"embedding":[', b"}" if vectors else b"]}")
            is_large = sum(map(len, vectors)) // 4 > LARGE_ANSWER
            resp.data = await work.run(is_large, partial(written, vectors, item, around))
