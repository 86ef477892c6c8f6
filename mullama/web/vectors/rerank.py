"""``POST /rerank``, ``/v1/rerank`` (Jina's, llama-server's and vLLM's) and ``/v2/rerank`` (Cohere's)."""

from __future__ import annotations

from typing import Any

import falcon.asgi
import orjson

from mullama.types import ModelKind
from mullama.web.http.request import Request
from mullama.web.openai.opening import new_id
from mullama.web.openapi.answer_types import Reranked
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access
from mullama.web.services import Services
from mullama.web.vectors.scores import score
from mullama.web.vectors.texts import vector_work
from mullama.web.vectors.vector_bodies import RerankBody, cut_of, documents_of, parse_rerank


class Rerank:
    """``shows_documents``: whether they are in the answer where the request does not say."""

    access = Access.CLIENT
    operations = {
        "POST": Operation("Documents by how well they answer a query", RerankBody, Reranked | list[dict[str, Any]])
    }

    def __init__(self, services: Services, *, shows_documents: bool = True) -> None:
        self._services = services
        self._shows_documents = shows_documents

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Documents by how well they answer a query. Raises InvalidRequest, ModelNotFound, PayloadTooLarge, and what
        the engine raises."""
        services = self._services
        body: RerankBody = await services.parse(req, parse_rerank)
        documents = documents_of(body)
        name = services.models.get(body.model).name
        kinds = (ModelKind.EMBED, ModelKind.RANK)
        async with vector_work(services, req, name, *kinds, keep_alive=body.keep_alive) as work:
            cut = cut_of(body, work.info)
            queries = [body.query or ""] * len(documents)
            raw = body.use_activation is False or bool(body.raw_scores)
            scores, n_tokens = await score(work, queries, documents, cut, raw=raw)
            best = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
            resp.data = orjson.dumps(self._answer(body, documents, scores, best, work.name, n_tokens))

    def _answer(
        self, body: RerankBody, documents: list[str], scores: list[float], best: list[int], model: str, n_tokens: int
    ) -> Any:
        if body.documents is None:  # text-embeddings-inference's words
            return [
                {"index": i, "score": scores[i], **({"text": documents[i]} if body.return_text else {})} for i in best
            ]
        shows = self._shows_documents if body.return_documents is None else body.return_documents
        return {
            "id": new_id("rerank"),
            "object": "list",
            "model": model,
            "results": [
                {
                    "index": i,
                    "relevance_score": scores[i],
                    **({"document": {"text": documents[i]}} if shows else {}),
                }
                for i in best
            ],
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        }
