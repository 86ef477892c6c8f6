"""Every wrong request: the status, the OpenAI error object, the field it names, and words that help."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from mullama.errors import ContextLengthExceeded, EngineDead, QueueFull
from mullama.types import Finish, FinishReason, Profile

from .conftest import Client
from .fake_engine import N_CTX, FakeEngine, FakeGeneration

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def user(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


RANGES: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.1}, "temperature", "between 0 and 2"),
    ({"temperature": -0.1}, "temperature", "between 0 and 2"),
    ({"temperature": "hot"}, "temperature", "expected a number, got a string"),
    ({"temperature": True}, "temperature", "expected a number, got true or false"),
    ({"temperature": 1e999}, "temperature", ""),
    ({"top_p": 1.5}, "top_p", "between 0 and 1"),
    ({"top_p": -1}, "top_p", "between 0 and 1"),
    ({"top_k": -2}, "top_k", "at least -1"),
    ({"top_k": 1.5}, "top_k", "expected a whole number"),
    ({"min_p": 2}, "min_p", "between 0 and 1"),
    ({"typical_p": 2}, "typical_p", "between 0 and 1"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"n": 129}, "n", "between 1 and 128"),
    ({"n": "2"}, "n", "expected a whole number"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -2}, "max_tokens", "at least 1, or -1 for no limit"),
    ({"min_tokens": -1}, "min_tokens", "at least 0"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "max_tokens"),
    ({"presence_penalty": 2.5}, "presence_penalty", "between -2 and 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "between -2 and 2"),
    ({"repeat_penalty": 0}, "repeat_penalty", "greater than 0"),
    ({"repetition_penalty": -1}, "repetition_penalty", "greater than 0"),
    ({"repeat_last_n": -2}, "repeat_last_n", "at least -1"),
    ({"dry_multiplier": -1}, "dry_multiplier", "between"),
    ({"dry_base": 0.5}, "dry_base", "between"),
    ({"dry_allowed_length": -1}, "dry_allowed_length", "at least 0"),
    ({"dry_penalty_last_n": -2}, "dry_penalty_last_n", "at least -1"),
    ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers", "1 to"),
    ({"dry_sequence_breakers": "x"}, "dry_sequence_breakers", "expected a list"),
    ({"xtc_probability": 2}, "xtc_probability", "between 0 and 1"),
    ({"xtc_threshold": -1}, "xtc_threshold", "between 0 and 1"),
    ({"mirostat": 3}, "mirostat", "between 0 and 2"),
    ({"mirostat_tau": -1}, "mirostat_tau", "between"),
    ({"mirostat_eta": 2}, "mirostat_eta", "between 0 and 1"),
    ({"seed": 2**63}, "seed", "between"),
    ({"seed": "x"}, "seed", "expected a whole number"),
    ({"priority": 2**40}, "priority", "between"),
    ({"user": 5}, "user", "expected a string"),
    ({"stream": "yes"}, "stream", "expected true or false"),
    ({"stream_options": []}, "stream_options", "expected an object"),
    ({"stop": ["a", ""]}, "stop", "not be empty"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": "x" * 5000}, "stop", "at most"),
    ({"stop": 5}, "stop", "expected a string or a list"),
    ({"stop": ["a", 5]}, "stop[1]", "expected a string"),
    ({"ignore_eos": 1}, "ignore_eos", "expected true or false"),
    ({"logit_bias": {"1000": 1}}, "logit_bias", "outside the vocabulary; it must be between 0 and 999"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "must be a number"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "must be a number"),
    ({"logit_bias": {"٣": 1}}, "logit_bias", "must be a number"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
    ({"logit_bias": {"5": "x"}}, "logit_bias", "expected a number"),
    ({"logit_bias": [5]}, "logit_bias", "expected an object"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "it must be text, json_object or json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "it is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", "missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        "response_format.json_schema.schema",
        "expected",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs.choice",
        "structured_outputs.regex says already",
    ),
    (
        {"structured_outputs": {"structural_tag": {}, "whitespace_pattern": "x"}},
        "structured_outputs.whitespace_pattern",
        "not support",
    ),
    ({"guided_json": {"type": "object"}, "grammar": 'start: "a"'}, "grammar", "guided_json says already"),
    ({"guided_choice": "a"}, "guided_choice", "expected a list"),
    ({"guided_regex": 5}, "guided_regex", "expected a string"),
]


@pytest.mark.parametrize(("fields", "param", "words"), RANGES)
@pytest.mark.parametrize("url", [CHAT, TEXT])
def test_wrong_values(
    client: Client, engine: FakeEngine, url: str, fields: dict[str, Any], param: str, words: str
) -> None:
    result = client.post(url, {"messages": MESSAGES, "prompt": "x", **fields})
    assert result.status == 400
    assert result.error["type"] == "invalid_request_error"
    assert result.error["param"] in (param, None if words == "" else param)
    assert words in result.error["message"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": None}, "messages", "at least one"),
        ({}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "expected a list, got a string"),
        ({"messages": ["hi"]}, "messages[0]", "expected an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
        (
            {"messages": [*MESSAGES, *MESSAGES, {"role": "bot", "content": "x"}]},
            "messages[2].role",
            "system, developer",
        ),
        ({"messages": [{"role": 5, "content": "x"}]}, "messages[0].role", "expected a string"),
        ({"messages": [{"role": None, "content": "x"}]}, "messages[0].role", "expected a string"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": user(None)}, "messages[0].content", "missing"),
        ({"messages": user(5)}, "messages[0].content", "expected a string or a list"),
        (
            {"messages": user([{"type": "image_url", "image_url": {"url": "x"}}])},
            "messages[0].content[0].type",
            "text only",
        ),
        ({"messages": user([{"text": "x"}])}, "messages[0].content[0].type", "text only"),
        ({"messages": user([{"type": "text"}])}, "messages[0].content[0].text", "missing"),
        ({"messages": user([{"type": "text", "text": 5}])}, "messages[0].content[0].text", "expected a string"),
        ({"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools[0].type", "function"),
        ({"messages": MESSAGES, "functions": [{"name": "f"}]}, "functions", "not support"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"messages": MESSAGES, "logprobs": True}, "logprobs", "not support"),
        ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs", "not support"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities", "not support"),
        ({"messages": user("REFUSE")}, "messages", "template refuses"),
        ({"messages": MESSAGES, "model": 5}, "model", "expected a string"),
    ],
)
def test_wrong_chats(client: Client, fields: dict[str, Any], param: str, words: str) -> None:
    result = client.post(CHAT, fields)
    assert result.status == 400
    assert (result.error["type"], result.error["param"]) == ("invalid_request_error", param)
    assert words in result.error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt[0]", "no token"),
        ({"prompt": ["a", 5]}, "prompt", "mixes"),
        ({"prompt": [5, [6]]}, "prompt", "mixes"),
        ({"prompt": 5}, "prompt", "expected a string or a list"),
        ({"prompt": [1.5]}, "prompt[0]", "expected"),
        (
            {"prompt": [1, 2, 1000]},
            "prompt[2]",
            "token id 1000 is outside the vocabulary; it must be between 0 and 999",
        ),
        ({"prompt": [1, -1]}, "prompt[1]", "outside the vocabulary"),
        ({"prompt": [2**70]}, "prompt[0]", "outside the vocabulary"),
        ({"prompt": [[1], [2, 5000]]}, "prompt[1][1]", "outside the vocabulary"),
        ({"prompt": [[1, "x"]]}, "prompt[0][1]", "expected a whole number"),
        ({"prompt": "x", "logprobs": 0}, "logprobs", "not support"),
        ({"prompt": "x", "logprobs": 5}, "logprobs", "not support"),
        ({"prompt": "x", "suffix": "end"}, "suffix", "not support"),
        ({"prompt": "x", "best_of": 3}, "best_of", "not support"),
        ({"prompt": "x", "echo": "yes"}, "echo", "expected true or false"),
        ({"prompt": ["x"] * 20, "n": 128}, "prompt", "at most"),
    ],
)
def test_wrong_completions(client: Client, fields: dict[str, Any], param: str, words: str) -> None:
    result = client.post(TEXT, fields)
    assert result.status == 400
    assert (result.error["type"], result.error["param"]) == ("invalid_request_error", param)
    assert words in result.error["message"]


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not valid JSON"),
        (b'{"messages": [}', "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b"[]", "expected an object, got a list"),
        (b'"x"', "expected an object, got a string"),
        (b'{"user": "\xff\xfe"}', "not valid UTF-8"),
        (b'{"unknown": "\xff\xfe"}', "not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        ('{"prompt": "x"}'.encode("utf-16"), "not valid UTF-8"),
        (DEEP, "expected an object, got a list"),
        (b'{"unknown": ' + DEEP + b"}", "nested too deeply"),
        (b'{"tools": ' + DEEP + b"}", ""),
        (b'{"messages": ' + DEEP + b"}", ""),
        (b'{"unknown": ' + b'{"a":' * 60_000 + b"1" + b"}" * 60_000 + b"}", "nested too deeply"),
    ],
)
@pytest.mark.parametrize("url", [CHAT, TEXT])
def test_bodies_that_are_no_request(client: Client, url: str, body: bytes, words: str) -> None:
    result = client.post(url, body)
    assert result.status == 400
    assert result.error["type"] == "invalid_request_error"
    assert words in result.error["message"]


def test_a_large_body_is_413(client: Client) -> None:
    result = client.post(CHAT, {"messages": user("x" * (1 << 20))})
    assert result.status == 413
    assert result.error["code"] == "request_too_large"
    assert "--max-body-bytes" in result.error["message"]


def test_a_large_body_without_a_length_is_413(client: Client) -> None:
    result = client.post(CHAT, b" " * ((1 << 20) + 1), headers={"Content-Length": ""})
    assert result.status == 413
    assert client.post(CHAT, {"messages": MESSAGES}, headers={"Content-Length": ""}).status == 200


def test_a_length_that_is_no_number_is_400(client: Client) -> None:
    assert client.post(CHAT, b"{}", headers={"Content-Length": "x"}).error["type"] == "invalid_request_error"


@pytest.mark.parametrize("url", [CHAT, TEXT])
@pytest.mark.parametrize("model", ["nope", ""])
def test_an_unknown_model_is_404(client: Client, url: str, model: str) -> None:
    result = client.post(url, {"model": model, "messages": MESSAGES, "prompt": "x"})
    assert result.status == 404
    assert (result.error["code"], result.error["param"]) == ("model_not_found", "model")
    assert "served models: fake, other" in result.error["message"]


def test_a_prompt_that_does_not_fit(client: Client) -> None:
    result = client.post(TEXT, {"prompt": [5] * N_CTX})
    assert result.status == 400
    assert result.error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("policy", ["error", "truncate_left"])
def test_a_chat_that_does_not_fit_names_its_messages(client: Client, policy: str) -> None:
    messages = [{"role": "user", "content": "x" * (N_CTX + 10)}]
    result = client.post("/v1/chat/completions", {"messages": messages, "context_policy": policy})
    assert (result.status, result.error["code"]) == (400, "context_length_exceeded")
    assert result.error["param"] == "messages"
    assert result.error["message"].startswith("messages: the chat has ")
    assert re.search(r"\b4\d{3} tokens", result.error["message"])


def test_an_engine_that_refuses_a_chat_at_its_end_names_the_messages(client: Client, engine: FakeEngine) -> None:
    engine.submit_errors = [
        ContextLengthExceeded("the prompt has 5000 tokens; one request may use 4096", param="prompt")
    ]
    error = client.post("/v1/chat/completions", {"messages": MESSAGES}).error
    assert error["param"] == "messages"
    assert error["message"] == "messages: the chat has 5000 tokens; one request may use 4096"


def test_one_of_several_prompts_that_does_not_fit_is_named(client: Client) -> None:
    error = client.post(TEXT, {"prompt": ["x", "y" * (N_CTX + 5)]}).error
    assert (error["param"], error["code"]) == ("prompt[1]", "context_length_exceeded")
    assert error["message"].startswith("prompt[1]: it has at least")


def test_a_full_queue_is_503_with_retry_after(client: Client, engine: FakeEngine) -> None:
    engine.submit_errors = [QueueFull("256 requests wait already", retry_after=2)]
    result = client.post(CHAT, {"messages": MESSAGES})
    assert result.status == 503
    assert result.headers["retry-after"] == "2"
    assert result.error["type"] == "overloaded_error"


def test_all_choices_are_submitted_or_none(client: Client, engine: FakeEngine) -> None:
    engine.hang = True
    engine.submit_errors = [None, None, QueueFull("full")]
    assert client.post(CHAT, {"messages": MESSAGES, "n": 3}).status == 503
    assert len(engine.generations) == 2
    assert all(generation.cancelled_at for generation in engine.generations)


def test_a_dead_engine_is_503(client: Client, engine: FakeEngine) -> None:
    engine.submit_errors = [EngineDead("the engine stopped: out of memory")]
    result = client.post(CHAT, {"messages": MESSAGES})
    assert (result.status, result.error["code"]) == (503, "engine_dead")
    assert result.headers["retry-after"]


def test_the_error_of_a_generation_is_the_response(client: Client, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 1, EngineDead("it stopped")
    result = client.post(CHAT, {"messages": MESSAGES, "n": 2})
    assert (result.status, result.error["message"]) == (503, "it stopped")
    assert not engine.running


@pytest.mark.parametrize("failure", [ValueError("/secret"), None])
def test_an_unexpected_error_of_a_generation_is_500(
    client: Client, engine: FakeEngine, failure: Exception | None
) -> None:
    engine.fail_after, engine.failure = 1, failure
    result = client.post(CHAT, {"messages": MESSAGES})
    assert (result.status, result.error["type"]) == (500, "server_error")
    assert b"secret" not in result.body


def test_a_request_cut_by_the_server_is_503(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: FakeGeneration) -> None:
        self.end(Finish(FinishReason.CANCELLED, Profile()))

    monkeypatch.setattr(FakeGeneration, "_step", cut)
    result = client.post(CHAT, {"messages": MESSAGES})
    assert (result.status, result.error["code"]) == (503, "shutting_down")


def test_an_unexpected_exception_is_logged_and_does_not_leak(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> str:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(engine, "render_chat", broken)
    with caplog.at_level(logging.ERROR):
        result = client.post(CHAT, {"messages": MESSAGES})
    assert (result.status, result.error["type"]) == (500, "server_error")
    assert b"secret" not in result.body
    assert "/secret/path" in caplog.text


def test_falcon_s_own_errors_have_the_same_shape(client: Client) -> None:
    missing = client.get("/v1/nothing")
    assert (missing.status, missing.error["code"]) == (404, "not_found")
    assert "/v1/nothing" in missing.error["message"]
    wrong = client.get(CHAT)
    assert (wrong.status, wrong.error["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["allow"]
    assert client.request("PUT", "/v1/models", b"", {}).error["type"] == "invalid_request_error"
