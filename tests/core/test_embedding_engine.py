"""The engine that embeds: requests at once, fairness, cancelling, bounds, its end, what it tells and refuses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_embedder import TEXTS, gguf
from tiny_bert import N_CTX, N_EMBD, TinyBert, cosine

from mullama.config import ServeConfig
from mullama.engine.embedding.embedding_engine import EmbeddingEngine
from mullama.engine.engine import Engine
from mullama.engine.kinds import load_engine
from mullama.engine.memory import fits
from mullama.errors import (
    ComputeFailed,
    ContextLengthExceeded,
    EngineDead,
    InvalidRequest,
    ModelLoadError,
    QueueFull,
    ShuttingDown,
)
from mullama.models.child.probe import probe
from mullama.models.files.estimate import estimate
from mullama.types import EmbeddingRequest, ModelKind, Pooling, Request


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(TinyBert(), tmp_path_factory.mktemp("bert"))


@pytest.fixture
def make(bert_path: Path, tmp_path: Path) -> Iterator[Callable[..., EmbeddingEngine]]:
    made: list[EmbeddingEngine] = []

    def engine(path: Path = bert_path, **options: Any) -> EmbeddingEngine:
        settings = {"threads": 1, "page_dir": str(tmp_path / "pages"), **options}
        made.append(EmbeddingEngine.load(path, name="bert", config=ServeConfig(**settings)))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def asked(engine: EmbeddingEngine, *texts: str, client: str = "", **how: Any) -> EmbeddingRequest:
    return EmbeddingRequest(id=client or "r", prompts=[engine.tokenize(text) for text in texts], client=client, **how)


def numbers(vectors: list[bytes]) -> list[np.ndarray[Any, Any]]:
    return [np.frombuffer(one, np.float32) for one in vectors]


def test_vectors_in_the_order_of_the_texts(make: Callable[..., EmbeddingEngine]) -> None:
    engine, bert = make(), TinyBert()
    found = numbers(engine.embed_sync(asked(engine, *TEXTS)))
    for text, vector in zip(TEXTS, found, strict=True):
        assert cosine(vector, bert.embed(engine.tokenize(text))) > 0.9999
    assert (engine.info.kind, engine.info.pooling, engine.info.n_out) == (ModelKind.EMBED, Pooling.MEAN, N_EMBD)
    assert engine.info.n_ctx == N_CTX and engine.is_ready()


def test_many_clients_at_once_get_their_own(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make(batch_size=32)
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(TEXTS, n)) for n in (1, 2, 3, 1, 2) * 6]
    alone = numbers(engine.embed_sync(asked(engine, *texts)))

    async def all_of_them() -> list[list[bytes]]:
        calls = [engine.embed(asked(engine, text, client=str(i % 4))) for i, text in enumerate(texts)]
        return await asyncio.gather(*calls)

    for one, (other,) in zip(alone, asyncio.run(all_of_them()), strict=True):
        assert cosine(one, np.frombuffer(other, np.float32)) > 0.99999


def test_whoever_leaves_gives_the_rest_up(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make(batch_size=128)

    async def leave() -> None:
        long = asyncio.ensure_future(engine.embed(asked(engine, *TEXTS * 400)))
        await asyncio.sleep(0.01)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert len(await engine.embed(asked(engine, "sky"))) == 1

    asyncio.run(leave())
    engine.embed_sync(asked(engine, "sky"))
    found = engine.counters()
    assert found["cancelled"] > 0 and found["opened"] == found["cancelled"] + found["finished_stop"]
    assert found["waiting"] == 0 and not engine._open


def test_a_short_request_overtakes_a_long_one(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make(batch_size=128)
    order: list[str] = []

    async def ask(name: str, *texts: str) -> None:
        await engine.embed(asked(engine, *texts, client=name))
        order.append(name)

    async def both() -> None:
        long = asyncio.ensure_future(ask("long", *TEXTS * 200))
        await asyncio.sleep(0)
        await asyncio.gather(long, ask("short", "sky"))

    asyncio.run(both())
    assert order == ["short", "long"]


def test_a_full_queue_is_said(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make(max_queue=2)
    hold = threading.Event()
    engine._commands.post_quietly(lambda: hold.wait(10) and None)

    async def fill() -> None:
        calls = [asyncio.ensure_future(engine.embed(asked(engine, "sky"))) for _ in range(4)]
        await asyncio.sleep(0.01)
        hold.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in found] == [list, list, list, QueueFull]

    asyncio.run(fill())


@pytest.mark.parametrize(
    ("prompts", "how", "error", "words"),
    [
        ([], {}, InvalidRequest, "at least one text"),
        ([[5], []], {}, InvalidRequest, r"input\[1\]: it holds no token"),
        ([[5], [5] * (N_CTX + 1)], {}, ContextLengthExceeded, rf"input\[1\]: the text has {N_CTX + 1} tokens"),
        ([[10**6]], {}, InvalidRequest, "outside the vocabulary"),
        ([[-1]], {}, InvalidRequest, "outside the vocabulary"),
        ([[5]], {"pooling": Pooling.RANK}, InvalidRequest, "has no head that ranks"),
    ],
)
def test_what_is_refused(
    make: Callable[..., EmbeddingEngine], prompts: Any, how: Any, error: type[Exception], words: str
) -> None:
    engine = make()
    with pytest.raises(error, match=words):
        engine.embed_sync(EmbeddingRequest(id="r", prompts=prompts, **how))
    assert len(engine.embed_sync(asked(engine, "sky"))) == 1


def test_a_vector_without_finite_numbers_ends_its_request_alone(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make()

    async def both() -> list[Any]:
        engine._core.inject_nan(0)
        calls = [engine.embed(asked(engine, name, "sky", client=name)) for name in ("red", "blue")]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(both())
    assert sorted(type(one).__name__ for one in found) == ["ComputeFailed", "list"]
    assert isinstance(next(one for one in found if not isinstance(one, list)), ComputeFailed)


def test_text_that_is_generated_is_for_other_engines(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make()
    for call in (
        lambda: engine.submit_sync(Request(id="r", prompt=[5])),
        lambda: engine.submit(Request(id="r", prompt=[5])),
        lambda: engine.render_chat(b"[]"),
        lambda: engine.prepare(Request(id="r", prompt=[5]).sampling),
    ):
        with pytest.raises(InvalidRequest, match="'bert' generates no text: it is for /v1/embeddings") as error:
            call()
        assert error.value.param == "model"


def test_what_others_have_and_it_has_not(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make()
    for refused in (engine.kv.asnapshot(), engine.kv.atree(limit=3), engine.planning.aset_policy("fcfs"),
                    engine.planning.aconfigure({}), engine.planning.aset_shadow(None)):  # fmt: skip
        with pytest.raises(InvalidRequest, match="'bert'"):
            asyncio.run(refused)
    for call in (engine.weights.sleep, lambda: engine.weights.load_lora("x"), lambda: engine.weights.unload_lora("x")):
        with pytest.raises(InvalidRequest, match="'bert' makes vectors of texts"):
            call()
    assert engine.weights.loras() == [] and engine.kv.events.last_seq == 0
    assert engine.planning.snapshot()["waiting"] == [] and engine.planning.share()[1]["turns"] > 0
    engine.planning.set_share(weight=2.0, priority=1)
    assert engine.planning.share()[1]["weight"] == 2.0


def test_the_memory_report_adds_up(make: Callable[..., EmbeddingEngine], bert_path: Path) -> None:
    engine = make()
    found = engine.memory_report_sync()
    assert asyncio.run(engine.memory_report()).keys() == found.keys()
    assert found["kv"]["allocated_bytes"] == 0 and found["weights"]["allocated_bytes"] > 0
    assert found["output"]["allocated_bytes"] == 512 * N_EMBD * 4
    expected = estimate(bert_path, n_ctx=N_CTX)
    allocated = engine.memory()
    assert sum(allocated["compute"].values()) <= expected.compute * 1.05
    assert expected.compute <= sum(allocated["compute"].values()) * 2 + (1 << 20)
    assert abs(expected.weights - sum(allocated["weights"].values())) < 1 << 16
    assert expected.kv == {} and fits.embedding_ctx(bert_path, ServeConfig(), "m") == N_CTX


def test_draining_and_closing(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make(batch_size=128)

    async def drain() -> None:
        short = asyncio.ensure_future(engine.embed(asked(engine, "sky")))
        await asyncio.sleep(0)
        assert await engine.drain(10)
        assert len(await short) == 1
        with pytest.raises(ShuttingDown):
            await engine.embed(asked(engine, "sky"))

    asyncio.run(drain())
    assert not engine.is_ready()
    other = make(batch_size=128)

    async def cut() -> None:
        long = asyncio.ensure_future(other.embed(asked(other, *TEXTS * 400)))
        await asyncio.sleep(0.01)
        assert not await other.drain(0)
        with pytest.raises(ShuttingDown):
            await long

    asyncio.run(cut())
    other.close()
    other.close()
    with pytest.raises(ShuttingDown, match="was closed"):
        other.tokenize("sky")


def test_closing_in_the_middle_of_a_ubatch(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make(batch_size=4096)
    request = asked(engine, *TEXTS * 400)
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            engine.embed_sync(request)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while engine.counters()["running"] == 0 and thread.is_alive():
        pass
    engine.close()
    thread.join(10)
    assert [type(one) for one in ended] == [ShuttingDown]


def test_an_engine_thread_that_stops_tells_everybody(make: Callable[..., EmbeddingEngine]) -> None:
    engine = make()

    def fail() -> None:
        raise RuntimeError("boom")

    engine._commands.post_quietly(fail)
    with pytest.raises(EngineDead):
        for _ in range(500):
            engine.embed_sync(asked(engine, "sky"))
    assert engine.death == "RuntimeError: boom" and not engine.is_ready()


def test_pairs_for_a_head(tmp_path: Path, make: Callable[..., EmbeddingEngine]) -> None:
    bert = TinyBert(ranks=True)
    engine = make(gguf(bert, tmp_path))
    assert engine.info.kind is ModelKind.RANK and engine.info.n_out == 1
    pair = engine.pair_tokens("the sky", "blue fish")
    assert pair == [*engine.tokenize("the sky"), *engine.tokenize("blue fish")[1:]]
    (score,) = numbers(engine.embed_sync(EmbeddingRequest(id="r", prompts=[pair])))
    assert abs(float(score[0]) - bert.rank(pair)) < 0.02
    cut = engine.pair_tokens("the sky", "blue fish " * 100, most=12)
    assert len(cut) == 12 and cut[-1] == pair[-1] and cut[:4] == pair[:4]
    with pytest.raises(InvalidRequest, match="ranks pairs of texts"):
        engine.embed_sync(asked(engine, "sky", pooling=Pooling.MEAN))


def test_the_kind_of_engine_is_the_files(bert_path: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    config = ServeConfig(threads=1, ctx_size=512, page_dir=str(tmp_path))
    for path, kind in ((bert_path, EmbeddingEngine), (tiny_model(), Engine)):
        with load_engine(path, name="m", config=config) as engine:
            assert type(engine) is kind
    with pytest.raises(ModelLoadError, match="was not made to embed"):
        EmbeddingEngine.load(tiny_model(), config=config)


def test_the_child_that_looks_first_embeds(bert_path: Path) -> None:
    found = probe(bert_path)
    assert found.ok and found.finite and found.template == "none"
