"""``/v1/messages``: bodies, answers, streams and errors as Anthropic's clients know them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mullama.errors import QueueFull
from mullama.types import FinishReason

from .conftest import Client, Result
from .fake_engine import FakeEngine

URL = "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]
BODY = {"model": "fake", "max_tokens": 16, "messages": HI}


def events(result: Result) -> list[dict[str, Any]]:
    """The events of a stream, each checked to be of the type that it says."""
    assert result.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in result.body.decode().split("\n\n")[:-1]:
        kind, data = block.split("\n")
        fields = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {fields['type']}"
        found.append(fields)
    return found


def test_a_message(client: Client, engine: FakeEngine) -> None:
    engine.cached = 3
    answer = client.post(URL, BODY).json
    assert answer.pop("id").startswith("msg-")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [{"type": "text", "text": "Hello wörld!", "citations": None}],
        "stop_details": None,
        "container": None,
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("<user>Hi<assistant>") + 1 - 3,
            "cache_read_input_tokens": 3,
            "cache_creation_input_tokens": 0,
            "output_tokens": 4,
            **dict.fromkeys(
                ("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use", "service_tier")
            ),
        },
    }


def test_a_stream_says_the_same(client: Client) -> None:
    whole = client.post(URL, BODY).json
    found = events(client.post(URL, {**BODY, "stream": True}))
    kinds = [one["type"] for one in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(one["delta"]["text"] for one in found[2:-3]) == whole["content"][0]["text"]
    message = found[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    assert message["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"] == whole["usage"]


def test_an_answer_without_text_is_whole(client: Client, engine: FakeEngine) -> None:
    engine.reply = []
    kinds = [one["type"] for one in events(client.post(URL, {**BODY, "stream": True}))]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


def test_max_tokens_ends_it(client: Client) -> None:
    answer = client.post(URL, {**BODY, "max_tokens": 2}).json
    assert answer["stop_reason"] == "max_tokens" and answer["content"][0]["text"] == "Hello"
    assert (
        events(client.post(URL, {**BODY, "max_tokens": 2, "stream": True}))[-2]["delta"]["stop_reason"] == "max_tokens"
    )


def test_a_stop_sequence_is_named(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from . import fake_engine

    whole = fake_engine.Finish

    def with_stop(reason: FinishReason, profile: Any, **more: Any) -> Any:
        return whole(reason, profile, stop_string="END", **more)

    monkeypatch.setattr(fake_engine, "Finish", with_stop)
    answer = client.post(URL, {**BODY, "stop_sequences": ["END"]}).json
    assert answer["stop_reason"] == "stop_sequence" and answer["stop_sequence"] == "END"


def test_the_fields_reach_the_engine(client: Client, engine: FakeEngine) -> None:
    client.post(
        URL,
        {
            **BODY,
            "system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
                {"role": "user", "content": "b"},
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "?"}, {"type": "text", "text": "c"}],
                },
                {"role": "user", "content": "d"},
            ],
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.5,
            "stop_sequences": ["x"],
            "metadata": {"user_id": "ada"},
            "thinking": {"type": "disabled"},
            "tools": [],
            "service_tier": "auto",
        },
    )
    assert engine.rendered == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c", "reasoning_content": "?"},
        {"role": "user", "content": "d"},
    ]
    request = engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 0.5)
    assert sampling.stop == ("x",) and sampling.max_tokens == 16 and request.user == "ada"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens: it is missing"),
        ({"max_tokens": 0}, "max_tokens: 0 is below 1"),
        ({"max_tokens": "a"}, "max_tokens: expected a whole number"),
        ({"messages": []}, "messages: it must be a list"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role: 'system' is neither"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type: it is 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text: it is missing"),
        ({"temperature": 1.5}, "temperature: it must be between 0 and 1"),
        ({"top_p": 2}, "top_p"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences: a stop string must not be empty"),
        ({"tools": [{"name": "f"}, {"name": "f"}]}, "there are two functions named 'f'"),
        ({"tools": [{"name": "f", "type": "bash_20250124"}]}, "tools[0].type: this server does not support the tool"),
        ({"thinking": {"type": "loud"}}, "thinking.type"),
        ({"tools": [{"name": "f"}], "tool_choice": {"type": "tool", "name": "g"}}, "there is no function 'g'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "messages[0].content[0].tool_use_id: it is missing",
        ),
        ({"output_config": {"format": {}}}, "output_config"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_api(client: Client, change: Any, words: str) -> None:
    result = client.post(URL, {**BODY, **change})
    assert result.status == 400
    assert result.json["type"] == "error" and result.json["error"]["type"] == "invalid_request_error"
    assert words in result.json["error"]["message"]


@pytest.mark.parametrize(
    ("status", "kind"), [(404, "not_found_error"), (405, "invalid_request_error"), (503, "overloaded_error")]
)
def test_errors_have_their_types(client: Client, engine: FakeEngine, status: int, kind: str) -> None:
    if status == 405:
        result = client.get(URL)
    else:
        engine.submit_errors = [QueueFull("the queue is full", retry_after=1)] * (status == 503)
        result = client.post(URL, {**BODY, "model": "none" if status == 404 else "fake"})
    assert result.status == status
    assert result.json["type"] == "error" and result.json["error"]["type"] == kind


def test_an_error_in_a_stream_is_an_event(client: Client, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 2, QueueFull("no more")
    last = events(client.post(URL, {**BODY, "stream": True}))[-1]
    assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "no more"}}


def test_pings_are_events(client: Client, engine: FakeEngine, services: Any) -> None:
    services.ping_seconds, engine.first_delay = 0.02, 0.09
    kinds = [one["type"] for one in events(client.post(URL, {**BODY, "stream": True}))]
    assert kinds[0] == "ping" and kinds[-1] == "message_stop"


def test_a_profile(client: Client) -> None:
    headers = {"X-Profile": "true"}
    assert client.post(URL, BODY, headers=headers).json["profile"]["completion_tokens"] == 4
    found = events(client.post(URL, {**BODY, "stream": True}, headers=headers))
    assert found[-2]["profile"]["completion_tokens"] == 4


def test_counting_tokens(client: Client, engine: FakeEngine) -> None:
    counted = client.post(f"{URL}/count_tokens", {"model": "fake", "messages": HI, "system": "s"}).json
    assert counted == {"input_tokens": 1 + len("<system>s<user>Hi<assistant>")}
    assert engine.requests == []
    long = [{"role": "user", "content": "b" * 5000}]
    assert client.post(f"{URL}/count_tokens", {"messages": long}).json["input_tokens"] == 5018
    assert client.post(f"{URL}/count_tokens", {"messages": []}).status == 400


WEATHER = {"name": "get_weather", "description": "The weather.", "input_schema": {"type": "object", "properties": {}}}
CALLING = [
    "<think>Hm",
    "m.</think>Well",
    ": ",
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}',
    "</tool_call>",
]


def put_together(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content of a message from its events, which must come in order."""
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in found:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
            is_open = True
        elif event["type"] == "content_block_delta":
            assert is_open and event["index"] == len(blocks) - 1
            delta, block = event["delta"], blocks[-1]
            if delta["type"] == "input_json_delta":
                block["json"] = block.get("json", "") + delta["partial_json"]
            else:
                name = delta["type"].removesuffix("_delta")
                block[name] += delta[name]
        elif event["type"] == "content_block_stop":
            assert is_open and event["index"] == len(blocks) - 1
            is_open = False
    assert not is_open
    for block in blocks:
        if "json" in block:
            block["input"] = json.loads(block.pop("json"))
    return blocks


def test_thoughts_and_calls_are_blocks(client: Client, engine: FakeEngine) -> None:
    engine.reply = CALLING
    body = {**BODY, "tools": [WEATHER], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    whole = client.post(URL, body).json
    assert whole["stop_reason"] == "tool_use"
    thinking, text, call = whole["content"]
    assert thinking == {"type": "thinking", "thinking": "Hmm.", "signature": ""} and text["text"] == "Well: "
    assert (call["name"], call["input"]) == ("get_weather", {"city": "Rome"}) and call["id"]
    found = events(client.post(URL, {**body, "stream": True}))
    streamed = put_together(found)
    streamed[2]["id"] = call["id"]
    assert streamed == whole["content"] and found[-2]["delta"]["stop_reason"] == "tool_use"
    assert json.loads(engine.asks[0].tools)[0]["function"]["parameters"] == WEATHER["input_schema"]
    assert engine.asks[0].thinks and not engine.asks[0].arguments


def test_calls_and_results_reach_the_template(client: Client, engine: FakeEngine) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "text", "text": "sun"}],
        "is_error": False,
    }
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
    ]
    assert client.post(URL, {**BODY, "messages": messages, "tools": [WEATHER]}).status == 200
    _, one, answered, asked = engine.rendered
    assert one["content"] == "a" and one["reasoning_content"] == "hm"
    assert one["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city":"Rome"}'}
    assert answered == {"role": "tool", "content": "sun", "tool_call_id": "t1", "name": "get_weather"}
    assert asked == {"role": "user", "content": "and now?"}
    assert not engine.asks[0].thinks
