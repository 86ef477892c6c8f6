"""all-MiniLM-L6-v2 in a real server, asked by the official clients; its vectors beside those of its own runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import ollama
import openai
import pytest

from .support import NAME, ServerProcess

#: Texts, and the first six numbers of their vectors by transformers 5 and torch 2.13 in 32 bits, mean of the tokens.
REFERENCE = {
    "The sky is blue.": [0.01792, 0.01353, 0.0428, 0.01672, 0.02982, 0.00501],
    "Fish swim in the sea.": [-0.01275, 0.05242, -0.02275, -0.02209, -0.04278, -0.00255],
    "Größe: 12,5 °C in München!": [0.01155, 0.05323, -0.02107, 0.02498, -0.03363, 0.04942],
    "word " * 300: [-0.02786, -0.10836, -0.0392, 0.06548, -0.02027, 0.01105],
}
TEXTS = ["The sky is blue.", "Fish swim in the sea.", "A fish is in the water."]


@pytest.fixture(scope="module")
def minilm(minilm_file: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    args = ["--model", f"{NAME}={smollm2}", "--model", f"minilm={minilm_file}", "--ctx-size", "512", "--threads", "1"]
    with ServerProcess(tmp_path_factory.mktemp("minilm"), args) as running:
        yield running


@pytest.fixture
def sdk(minilm: ServerProcess) -> Iterator[openai.OpenAI]:
    with minilm.sdk() as client:
        yield client


def cosine(a: list[float], b: list[float]) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def test_vectors_are_those_of_the_models_own_runtime(sdk: openai.OpenAI) -> None:
    found = sdk.embeddings.create(model="minilm", input=list(REFERENCE), encoding_format="float").data
    for one, expected in zip(found, REFERENCE.values(), strict=True):
        assert len(one.embedding) == 384 and np.abs(np.array(one.embedding[:6]) - expected).max() < 2e-3


def test_openai(sdk: openai.OpenAI) -> None:
    coded = sdk.embeddings.create(model="minilm", input=TEXTS)  # the client asks for base64
    plain = sdk.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    assert [one.index for one in coded.data] == [0, 1, 2] and coded.usage.prompt_tokens == plain.usage.total_tokens
    for one, other in zip(coded.data, plain.data, strict=True):
        assert cosine(one.embedding, other.embedding) > 0.99999
    sky, fish, water = (one.embedding for one in plain.data)
    assert cosine(fish, water) > cosine(sky, fish)
    with pytest.raises(openai.BadRequestError, match="cut short"):
        sdk.embeddings.create(model="minilm", input="x", dimensions=64)
    with pytest.raises(openai.BadRequestError, match="tokens; 'minilm' takes 512"):
        sdk.embeddings.create(model="minilm", input="word " * 2000)
    with pytest.raises(openai.BadRequestError, match="not made for embeddings"):
        sdk.embeddings.create(model=NAME, input="x")
    with pytest.raises(openai.BadRequestError, match="generates no text"):
        sdk.chat.completions.create(model="minilm", messages=[{"role": "user", "content": "hi"}])


def test_many_at_once_beside_a_chat(minilm: ServerProcess, sdk: openai.OpenAI) -> None:
    alone = {text: sdk.embeddings.create(model="minilm", input=text).data[0].embedding for text in TEXTS}
    with ThreadPoolExecutor(8) as pool:
        chat = pool.submit(minilm.chat, [{"role": "user", "content": "Count."}], max_tokens=32, model=NAME)
        calls = [pool.submit(sdk.embeddings.create, model="minilm", input=TEXTS * 20) for _ in range(6)]
        for call in calls:
            for text, one in zip(TEXTS * 20, call.result().data, strict=True):
                assert cosine(one.embedding, alone[text]) > 0.9999
        assert chat.result()["usage"]["completion_tokens"] > 0


def test_ollama(minilm: ServerProcess) -> None:
    client = ollama.Client(host=minilm.url)
    found = client.embed(model="minilm", input=TEXTS)
    assert len(found.embeddings) == 3 and len(found.embeddings[0]) == 384 and (found.prompt_eval_count or 0) > 15
    old = client.embeddings(model="minilm", prompt=TEXTS[0])
    assert cosine(list(old.embedding), list(found.embeddings[0])) > 0.9999
    assert len(client.embed(model="minilm", input="word " * 2000).embeddings[0]) == 384
    assert client.show("minilm").capabilities == ["embedding"]


def test_rerank_and_score(minilm: ServerProcess) -> None:
    body = {"model": "minilm", "query": "What swims in the water?", "documents": TEXTS, "top_n": 2}
    found = httpx.post(f"{minilm.url}/v1/rerank", json=body).json()["results"]
    assert [one["index"] for one in found] == [2, 1] or [one["index"] for one in found] == [1, 2]
    score = httpx.post(f"{minilm.url}/v1/score", json={"model": "minilm", "text_1": TEXTS[1], "text_2": TEXTS}).json()
    assert abs(score["data"][1]["score"] - 1) < 1e-5


def test_the_command_line(minilm_file: Path, sdk: openai.OpenAI) -> None:
    command = [sys.executable, "-P", "-m", "mullama", "embed", "--with", str(minilm_file), "--threads", "1", *TEXTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    vectors = [json.loads(line) for line in done.stdout.splitlines()]
    served = sdk.embeddings.create(model="minilm", input=TEXTS).data
    assert all(cosine(one, other.embedding) > 0.9999 for one, other in zip(vectors, served, strict=True))
    piped = subprocess.run(
        [*command[:-3], "--json"], input="\n".join(TEXTS), capture_output=True, text=True, timeout=120, check=True
    )
    assert [one["text"] for one in json.loads(piped.stdout)["data"]] == TEXTS


def test_the_memory_of_the_process_has_it(minilm: ServerProcess) -> None:
    found = httpx.get(f"{minilm.url}/internal/memory").json()
    assert "minilm" in json.dumps(found)
    models = {one["name"]: one for one in httpx.get(f"{minilm.url}/internal/models").json()["models"]}
    assert models["minilm"]["state"] == "ready"
    assert httpx.get(f"{minilm.url}/internal/kv", params={"model": "minilm"}).status_code == 400
