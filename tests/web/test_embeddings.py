"""Embeddings, rerank and score against a fake engine: shapes of answers, fields, errors, a client that leaves."""

from __future__ import annotations

import asyncio
import base64
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mullama.config import ServeConfig
from mullama.engine.embedding import cutting
from mullama.engine.embedding.cutting import Cut
from mullama.errors import ComputeFailed, QueueFull
from mullama.serving.manager import ModelManager
from mullama.types import ModelKind, Pooling
from mullama.web.app import create_app
from mullama.web.openai.fields import _OF_VECTORS
from mullama.web.services import Services

from .conftest import Client, Live
from .fake_embedder import N_OUT, SEP, FakeEmbedder
from .fake_engine import BOS, FakeEngine


@pytest.fixture
def vectors() -> FakeEmbedder:
    return FakeEmbedder()


@pytest.fixture
def ranks() -> FakeEmbedder:
    return FakeEmbedder("ranks", kind=ModelKind.RANK, n_out=1)


@pytest.fixture
def services(vectors: FakeEmbedder, ranks: FakeEmbedder, config: ServeConfig) -> Iterator[Services]:
    models = [("vectors", vectors), ("ranks", ranks), ("fake", FakeEngine())]
    services = Services(config, ModelManager(models))
    yield services
    services.close()


@pytest.fixture
def client(config: ServeConfig, services: Services) -> Client:
    return Client(create_app(config, services.models, services), services)


def test_one_text(client: Client, vectors: FakeEmbedder) -> None:
    answer = client.post("/v1/embeddings", {"model": "vectors", "input": "hello"}).json
    assert set(answer) == {"object", "data", "model", "usage"} and answer["object"] == "list"
    (one,) = answer["data"]
    assert one["object"] == "embedding" and one["index"] == 0
    assert np.allclose(one["embedding"], vectors.vector(vectors.tokenize("hello")))
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7} and answer["model"] == "vectors"


def test_lists_of_texts_and_of_tokens(client: Client, vectors: FakeEmbedder) -> None:
    for given, prompts in (
        (["a", "bc"], [[BOS, 97, SEP], [BOS, 98, 99, SEP]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["a", [7]], [[BOS, 97, SEP], [7]]),
    ):
        answer = client.post("/v1/embeddings", {"model": "vectors", "input": given}).json
        assert [one["index"] for one in answer["data"]] == list(range(len(prompts)))
        assert vectors.embedded[-1].prompts == prompts and vectors.embedded[-1].normalise


def test_base64_is_the_same_numbers(client: Client) -> None:
    body = {"model": "vectors", "input": ["a", "b"]}
    plain = client.post("/v1/embeddings", body).json["data"]
    coded = client.post("/v1/embeddings", body | {"encoding_format": "base64"}).json["data"]
    for one, other in zip(plain, coded, strict=True):
        assert np.allclose(np.frombuffer(base64.b64decode(other["embedding"]), "<f4"), one["embedding"], atol=1e-7)


def test_dimensions_where_the_model_is_made_for_them(client: Client, vectors: FakeEmbedder) -> None:
    body = {"model": "vectors", "input": "hello", "dimensions": 3}
    error = client.post("/v1/embeddings", body).error
    assert error["param"] == "dimensions" and "not trained for vectors that are cut short" in error["message"]
    assert client.post("/v1/embeddings", body | {"dimensions": N_OUT}).status == 200
    vectors.info = replace(vectors.info, cuts_vectors=True)
    cut = np.array(client.post("/v1/embeddings", body).json["data"][0]["embedding"])
    whole = vectors.vector(vectors.tokenize("hello"))[:3]
    assert np.allclose(cut, whole / np.linalg.norm(whole)) and math.isclose(float(cut @ cut), 1, rel_tol=1e-6)
    assert client.post("/v1/embeddings", body | {"dimensions": N_OUT + 1}).error["param"] == "dimensions"


def test_cutting_keeps_what_stands_around_a_text(client: Client, vectors: FakeEmbedder) -> None:
    body = {"model": "vectors", "input": "abcdef", "truncate_prompt_tokens": 5}
    assert client.post("/v1/embeddings", body).status == 200
    assert vectors.embedded[-1].prompts == [[BOS, 97, 98, 99, SEP]]
    client.post("/v1/embeddings", body | {"truncation_side": "left"})
    assert vectors.embedded[-1].prompts == [[BOS, 100, 101, 102, SEP]]
    client.post("/v1/embeddings", body | {"input": "x" * 100, "truncate_prompt_tokens": -1})
    assert len(vectors.embedded[-1].prompts[0]) == 32
    client.post("/v1/embeddings", body | {"input": [7] * 9})
    assert vectors.embedded[-1].prompts == [[7] * 5]


@pytest.mark.parametrize(
    ("most", "tokens", "expected"),
    [(3, [1, 5, 6, 2], [1, 5, 2]), (2, [1, 5, 6, 2], [1, 2]), (9, [1, 2], [1, 2]), (1, [5, 6], [5])],
)
def test_cut(most: int, tokens: list[int], expected: list[int]) -> None:
    assert Cut(most).of(tokens, [1], [2]) == expected


def test_pooling_and_length_by_request(client: Client, vectors: FakeEmbedder) -> None:
    body = {"model": "vectors", "input": "a"}
    client.post("/v1/embeddings", body | {"pooling": "cls", "embd_normalize": -1})
    assert (vectors.embedded[-1].pooling, vectors.embedded[-1].normalise) == (Pooling.CLS, False)
    client.post("/v1/embeddings", body | {"normalize": False})
    assert (vectors.embedded[-1].pooling, vectors.embedded[-1].normalise) == (None, False)
    client.post("/v1/embeddings", body | {"add_special_tokens": False})
    assert vectors.embedded[-1].prompts == [[97]]


def test_llama_servers_spelling(client: Client, vectors: FakeEmbedder) -> None:
    for path in ("/embedding", "/embeddings"):
        (one,) = client.post(path, {"model": "vectors", "content": "a"}).json
        assert one["index"] == 0 and np.allclose(one["embedding"][0], vectors.vector([BOS, 97, SEP]))
    (one,) = client.post("/embeddings", {"model": "vectors", "input": "a", "pooling": "none"}).json
    assert np.shape(one["embedding"]) == (3, N_OUT)
    assert (
        client.post("/v1/embeddings", {"model": "vectors", "input": "a", "pooling": "none"}).error["param"] == "pooling"
    )


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"input": None}, "input", "it is missing"),
        ({"input": []}, "input", "1 to 2048 texts"),
        ({"input": ["a"] * 2049}, "input", "got 2049"),
        ({"input": [1, "a"]}, "input", "mixes texts and token ids"),
        ({"input": {"a": 1}}, "input", "expected"),
        ({"input": ["a", "x" * 40]}, "input[1]", "tokens"),
        ({"encoding_format": "int8"}, "encoding_format", "float, base64"),
        ({"embd_normalize": 1}, "embd_normalize", "it must be 2"),
        ({"pooling": "max"}, "pooling", "mean, cls, last"),
        ({"pooling": "rank"}, "pooling", "mean, cls, last"),
        ({"dimensions": 0}, "dimensions", "1 to 8"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "1 to 32"),
        ({"truncate_prompt_tokens": 33}, "truncate_prompt_tokens", "got 33"),
        ({"truncation_side": "middle"}, "truncation_side", "left or right"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "does not support chats as texts"),
        ({"embed_dtype": "float16"}, "embed_dtype", "other types of numbers"),
        ({"model": "nobody"}, "model", "nobody"),
        ({"model": "fake"}, "model", "generates text and was not made for embeddings"),
        ({"model": "ranks"}, "model", "ranks pairs of texts"),
    ],
)
def test_what_is_refused(client: Client, vectors: FakeEmbedder, change: dict[str, Any], param: str, words: str) -> None:
    answer = client.post("/v1/embeddings", {"model": "vectors", "input": "a"} | change)
    assert answer.status in (400, 404) and answer.error["param"] == param and words in answer.error["message"]
    assert vectors.embedded == []


def test_a_chat_on_an_embedding_model_is_a_clear_400(client: Client) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
    ):
        answer = client.post(path, body | {"model": "vectors"})
        assert answer.status == 400 and "generates no text" in answer.error["message"]


def test_errors_of_the_engine(client: Client, vectors: FakeEmbedder, services: Services) -> None:
    vectors.embed_error = QueueFull("3 requests are waiting", retry_after=1)
    answer = client.post("/v1/embeddings", {"model": "vectors", "input": "a"})
    assert answer.status == 503 and answer.headers["retry-after"] == "1"
    vectors.embed_error = ComputeFailed("no finite numbers")
    assert client.post("/v1/embeddings", {"model": "vectors", "input": "a"}).status == 500
    assert services.models.get("vectors").n_leases == 0


def test_a_large_answer_is_written_in_a_text_thread(
    client: Client, vectors: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str] = []
    usual = cutting.Cut.of

    def noted(self: Cut, *args: Any) -> list[int]:
        where.append(threading.current_thread().name)
        return usual(self, *args)

    monkeypatch.setattr(cutting.Cut, "of", noted)
    vectors.info = replace(vectors.info, n_out=64)
    answer = client.post("/v1/embeddings", {"model": "vectors", "input": ["some words"] * 500})
    assert len(answer.json["data"]) == 500 and all(name.startswith("mullama-web") for name in where)
    where.clear()
    client.post("/v1/embeddings", {"model": "vectors", "input": "some words"})
    assert where == ["MainThread"]


def test_models_tell_their_kind(client: Client) -> None:
    found = {one["id"]: one for one in client.get("/v1/models").json["data"]}
    assert {name: one["kind"] for name, one in found.items()} == {
        "vectors": "embed",
        "ranks": "rank",
        "fake": "generate",
    }
    assert found["vectors"]["meta"]["n_out"] == N_OUT and found["vectors"]["meta"]["pooling"] == "mean"


def test_a_client_that_leaves_gives_its_texts_up(live: Callable[..., Live], engine: FakeEngine, config: ServeConfig,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from . import conftest

    vectors = FakeEmbedder()
    vectors.gate = asyncio.Event()
    monkeypatch.setattr(conftest, "ModelManager", lambda engines: ModelManager([("vectors", vectors)]))
    server = live()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/embeddings", json={"input": "a"}, timeout=0.3)
    for _ in range(200):
        if vectors.cancelled:
            break
        threading.Event().wait(0.02)
    assert vectors.cancelled == 1


# -- rerank and score


def test_rerank_by_a_head(client: Client, ranks: FakeEmbedder) -> None:
    body = {"model": "ranks", "query": "q", "documents": ["a", "abc", {"text": "ab"}]}
    answer = client.post("/v1/rerank", body).json
    assert [one["index"] for one in answer["results"]] == [1, 2, 0]
    assert answer["results"][0]["document"] == {"text": "abc"}
    assert math.isclose(answer["results"][0]["relevance_score"], 1 / (1 + math.exp(3)), rel_tol=1e-6)
    assert answer["usage"]["total_tokens"] == 5 + 6 + 7 and answer["id"].startswith("rerank-")
    assert ranks.embedded[0].prompts[0] == [BOS, 113, SEP, 97, SEP]
    top = client.post("/rerank", body | {"top_n": 1, "return_documents": False}).json["results"]
    assert len(top) == 1 and set(top[0]) == {"index", "relevance_score"}
    raw = client.post("/v1/rerank", body | {"use_activation": False}).json["results"]
    assert [one["relevance_score"] for one in raw] == [-3, -4, -5]


def test_cohere_and_text_embeddings_inference(client: Client) -> None:
    body = {"model": "ranks", "query": "q", "documents": ["a", "abc"]}
    answer = client.post("/v2/rerank", body).json
    assert set(answer["results"][0]) == {"index", "relevance_score"} and answer["meta"]["api_version"]["version"] == "2"
    other = client.post("/rerank", {"model": "ranks", "query": "q", "texts": ["a", "abc"], "return_text": True}).json
    assert [(one["index"], one["text"]) for one in other] == [(1, "abc"), (0, "a")] and other[0]["score"] > other[1][
        "score"
    ]


def test_rerank_by_cosine(client: Client, vectors: FakeEmbedder) -> None:
    answer = client.post("/v1/rerank", {"model": "vectors", "query": "abc", "documents": ["xyz", "abc", "abd"]}).json
    assert answer["results"][0]["index"] == 1 and math.isclose(answer["results"][0]["relevance_score"], 1, rel_tol=1e-6)
    assert len(vectors.embedded[0].prompts) == 3  # the query is one of the documents: each text once


def test_score(client: Client) -> None:
    one = client.post("/v1/score", {"model": "vectors", "text_1": "abc", "text_2": ["abc", "xyz"]}).json
    assert one["object"] == "list" and [each["index"] for each in one["data"]] == [0, 1]
    assert math.isclose(one["data"][0]["score"], 1, rel_tol=1e-6) and one["data"][1]["score"] < 1
    many = client.post("/score", {"model": "ranks", "queries": ["a", "b"], "documents": ["abc", "d"]}).json
    assert len(many["data"]) == 2 and many["data"][0]["score"] > many["data"][1]["score"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "q"}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "q", "documents": ["a"] * 2049}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "rank_fields": ["title"]}, "rank_fields"),
        ("/v1/rerank", {"query": "q", "documents": [3]}, "documents[0]"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "model": "fake"}, "model"),
        ("/v1/score", {"text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": "a", "queries": "a", "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
    ],
)
def test_what_rerank_and_score_refuse(client: Client, path: str, body: dict[str, Any], param: str) -> None:
    answer = client.post(path, {"model": "ranks"} | body)
    assert answer.status == 400 and answer.error["param"] == param


def test_what_asks_for_nothing_is_not_refused(client: Client) -> None:
    for field in _OF_VECTORS:
        for value in (None, *field.idle):
            body = {"model": "vectors", "input": "a", field.name: value}
            assert client.post("/v1/embeddings", body).status == 200, (field.name, value)


# -- Ollama


def test_ollama_embed(client: Client, vectors: FakeEmbedder) -> None:
    answer = client.post("/api/embed", {"model": "vectors:latest", "input": ["a", "b"]}).json
    assert np.allclose(answer["embeddings"][1], vectors.vector([BOS, 98, SEP])) and len(answer["embeddings"]) == 2
    assert answer["prompt_eval_count"] == 6 and answer["total_duration"] >= answer["load_duration"] >= 0
    assert client.post("/api/embed", {"model": "vectors", "input": "a"}).json["embeddings"][0]
    assert client.post("/api/embed", {"model": "vectors"}).json["embeddings"] == []
    client.post("/api/embed", {"model": "vectors", "input": "x" * 50})
    assert len(vectors.embedded[-1].prompts[0]) == 32
    refused = client.post("/api/embed", {"model": "vectors", "input": "x" * 50, "truncate": False})
    assert refused.status == 400 and isinstance(refused.json["error"], str)


def test_ollamas_older_embeddings_are_not_normalised(client: Client, vectors: FakeEmbedder) -> None:
    answer = client.post("/api/embeddings", {"model": "vectors", "prompt": "aa"}).json
    assert set(answer) == {"embedding"}
    assert np.allclose(answer["embedding"], vectors.vector([BOS, 97, 97, SEP], normalise=False))
    assert client.post("/api/embeddings", {"model": "vectors"}).json == {"embedding": []}


def test_keep_alive(client: Client, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float | None]] = []
    monkeypatch.setattr(services, "keep_alive", lambda name, seconds: asked.append((name, seconds)))
    client.post("/api/embed", {"model": "vectors", "input": "a", "keep_alive": "5m"})
    body = {"model": "vectors", "input": "a", "keep_alive": "soon"}
    assert client.post("/v1/embeddings", body).error["param"] == "keep_alive"
    assert client.post("/v1/embeddings", body | {"keep_alive": 7}).status == 200
    assert asked == [("vectors", 300), ("vectors", 7)]


def test_a_keys_tokens_count(tmp_path: Path, vectors: FakeEmbedder) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[key]]\nname = "a"\nkey = "a-key-long-enough"\ntokens_per_minute = 10\n', encoding="utf-8")
    path.chmod(0o600)
    config = ServeConfig(key_file=str(path))
    services = Services(config, ModelManager([("vectors", vectors)]))
    client = Client(create_app(config, services.models, services), services)
    headers = {"Authorization": "Bearer a-key-long-enough"}
    assert client.post("/v1/embeddings", {"input": "abcd"}, headers=headers).status == 200  # 6 of 10
    vectors.embed_error = ComputeFailed("no finite numbers")
    assert client.post("/v1/embeddings", {"input": "ab"}, headers=headers).status == 500  # takes nothing
    vectors.embed_error = None
    assert client.post("/v1/embeddings", {"input": "ab"}, headers=headers).status == 200
    assert client.post("/v1/embeddings", {"input": "ab"}, headers=headers).status == 429
    services.close()
