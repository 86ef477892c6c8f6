"""The Embedder on tiny random models: what it computes against numpy, alone and together, threads, faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bert import CLS, N_CTX, N_EMBD, SEP, TinyBert, cosine

from mullama import abi
from mullama._core import Embedder, Model
from mullama.errors import ModelLoadError
from mullama.models.converting.bert import convert
from mullama.types import Pooling

TEXTS = ["the sky is blue", "fish swim in the sea", "a cat sat on the mat.", "king", "how are you? one two three four!"]


def gguf(bert: TinyBert, folder: Path) -> Path:
    path = folder / "bert.gguf"
    with path.open("wb") as out:
        convert(bert.write(folder / "trained"), out, name="tiny-bert")
    return path


@pytest.fixture(scope="module")
def bert() -> TinyBert:
    return TinyBert()


@pytest.fixture(scope="module")
def bert_model(bert: TinyBert, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(gguf(bert, tmp_path_factory.mktemp("bert")))
    yield model
    model.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Embedder]]:
    made: list[Embedder] = []

    def embedder(model: Model, **options: Any) -> Embedder:
        made.append(Embedder(model, **{"n_ctx": N_CTX, **options}))
        return made[-1]

    yield embedder
    for one in made:
        one.close()


def rows(vectors: list[bytes | None], n: int = N_EMBD) -> list[np.ndarray[Any, Any]]:
    assert None not in vectors
    return [np.frombuffer(one, np.float32).reshape(-1, n) for one in vectors if one is not None]


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS, Pooling.LAST])
def test_vectors_are_those_of_numpy(
    bert: TinyBert, bert_model: Model, make: Callable[..., Embedder], pooling: Pooling, n_threads: int
) -> None:
    embedder = make(bert_model, n_threads=n_threads)
    prompts = [bert_model.tokenize(text) for text in TEXTS]
    assert all(one[0] == CLS and one[-1] == SEP for one in prompts)
    found = rows(embedder.run([(one, pooling, True) for one in prompts]))
    for prompt, vector in zip(prompts, found, strict=True):
        assert cosine(vector[0], bert.embed(prompt, pooling)) > 0.9999
        assert abs(float(np.linalg.norm(vector[0])) - 1) < 1e-5


def test_vectors_of_all_tokens(bert: TinyBert, bert_model: Model, make: Callable[..., Embedder]) -> None:
    prompts = [bert_model.tokenize(text) for text in TEXTS]
    found = rows(make(bert_model).run([(one, Pooling.NONE, False) for one in prompts]))
    for prompt, vectors in zip(prompts, found, strict=True):
        expected = bert.tokens(prompt)
        assert vectors.shape == expected.shape and np.abs(vectors - expected).max() < 0.05


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_alone_and_together_are_the_same(
    arch: str, bert_model: Model, model: Model, make: Callable[..., Embedder], n_threads: int
) -> None:
    """Also for a model that keeps KV, of which nothing may stay for the next ubatch."""
    embedder = make(bert_model if arch == "bert" else model, n_threads=n_threads, n_batch=256)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(10, 90, n).tolist() for n in (1, 7, 30, 64, 3, 7, 100)]
    how = Pooling.MEAN if arch == "bert" else Pooling.LAST
    together = rows(embedder.run([(one, how, True) for one in prompts]))
    for prompt, vector in zip(prompts, together, strict=True):
        (alone,) = rows(embedder.run([(prompt, how, True)]))
        assert cosine(alone[0], vector[0]) > (0.99999 if arch == "bert" else 0.9995)  # products in 8 bits
    assert cosine(together[1][0], together[5][0]) < 0.9999  # other tokens, another vector


def test_poolings_of_one_ubatch_may_differ(bert: TinyBert, bert_model: Model, make: Callable[..., Embedder]) -> None:
    prompt = bert_model.tokenize("the red tree")
    kinds = [Pooling.MEAN, Pooling.CLS, Pooling.NONE, Pooling.LAST]
    found = rows(make(bert_model).run([(prompt, kind, kind is not Pooling.NONE) for kind in kinds]))
    assert found[2].shape == (len(prompt), N_EMBD)
    for i in (0, 1, 3):
        assert cosine(found[i][0], bert.embed(prompt, kinds[i])) > 0.9999


def test_a_head_that_ranks(tmp_path: Path, make: Callable[..., Embedder]) -> None:
    bert = TinyBert(ranks=True)
    model = Model(gguf(bert, tmp_path))
    embedder = make(model, ranks=True)
    prompts = [model.tokenize(text) for text in TEXTS]
    found = rows(embedder.run([(one, Pooling.RANK, True) for one in prompts]), embedder.n_embd)
    for prompt, score in zip(prompts, found, strict=True):
        assert score.shape == (1, 1) and abs(float(score[0, 0]) - bert.rank(prompt)) < 0.02
    with pytest.raises(ValueError, match="does not compute the pooling mean"):
        embedder.run([(prompts[0], Pooling.MEAN, True)])
    embedder.close()
    model.close()


def test_what_is_no_ubatch_is_refused(bert_model: Model, make: Callable[..., Embedder]) -> None:
    embedder = make(bert_model)
    assert (embedder.n_ctx, embedder.n_batch, embedder.n_slots) == (N_CTX, N_CTX, N_CTX // 4)
    mean = Pooling.MEAN
    for prompts in (
        [],
        [([], mean, True)],
        [([5] * (N_CTX + 1), mean, True)],
        [([5] * N_CTX, mean, True), ([5], mean, True)],
        [([5], mean, True)] * (N_CTX // 4 + 1),
        [([bert_model.n_vocab], mean, True)],
        [([-1], mean, True)],
        [([5], Pooling.RANK, True)],
    ):
        with pytest.raises(ValueError, match=r"prompt|token id|pooling"):
            embedder.run(prompts)
    assert rows(embedder.run([([5] * N_CTX, mean, True)]))[0].shape == (1, N_EMBD)


def test_a_vector_that_is_not_finite_is_that_prompts_alone(bert_model: Model, make: Callable[..., Embedder]) -> None:
    embedder = make(bert_model)
    embedder.inject_nan(1)
    found = embedder.run([([5, 6], Pooling.MEAN, True)] * 3)
    assert [one is None for one in found] == [False, True, False]
    assert None not in embedder.run([([5, 6], Pooling.MEAN, True)] * 3)


def test_the_page_tells(bert_model: Model, make: Callable[..., Embedder], tmp_path: Path) -> None:
    embedder = make(bert_model, page_path=str(tmp_path / "x.page"))
    embedder.note_opened(3)
    embedder.run([([5, 6], Pooling.MEAN, True)] * 3, 4)
    embedder.note_cancelled(1)
    reader = abi.Reader(embedder.page.buffer())
    found = reader.counters()
    assert (found.steps, found.ubatches, found.prefill_tokens, found.finished_stop) == (1, 1, 6, 3)
    assert found.waiting == 4 and found.opened == 3 and found.decode_ns > 0 and found.busy_ns >= found.decode_ns
    embedder.note_idle(1000, 0)
    assert reader.counters().waiting == 0 and reader.counters().cancelled == 1
    kinds = [abi.SITES[event.kind] for event in reader.events()] if hasattr(abi, "SITES") else []
    assert not kinds or "UBATCH_END" in kinds


def test_what_cannot_embed_is_refused(tiny_model: Callable[..., Path], bert_model: Model) -> None:
    with pytest.raises(ModelLoadError, match="n_threads must be"):
        Embedder(bert_model, n_ctx=32, n_threads=0)
    vocab = Model(tiny_model(), vocab_only=True)
    with pytest.raises(ModelLoadError, match="without weights"):
        Embedder(vocab, n_ctx=32)
    vocab.close()


def test_closing_frees_the_model(tmp_path: Path) -> None:
    model = Model(gguf(TinyBert(), tmp_path))
    embedder = Embedder(model, n_ctx=32)
    with pytest.raises(RuntimeError, match="still uses"):
        model.close()
    embedder.close()
    embedder.close()
    with pytest.raises(RuntimeError, match="closed"):
        embedder.run([([5], Pooling.MEAN, True)])
    model.close()
