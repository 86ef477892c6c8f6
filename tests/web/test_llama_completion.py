"""``/completion`` and what llama-server's clients send elsewhere: ``n_predict``, ``timings_per_token``."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Client
from .fake_engine import FakeEngine

MEMBERS = {
    *("index", "content", "tokens", "id_slot", "stop", "model", "tokens_predicted", "tokens_evaluated"),
    *("generation_settings", "prompt", "has_new_line", "truncated", "stop_type", "stopping_word", "tokens_cached"),
    "timings",
}


@pytest.mark.parametrize("path", ["/completion", "/completions"])
def test_a_text_goes_on(client: Client, engine: FakeEngine, path: str) -> None:
    engine.cached = 2
    answer = client.post(path, {"prompt": "Once", "n_predict": 9, "temperature": 0.5}).json
    assert set(answer) == MEMBERS
    assert (answer["content"], answer["prompt"], answer["stop_type"], answer["stop"]) == (
        "Hello wörld!",
        "Once",
        "eos",
        True,
    )
    assert (answer["tokens_evaluated"], answer["tokens_predicted"], answer["tokens_cached"]) == (5, 4, 9)
    assert (answer["timings"]["cache_n"], answer["timings"]["prompt_n"], answer["timings"]["predicted_n"]) == (2, 3, 4)
    assert answer["generation_settings"]["temperature"] == 0.5
    assert answer["generation_settings"]["n_predict"] == engine.requests[-1].sampling.max_tokens == 9


def test_a_stream_says_the_same(client: Client) -> None:
    whole = client.post("/completion", {"prompt": "Once", "n_predict": 2}).json
    events = client.post("/completion", {"prompt": "Once", "n_predict": 2, "stream": True}).events
    assert [one["stop"] for one in events] == [False] * (len(events) - 1) + [True]
    assert "".join(one["content"] for one in events) == whole["content"]
    assert (events[-1]["stop_type"], whole["stop_type"]) == ("limit", "limit")
    assert set(events[-1]) == MEMBERS


def test_several_choices_are_a_list(client: Client) -> None:
    answers = client.post("/completion", {"prompt": ["a", "b"], "n": 2}).json
    assert [(one["index"], one["prompt"]) for one in answers] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


@pytest.mark.parametrize(("field", "value"), [("samplers", ["top_k"]), ("n_predict", 0)])
def test_what_is_not_built_is_refused_by_name(client: Client, field: str, value: Any) -> None:
    reply = client.post("/completion", {"prompt": "x", field: value})
    assert (reply.status, reply.error["param"]) == (400, field)


def test_spellings_of_a_limit(client: Client, engine: FakeEngine) -> None:
    for body in ({"n_predict": 3}, {"n_predict": 3, "max_tokens": 2}, {"n_predict": -1}):
        client.post("/v1/completions", {"prompt": "x", **body})
    assert [request.sampling.max_tokens for request in engine.requests] == [3, 2, None]


@pytest.mark.parametrize("n", [1, 2])
def test_timings_are_told_on_request(client: Client, n: int) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "n": n, "timings_per_token": True}
    whole = client.post("/v1/chat/completions", body).json
    assert whole["timings"]["predicted_n"] == 4 * n
    assert whole["timings"].keys() >= {"prompt_ms", "prompt_per_second", "predicted_per_token_ms"}
    for more in ({}, {"stream_options": {"include_usage": True}}):
        *_, last, done = client.post("/v1/chat/completions", body | {"stream": True} | more).events
        assert done == "[DONE]"
        assert last["timings"]["predicted_n"] == 4 * n
    assert "timings" not in json.dumps(client.post("/v1/chat/completions", body | {"timings_per_token": None}).json)
