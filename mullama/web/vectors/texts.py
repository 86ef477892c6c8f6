"""From the texts of a request to their vectors: the model, tokens, the engine, a client that leaves."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TypeVar, cast

from mullama.engine.client import EmbeddingClient
from mullama.engine.embedding.cutting import Cut
from mullama.errors import ContextLengthExceeded, InvalidRequest
from mullama.serving.durations import parse_duration
from mullama.serving.states import Lease
from mullama.types import EmbeddingRequest, ModelInfo, ModelKind, Pooling
from mullama.web.http.request import PERMIT, Request, unless_left
from mullama.web.keys.rate_limits import Permit
from mullama.web.openai.opening import new_id
from mullama.web.services import LARGE_TEXT, Services
from mullama.web.vectors.vector_bodies import Text

T = TypeVar("T")


class VectorWork:
    """One request on a model that embeds or ranks. Made by ``vector_work``."""

    def __init__(self, services: Services, req: Request, lease: Lease) -> None:
        self._req = req
        self._services = services
        self.name = lease.name
        self.engine = cast(EmbeddingClient, lease.engine)

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    async def run(self, is_large: bool, work: Callable[[Callable[[], None]], T]) -> T:
        """``work`` here, or in a text thread where it is large; it is given what to call between two pieces of it."""
        errand = self._services.errand(self._req)
        return await errand.run(is_large, partial(work, errand.checkpoint if is_large else _nothing))

    async def tokens(
        self, texts: Sequence[Text], cut: Cut, *, field: str = "input", add_special: bool = True
    ) -> list[list[int]]:
        """The tokens of each text. Raises ContextLengthExceeded with the number of the text, InvalidRequest."""
        engine = self.engine

        def work(between: Callable[[], None]) -> list[list[int]]:
            found = []
            head, tail = engine.affixes()
            for i, text in enumerate(texts):
                between()
                if isinstance(text, str):
                    tokens = _named(engine, text, f"{field}[{i}]", cut, add_special)
                else:
                    tokens = text
                found.append(cut.of(tokens, head, tail))
            return found

        size = sum(len(text) if isinstance(text, str) else 0 for text in texts)
        return await self.run(size > LARGE_TEXT, work)

    async def pairs(self, first: Sequence[str], second: Sequence[str], cut: Cut) -> list[list[int]]:
        """Pairs of texts as prompts of a model that ranks. Raises InvalidRequest."""
        engine = self.engine

        def work(between: Callable[[], None]) -> list[list[int]]:
            found = []
            for one, other in zip(first, second, strict=True):
                between()
                found.append(engine.pair_tokens(one, other, cut.most))
            return found

        return await self.run(sum(map(len, (*first, *second))) > LARGE_TEXT, work)

    async def vectors(
        self, prompts: Sequence[Sequence[int]], *, pooling: Pooling | None = None, normalise: bool = True
    ) -> list[bytes]:
        """The vectors, as the bytes of 32-bit floats; the work ends when the client leaves.

        Raises what EmbeddingClient.embed raises, ClientLeft, and RateLimited for a key without so many tokens.
        """
        req = self._req
        address = req.scope.get("client") or ("",)
        request = EmbeddingRequest(
            id=new_id("embd"),
            prompts=prompts,
            pooling=pooling,
            normalise=normalise,
            tenant=req.tenant,
            client=req.tenant or str(address[0]),
            arrival_ns=req.arrival_ns,
        )
        n_tokens = sum(map(len, prompts))
        permit: Permit | None = req.scope.get(PERMIT)
        reservation = None if permit is None else permit.reserve(n_tokens, 0)
        used = 0
        try:
            found = await unless_left(req.receive, self.engine.embed(request), "the client left before it was answered")
            used = n_tokens
            return found
        finally:
            if reservation is not None:
                reservation.settle(used)


@contextlib.asynccontextmanager
async def vector_work(
    services: Services, req: Request, model: str, *kinds: ModelKind, keep_alive: float | str | None = None
) -> AsyncIterator[VectorWork]:
    """The model, loaded if need be, which must be of one of these kinds. Raises what ``Services.lease`` raises,
    InvalidRequest."""
    seconds = None if keep_alive is None else parse_duration(keep_alive)
    with await services.lease(req, model) as lease:
        kind = lease.engine.info.kind
        if kind not in kinds:
            raise InvalidRequest(f"'{lease.name}' {_INSTEAD[kind]}", param="model")
        services.keep_alive(lease.name, seconds)
        yield VectorWork(services, req, lease)


_INSTEAD = {
    ModelKind.GENERATE: "generates text and was not made for embeddings; name an embedding model, such as minilm",
    ModelKind.RANK: "ranks pairs of texts and makes no vectors; it is for /v1/rerank and /v1/score",
    ModelKind.EMBED: "makes vectors of texts; it is for /v1/embeddings",
}


def _named(engine: EmbeddingClient, text: str, field: str, cut: Cut, add_special: bool) -> list[int]:
    most = None if cut.most is not None else engine.info.n_ctx
    try:
        return engine.prompt_tokens(text, add_special=add_special, most=most)
    except ContextLengthExceeded as error:
        raise ContextLengthExceeded(
            error.message.replace("input", field, 1), param=field, n_tokens=error.n_tokens
        ) from None
    except InvalidRequest as error:
        raise InvalidRequest(f"{field}: {error.message}", param=field) from None


def _nothing() -> None:
    pass
