"""``/api``: bodies, answers, lines and errors as Ollama's clients know them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mullama.errors import QueueFull
from mullama.models.store.entry import Entry
from mullama.models.store.store import Store

from .conftest import Client, Result
from .fake_engine import BOS, FakeEngine

HI = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "fake", "messages": HI}
TEXT = {"model": "fake", "prompt": "Hi"}


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.headers["content-type"].startswith("application/x-ndjson")
    assert result.body.endswith(b"\n")
    return [json.loads(line) for line in result.body.splitlines()]


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["message"]["content"] if "message" in answer else answer["response"]
    return text


@pytest.mark.parametrize(("path", "body"), [("/api/chat", CHAT), ("/api/generate", TEXT)])
def test_streamed_and_whole(client: Client, path: str, body: dict[str, Any]) -> None:
    whole = client.post(path, {**body, "stream": False}).json
    assert text_of(whole) == "Hello wörld!"
    found = lines(client.post(path, body))
    assert [one["done"] for one in found] == [False] * (len(found) - 1) + [True]
    assert "".join(map(text_of, found)) == "Hello wörld!"
    for last in (whole, found[-1]):
        assert last["model"] == "fake" and last["done_reason"] == "stop" and last["created_at"].endswith("Z")
        assert last["prompt_eval_count"] == 1 + len("<user>Hi<assistant>") and last["eval_count"] == 4
        assert last["total_duration"] > 0 and last["load_duration"] >= 0
        assert {"prompt_eval_duration", "eval_duration"} <= set(last)
    short = client.post(path, {**body, "stream": False, "options": {"num_predict": 1}}).json
    assert short["done_reason"] == "length" and text_of(short) == "Hel"


def test_options_reach_the_engine(client: Client, engine: FakeEngine) -> None:
    options = {"temperature": 0.1, "top_k": 3, "top_p": 0.4, "min_p": 0.2, "seed": 7, "stop": ["x"], "num_predict": 9}
    loading = {"num_ctx": 8192, "num_gpu": 1, "num_thread": 2, "num_batch": 64, "num_keep": 4}
    client.post("/api/chat", {**CHAT, "options": {**options, **loading, "repeat_penalty": 1.5}})
    sampling = engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.1, 3, 0.4, 0.2)
    assert (sampling.seed, sampling.stop, sampling.max_tokens, sampling.repeat_penalty) == (7, ("x",), 9, 1.5)
    client.post("/api/chat", {**CHAT, "options": {"num_predict": -1}})
    assert engine.requests[-1].sampling.max_tokens is None


def test_generate_takes_a_system_message_or_a_raw_prompt(client: Client, engine: FakeEngine) -> None:
    client.post("/api/generate", {**TEXT, "system": "Be kind."})
    assert engine.rendered == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    client.post("/api/generate", {**TEXT, "raw": True})
    assert list(engine.requests[-1].prompt) == [BOS, ord("H"), ord("i")]
    wrong = client.post("/api/generate", {**TEXT, "raw": True, "system": "s"})
    assert wrong.status == 400 and "a raw prompt" in wrong.json["error"]


@pytest.mark.parametrize(("path", "body"), [("/api/chat", {"messages": []}), ("/api/generate", {})])
def test_without_a_prompt_a_model_is_loaded_or_let_go(
    client: Client, services: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    told: list[tuple[str, float]] = []
    monkeypatch.setattr(services.models, "set_keep_alive", lambda name, seconds: told.append((name, seconds)))
    found = client.post(path, {"model": "fake", "keep_alive": "5m", "stream": False, **body}).json
    assert found["done"] is True and found["done_reason"] == "load" and text_of(found) == ""
    (found,) = lines(client.post(path, {"model": "fake", "keep_alive": 0, **body}))
    assert found["done_reason"] == "unload"
    assert told == [("fake", 300), ("fake", 0)]


def test_a_name_may_have_the_tag_latest(client: Client, engine: FakeEngine) -> None:
    assert client.post("/api/chat", {**CHAT, "model": "fake:latest", "stream": False}).json["model"] == "fake"
    assert client.post("/api/chat", {**CHAT, "model": "fake:7b"}).status == 404


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/chat", {"messages": HI}, "model: it is missing"),
        ("/api/chat", {**CHAT, "tools": [{"type": "x"}]}, "tools[0].type: 'x' is not built"),
        ("/api/chat", {**CHAT, "format": "xml"}, "format: it must be json or a JSON schema"),
        ("/api/chat", {**CHAT, "think": "colossal"}, "think: 'colossal' is not known"),
        ("/api/chat", {"model": "fake", "messages": [{"role": "user", "images": ["x"]}]}, "messages[0].images"),
        ("/api/chat", {"model": "fake", "messages": [{"role": "king", "content": "x"}]}, "'king' is not a role"),
        ("/api/chat", {**CHAT, "options": {"temperature": 9}}, "options.temperature"),
        ("/api/chat", {**CHAT, "options": {"num_predict": 0}}, "options.num_predict"),
        ("/api/chat", {**CHAT, "options": {"top_k": "a"}}, "options.top_k: expected a whole number"),
        ("/api/generate", {**TEXT, "suffix": "x"}, "suffix"),
        ("/api/generate", {**TEXT, "context": [1]}, "/api/chat takes the messages"),
        ("/api/generate", {**TEXT, "keep_alive": "soon"}, "soon"),
    ],
)
def test_what_is_wrong_is_one_line(client: Client, path: str, body: Any, words: str) -> None:
    result = client.post(path, body)
    assert result.status == 400 and set(result.json) == {"error"}
    assert words in result.json["error"]


def test_an_error_in_a_stream_is_a_line(client: Client, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 2, QueueFull("no more")
    assert lines(client.post("/api/chat", CHAT))[-1] == {"error": "no more"}


def test_a_silent_stream_has_no_lines_that_say_nothing(client: Client, engine: FakeEngine, services: Any) -> None:
    services.ping_seconds, engine.first_delay = 0.02, 0.09
    assert [text_of(one) for one in lines(client.post("/api/chat", CHAT))] == ["Hel", "lo", " wörld", "!", ""]


def test_models(client: Client) -> None:
    rows = client.get("/api/tags").json["models"]
    assert [row["name"] for row in rows][:2] == ["fake", "other"]
    assert rows[0]["details"]["family"] == "fake" and rows[0]["details"]["parameter_size"] == "1M"
    running = client.get("/api/ps").json["models"]
    assert [row["name"] for row in running] == ["fake", "other"] and running[0]["context_length"] == 4096
    assert running[0]["expires_at"].endswith("Z")
    shown = client.post("/api/show", {"model": "fake:latest"}).json
    assert shown["template"] == "{{x}}" and shown["model_info"]["fake.context_length"] == 4096
    assert shown["capabilities"] == ["completion"]
    assert client.post("/api/show", {"name": "fake"}).status == 200
    assert client.post("/api/show", {"model": "none"}).status == 404
    assert set(client.get("/api/version").json) == {"version"}


@pytest.mark.parametrize("name", ["push", "create"])
def test_what_is_not_built_says_so(client: Client, name: str) -> None:
    result = client.post(f"/api/{name}", {"model": "fake"})
    assert result.status == 501 and "does not support" in result.json["error"]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one model, which the routes see."""
    data = b"weights"
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path))
    store, sha256 = Store(), hashlib.sha256(data).hexdigest()
    store.make_folders()
    store.blob_path(sha256).write_bytes(data)
    store.write_entry(
        Entry(
            key="small",
            source="pypi",
            locations=("small.gguf",),
            filename="small.gguf",
            sha256=sha256,
            size=len(data),
            license=None,
            pulled_at="2026-11-30T00:00:00Z",
        )
    )
    return store


def test_copy_and_delete(client: Client, stored: Store, services: Any) -> None:
    assert client.post("/api/copy", {"source": "small:latest", "destination": "other-name"}).status == 200
    assert {entry.key for entry in stored.entries()} == {"small", "other-name"}
    services.models.get("fake").reference = "small"
    busy = client.request("DELETE", "/api/delete", b'{"model": "small"}', {"Content-Type": "application/json"})
    assert busy.status == 409 and "unload it first" in busy.json["error"]
    services.models.get("fake").reference = ""
    gone = client.request("DELETE", "/api/delete", b'{"model": "small:latest"}', {"Content-Type": "application/json"})
    assert gone.status == 200 and {entry.key for entry in stored.entries()} == {"other-name"}
    none = client.request("DELETE", "/api/delete", b'{"model": "small"}', {"Content-Type": "application/json"})
    assert none.status == 404


TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}]


def test_thoughts_and_calls(client: Client, engine: FakeEngine) -> None:
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
    engine.reply = ["<think>Hm", "m.</think>Well", call[:30], call[30:], call]
    asked = {**CHAT, "tools": TOOLS, "think": True}
    whole = client.post("/api/chat", {**asked, "stream": False}).json["message"]
    wanted = {"name": "get_weather", "arguments": {"city": "Rome"}}
    assert whole["thinking"] == "Hmm." and whole["content"] == "Well"
    assert [one["function"] for one in whole["tool_calls"]] == [wanted] * 2
    lines = [json.loads(line) for line in client.post("/api/chat", asked).body.splitlines()]
    assert "".join(line["message"].get("thinking", "") for line in lines) == "Hmm."
    assert "".join(line["message"]["content"] for line in lines) == "Well"
    calls = [one["function"] for line in lines for one in line["message"].get("tool_calls", ())]
    assert calls == [wanted] * 2 and lines[-1]["done"] and not any(line["done"] for line in lines[:-1])


def test_thinking_may_be_switched_off(client: Client, engine: FakeEngine) -> None:
    engine.thinks, engine.reply = True, ["<think>Hm.</think>", "Well"]
    message = client.post("/api/chat", {**CHAT, "think": False, "stream": False}).json["message"]
    assert message == {"role": "assistant", "content": "Well"} and not engine.asks[-1].thinks
    text = client.post("/api/generate", {**TEXT, "stream": False, "think": "low"}).json
    assert (text["thinking"], text["response"]) == ("Hm.", "Well")
    assert json.loads(engine.asks[-1].arguments) == {"reasoning_effort": "low"}


def test_calls_and_results_reach_the_template(client: Client, engine: FakeEngine) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    more = [
        {"role": "assistant", "content": "", "tool_calls": [call], "thinking": "hm"},
        {"role": "tool", "tool_name": "get_weather", "content": "sun"},
    ]
    body = {**CHAT, "tools": TOOLS, "messages": [*CHAT["messages"], *more]}
    assert client.post("/api/chat", body).status == 200
    one, two = engine.rendered[-2:]
    assert one["tool_calls"][0]["function"]["arguments"] == '{"city":"Rome"}' and one["reasoning_content"] == "hm"
    assert two == {"role": "tool", "content": "sun", "name": "get_weather"}
