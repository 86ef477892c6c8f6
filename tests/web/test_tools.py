"""Functions and thoughts in chats: what is asked, what is answered, streamed and whole."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from mullama.types import ToolChoice

from .conftest import Client, Result
from .fake_engine import FakeEngine

URL = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER]}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa\\u00e9ris"}}</tool_call>'
NOTHING = {"refusal": None, "annotations": []}  # what clients look for in a whole message
THOUGHT = "<think>Let me see.</think>Well: "


def chunks(result: Result) -> list[dict[str, Any]]:
    lines = [line for line in result.body.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(line[6:]) for line in lines]


def joined(found: list[dict[str, Any]], index: int = 0) -> tuple[dict[str, Any], str]:
    """The message that the chunks of a choice make up, put together as OpenAI's clients do, and why it ended."""
    message: dict[str, Any] = {"content": None}
    calls: list[dict[str, Any]] = []
    reason = ""
    for chunk in found:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            reason = choice["finish_reason"] or reason
            delta = choice["delta"]
            for name in ("role", "content", "reasoning_content", "reasoning"):
                if delta.get(name) is not None:
                    message[name] = (message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(calls):
                    assert call["id"] and call["type"] == "function" and call["function"]["arguments"] == ""
                    calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
                else:
                    assert call["index"] == len(calls) - 1 and set(call) == {"index", "function"}
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = calls
    return message, reason


def test_a_call_is_answered_as_one(client: Client, engine: FakeEngine) -> None:
    engine.reply = [THOUGHT, CALL[:20], CALL[20:], CALL]
    choice = client.post(URL, BODY).json["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Well: " and message["reasoning_content"] == message["reasoning"] == "Let me see."
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [{"city": "Paéris"}] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    (ask,) = engine.asks
    assert json.loads(ask.tools) == [WEATHER] and ask.choice is ToolChoice.AUTO and ask.parallel
    assert json.loads(ask.parameters) == {"get_weather": WEATHER["function"]["parameters"]}
    sampling = engine.requests[0].sampling
    assert sampling.stop == ("<stop>",) and sampling.shown == ("<tool_call>",)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_says_the_same(client: Client, engine: FakeEngine, size: int, n: int) -> None:
    text = f"{THOUGHT}{CALL} {CALL}"
    engine.reply = [text[at : at + size] for at in range(0, len(text), size)]
    whole = client.post(URL, {**BODY, "n": n}).json["choices"]
    found = chunks(client.post(URL, {**BODY, "n": n, "stream": True}))
    for i in range(n):
        message, reason = joined(found, i)
        expected = whole[i]["message"]
        assert reason == whole[i]["finish_reason"] == "tool_calls"
        for one, other in zip(message.pop("tool_calls"), expected.pop("tool_calls"), strict=True):
            assert one["function"] == other["function"]
        assert message | NOTHING == expected


def test_an_answer_in_words_stays_one(client: Client, engine: FakeEngine) -> None:
    choice = client.post(URL, BODY).json["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"] == {
        "role": "assistant",
        "content": "Hello wörld!",
        **NOTHING,
    }
    message, reason = joined(chunks(client.post(URL, {**BODY, "stream": True})))
    assert message["content"] == "Hello wörld!" and reason == "stop"


def test_thoughts_without_functions(client: Client, engine: FakeEngine) -> None:
    engine.thinks, engine.reply = True, ["<think>a", "b</think>", "c"]
    body = {**BODY, "tools": []}
    assert client.post(URL, body).json["choices"][0]["message"]["reasoning_content"] == "ab"
    hidden = client.post(URL, {**body, "include_reasoning": False}).json["choices"][0]["message"]
    assert hidden == {"role": "assistant", "content": "c", **NOTHING}
    message, _ = joined(chunks(client.post(URL, {**body, "stream": True, "include_reasoning": False})))
    assert message == {"role": "assistant", "content": "c"}


def test_what_is_cut_is_no_call(client: Client, engine: FakeEngine) -> None:
    engine.reply = ["<tool_call>", '{"name": "get', "_weather"]
    choice = client.post(URL, {**BODY, "max_tokens": 2}).json["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]


def test_the_form_of_the_prompt_is_the_clients_to_choose(client: Client, engine: FakeEngine) -> None:
    fields = {
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "reasoning_effort": "high",
        "reasoning_format": "none",
    }
    more = {"chat_template_kwargs": {"enable_thinking": False, "level": {"a": [1]}}}
    assert client.post(URL, {**BODY, **fields, **more}).status == 200
    (ask,) = engine.asks
    assert not ask.parallel and ask.choice is ToolChoice.NONE and not ask.thinks and not ask.splits
    assert json.loads(ask.arguments) == {"level": {"a": [1]}, "reasoning_effort": "high"}


def test_calls_and_results_of_earlier_answers(client: Client, engine: FakeEngine) -> None:
    called = [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
        {"id": "c2", "function": {"name": "get_weather", "arguments": {"city": "Bonn"}}, "index": 1},
        {"id": "c3", "function": {"name": "get_weather", "arguments": '{"city": "Bo'}},
    ]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": called, "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "function_call": {"name": "get_weather", "arguments": "{}"}},
        {"role": "function", "name": "get_weather", "content": "sun"},
    ]
    assert client.post(URL, {**BODY, "messages": messages}).status == 200
    _, one, result, other, last = engine.rendered
    assert one["reasoning_content"] == "hm"
    arguments = [call["function"]["arguments"] for call in one["tool_calls"]]
    assert [call["type"] for call in one["tool_calls"]] == ["function"] * 3
    assert arguments == ['{"city": "Rome"}', '{"city":"Bonn"}', '"{\\"city\\": \\"Bo"']
    assert result == {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "get_weather"}
    assert other["tool_calls"] == [{"type": "function", "function": {"name": "get_weather", "arguments": "{}"}}]
    assert last == {"role": "tool", "name": "get_weather", "content": "sun"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "colossal"}, "reasoning_effort"),
        ({"reasoning_format": "loose"}, "reasoning_format"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"a": "x" * 70_000}}, "chat_template_kwargs"),
        ({"chat_template": "{{x}}"}, "chat_template"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages[0].tool_calls[0].function"),
    ],
)
def test_what_is_wrong_is_named(client: Client, change: dict[str, Any], field: str) -> None:
    result = client.post(URL, {**BODY, **change})
    assert result.status == 400, result.body.decode()
    assert result.json["error"]["param"] == field, result.body.decode()


def test_too_many_functions_are_refused_quickly(client: Client) -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(100_000)]
    data = json.dumps({**BODY, "tools": tools}).encode()
    began = time.monotonic()
    result = client.post(URL, data[: 1 << 20] if len(data) > 1 << 30 else data)
    assert result.status in (400, 413) and time.monotonic() - began < 2
    few = json.dumps({**BODY, "tools": tools[:600]}).encode()
    assert client.post(URL, few).json["error"]["param"] == "tools"
    assert client.post(URL, {**BODY, "tools": tools[:100]}).status == 200
