"""``POST /v1/score``, and what it shares with reranking: what a model says of pairs of texts.

A model with a head that ranks says it itself, through a sigmoid where it says one number, as vLLM has it. For one that
embeds it is the cosine of the two vectors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import falcon.asgi
import numpy as np
import orjson

from mullama.engine.embedding.cutting import Cut
from mullama.types import ModelKind
from mullama.web.http.request import Request
from mullama.web.openai.opening import new_id
from mullama.web.openapi.answer_types import ScoreObjects
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access
from mullama.web.services import Services
from mullama.web.vectors.texts import VectorWork, vector_work
from mullama.web.vectors.vector_bodies import ScoreBody, cut_of, pairs_of, parse_score


class Scores:
    access = Access.CLIENT
    operations = {"POST": Operation("How near pairs of texts are", ScoreBody, ScoreObjects)}

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """A number for each pair. Raises InvalidRequest, ModelNotFound, PayloadTooLarge, what the engine raises."""
        services = self._services
        body: ScoreBody = await services.parse(req, parse_score)
        first, second = pairs_of(body)
        name = services.models.get(body.model).name
        kinds = (ModelKind.EMBED, ModelKind.RANK)
        async with vector_work(services, req, name, *kinds, keep_alive=body.keep_alive) as work:
            cut = cut_of(body, work.info)
            scores, n_tokens = await score(work, first, second, cut, raw=body.use_activation is False)
            resp.data = orjson.dumps(
                {
                    "id": new_id("score"),
                    "object": "list",
                    "created": int(time.time()),
                    "model": work.name,
                    "data": [{"index": i, "object": "score", "score": one} for i, one in enumerate(scores)],
                    "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
                }
            )


async def score(
    work: VectorWork, first: Sequence[str], second: Sequence[str], cut: Cut, *, raw: bool
) -> tuple[list[float], int]:
    """A number for each pair, and the tokens that were computed. ``raw``: what the head says, without a sigmoid."""
    if work.info.kind is ModelKind.RANK:
        prompts = await work.pairs(first, second, cut)
        heads = [np.frombuffer(one, np.float32) for one in await work.vectors(prompts)]
        is_one = not raw and work.info.n_out == 1
        return [_sigmoid(float(one[0])) if is_one else float(one[0]) for one in heads], sum(map(len, prompts))
    texts = list(dict.fromkeys((*first, *second)))  # each once
    prompts = await work.tokens(texts, cut, field="texts")
    found = await work.vectors(prompts)
    vectors = {text: np.frombuffer(one, np.float32) for text, one in zip(texts, found, strict=True)}
    cosines = [float(np.dot(vectors[one], vectors[other])) for one, other in zip(first, second, strict=True)]
    return cosines, sum(map(len, prompts))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
