"""Text completions that succeed: the forms of a prompt, echo, several choices."""

from __future__ import annotations

import pytest

from .conftest import Client
from .fake_engine import BOS, HALF, FakeEngine

URL = "/v1/completions"


def test_a_reply_has_openai_s_shape(client: Client) -> None:
    body = client.post(URL, {"model": "fake", "prompt": "abc"}).json
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hello wörld!", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["prompt_tokens"] == 4  # with the beginning-of-sequence token
    assert body["usage"]["total_tokens"] == 8


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_forms_of_a_prompt(client: Client, engine: FakeEngine, prompt: object, expected: list[list[int]]) -> None:
    body = client.post(URL, {"prompt": prompt}).json
    assert [list(request.prompt) for request in engine.requests] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choice_index_counts_prompts_first(client: Client, engine: FakeEngine) -> None:
    body = client.post(URL, {"prompt": ["a", "b"], "n": 2, "echo": True, "seed": 1}).json
    assert [choice["text"][0] for choice in body["choices"]] == ["a", "a", "b", "b"]
    assert [request.sampling.seed for request in engine.requests] == [1, 2, 1, 2]
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 16


def test_cached_tokens_count_each_prompt_once(client: Client, engine: FakeEngine) -> None:
    engine.cached = 1
    usage = client.post(URL, {"prompt": ["a", "b"], "n": 3}).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2


def test_echo_of_text_and_of_tokens(client: Client) -> None:
    assert client.post(URL, {"prompt": "ab", "echo": True}).json["choices"][0]["text"] == "abHello wörld!"
    assert client.post(URL, {"prompt": [97, 99], "echo": True}).json["choices"][0]["text"] == "acHello wörld!"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_leaves_out_a_character_that_has_only_begun(client: Client, stream: bool) -> None:
    answer = client.post(URL, {"prompt": [97, HALF, 98, HALF], "echo": True, "stream": stream})
    texts = [one["choices"][0]["text"] for one in (answer.events[:-1] if stream else [answer.json])]
    assert "".join(texts) == "a\ufffdbHello wörld!", "one that is broken off stays visible"


def test_echo_in_a_stream(client: Client) -> None:
    events = client.post(URL, {"prompt": ["ab", "cd"], "echo": True, "stream": True}).events
    assert events[-1] == "[DONE]"
    texts = ["", ""]
    for event in events[:-1]:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["text"]
    assert texts == ["abHello wörld!", "cdHello wörld!"]


def test_long_prompts_go_through_the_pool(client: Client, engine: FakeEngine) -> None:
    assert client.post(URL, {"prompt": "x" * 3000, "echo": True}).json["choices"][0]["text"].startswith("xxx")
    assert len(engine.requests[0].prompt) == 3001
