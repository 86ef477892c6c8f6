"""Chat completions that succeed: what reaches the engine, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Client
from .fake_engine import FakeEngine

URL = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


def test_a_reply_has_openai_s_shape(client: Client, engine: FakeEngine) -> None:
    engine.cached = 5
    result = client.post(URL, {"model": "fake", "messages": [USER]})
    body = result.json
    assert result.status == 200
    assert result.headers["content-type"].startswith("application/json")
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    assert body["created"] > 1_700_000_000
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello wörld!", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    n_prompt = 1 + len("<user>hi<assistant>")  # the fake vocabulary adds a BOS
    assert body["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": 4,
        "total_tokens": n_prompt + 4,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    assert "profile" not in body


def test_the_rendered_template_is_tokenised_with_the_bos_that_rendering_leaves_out(
    client: Client, engine: FakeEngine
) -> None:
    client.post(URL, {"messages": [USER]})
    assert list(engine.requests[0].prompt) == engine.tokenize("<user>hi<assistant>")


def test_messages_reach_the_template_normalised(client: Client, engine: FakeEngine) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief", "unknown": [1]},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant"},
    ]
    assert client.post(URL, {"messages": messages}).status == 200
    assert engine.rendered == [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "name": "ann", "content": "a\nb"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42", "name": "f"},  # some templates want it
        {"role": "assistant", "content": None},
    ]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_ends_with_length(client: Client, engine: FakeEngine, name: str) -> None:
    choice = client.post(URL, {"messages": [USER], name: 2}).json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == "Hello"
    assert engine.requests[0].sampling.max_tokens == 2


def test_without_max_tokens_a_reply_may_fill_the_context(client: Client, engine: FakeEngine) -> None:
    client.post(URL, {"messages": [USER]})
    assert engine.requests[0].sampling.max_tokens is None


def test_each_choice_is_a_request_with_its_own_seed_and_id(client: Client, engine: FakeEngine) -> None:
    body = client.post(URL, {"messages": [USER], "n": 3, "seed": 7, "user": "ann", "priority": -2}).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 9]
    assert len({request.id for request in engine.requests}) == 3
    assert {request.user for request in engine.requests} == {"ann"}
    assert {request.priority for request in engine.requests} == {-2}
    assert body["usage"]["prompt_tokens"] == len(engine.requests[0].prompt)
    assert body["usage"]["completion_tokens"] == 12


def test_a_missing_or_null_model_is_the_first_one(client: Client) -> None:
    assert client.post(URL, {"messages": [USER]}).json["model"] == "fake"
    assert client.post(URL, {"messages": [USER], "model": None}).json["model"] == "fake"
    assert client.post(URL, {"messages": [USER], "model": "other"}).json["model"] == "other"
    assert client.post(URL, {"messages": [USER], "model": "Fake"}).json["model"] == "fake"


def test_what_is_off_may_be_said(client: Client) -> None:
    """Clients send these with their neutral values; what is harmless is ignored."""
    body = {
        "messages": [USER],
        "tools": [],
        "tool_choice": "none",
        "logprobs": False,
        "top_logprobs": None,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "stop": None,
        "stream": None,
        "logit_bias": None,
        "metadata": {"a": 1},
    }
    assert client.post(URL, body).status == 200


def test_a_long_chat_goes_through_the_pool(client: Client, engine: FakeEngine) -> None:
    text = "x" * 3000
    assert client.post(URL, {"messages": [{"role": "user", "content": text}]}).status == 200
    assert len(engine.requests[0].prompt) == 1 + 3000 + len("<user><assistant>")


def test_a_large_body_goes_through_the_pool(client: Client, engine: FakeEngine) -> None:
    result = client.post(URL, {"messages": [USER], "padding": "x" * 300_000})
    assert result.status == 200


def test_arrival_is_stamped_before_anything_else(client: Client, engine: FakeEngine) -> None:
    body = client.post(URL, {"messages": [USER]}, headers={"X-Profile": "true"}).json
    assert 0 < body["profile"]["total_ms"] < 5000
    assert engine.requests[0].arrival_ns > 0


def test_x_profile_adds_the_profile(client: Client) -> None:
    profile = client.post(URL, {"messages": [USER]}, headers={"X-Profile": "true"}).json["profile"]
    expected = {"prompt_tokens", "completion_tokens", "kv_cache_hit", "kv_cache_miss", "kv_cache_evict", "total_ms"}
    expected |= {"time_to_first_token_ms", "queue_ms", "prefill_ms", "decode_ms", "sample_ms", "steps"}
    assert expected | {"mean_batch_size"} <= set(profile)
    assert profile["completion_tokens"] == 4


def test_x_profile_of_several_choices_adds_up(client: Client, engine: FakeEngine) -> None:
    engine.cached = 3
    body = client.post(URL, {"messages": [USER], "n": 2}, headers={"X-Profile": "true"}).json
    total, parts = body["profile"], body["profiles"]
    assert len(parts) == 2
    for name in ("prompt_tokens", "completion_tokens", "kv_cache_hit", "kv_cache_miss", "steps"):
        assert total[name] == sum(part[name] for part in parts)
    assert total["total_ms"] == max(part["total_ms"] for part in parts)
    assert total["mean_batch_size"] == 2.0
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


def test_other_values_of_x_profile_are_no(client: Client) -> None:
    assert "profile" not in client.post(URL, {"messages": [USER]}, headers={"X-Profile": "false"}).json
