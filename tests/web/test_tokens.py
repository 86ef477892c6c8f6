"""Tokens, templates, properties and slots, as clients of llama-server, vLLM and lm-eval ask for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Client
from .fake_engine import BOS, N_CTX, FakeEngine, FakePlanning

CHAT = [{"role": "user", "content": "Hi"}]
RENDERED = "<user>Hi<assistant>"


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"content": "ab"}, ids("ab")),
        ({"content": "ab", "add_special": True}, [BOS, *ids("ab")]),
        ({"content": ""}, []),
        ({"content": ["a", 7, "b"]}, [97, 7, 98]),
        ({"content": ["a", 7, "b"], "add_special": True}, [BOS, 97, 7, 98]),
        ({"content": [7, "b"], "add_special": True}, [7, 98]),
        ({"content": []}, []),
        ({"prompt": "ab"}, [BOS, *ids("ab")]),
        ({"prompt": "ab", "add_special_tokens": False}, ids("ab")),
        ({"messages": CHAT}, [BOS, *ids(RENDERED)]),
        ({"messages": CHAT, "add_generation_prompt": False}, [BOS, *ids("<user>Hi")]),
        ({"messages": CHAT, "model": "other"}, [BOS, *ids(RENDERED)]),
    ],
)
def test_tokenize(client: Client, path: str, body: dict[str, Any], tokens: list[int]) -> None:
    result = client.post(path, body)
    assert result.status == 200
    assert result.json == {"tokens": tokens, "count": len(tokens), "max_model_len": N_CTX}


def test_long_texts_are_worked_out_in_the_pool(client: Client) -> None:
    assert client.post("/tokenize", {"content": "a" * 5000}).json["count"] == 5000
    assert client.post("/tokenize", {"content": ["a" * 5000, 98]}).json["count"] == 5001
    long = [{"role": "user", "content": "b" * 5000}]
    assert client.post("/tokenize", {"messages": long}).json["count"] == 1 + len(RENDERED) + 4998
    assert client.post("/detokenize", {"tokens": ids("c" * 5000)}).json["content"] == "c" * 5000


def test_a_chat_has_the_tokens_that_it_is_answered_for(client: Client, engine: FakeEngine) -> None:
    tokens = client.post("/tokenize", {"messages": CHAT}).json["tokens"]
    client.post("/v1/chat/completions", {"messages": CHAT})
    assert list(engine.requests[-1].prompt) == tokens


def test_pieces(client: Client) -> None:
    result = client.post("/tokenize", {"content": ["a", 900], "with_pieces": True, "return_token_strs": True}).json
    assert result["tokens"] == [{"id": 97, "piece": "a"}, {"id": 900, "piece": [0xC3]}]
    assert result["token_strs"] == ["a", "�"]
    assert result["count"] == 2


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "content", "none of them is there"),
        ({"content": "a", "prompt": "b"}, "content", "content and prompt are both there"),
        ({"content": 3}, "content", "expected a string or a list"),
        ({"content": ["a", 1000]}, "content[1][0]", "between 0 and 999"),
        ({"content": [[1]]}, "content[0]", "got a list"),
        ({"content": [1] * 4097}, "content", "at most 4096 parts"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": CHAT, "chat_template": "{{x}}"}, "chat_template", "leave the field out"),
        ({"messages": CHAT, "chat_template": "x"}, "chat_template", "leave the field out"),
    ],
)
def test_what_is_wrong_is_named(client: Client, body: dict[str, Any], param: str, words: str) -> None:
    result = client.post("/tokenize", body)
    assert result.status == 400
    assert result.error["param"] == param
    assert words in result.error["message"]


def test_unknown_models_are_not_found(client: Client) -> None:
    for path, body in (
        ("/tokenize", {"content": "a"}),
        ("/detokenize", {"tokens": [1]}),
        ("/apply-template", {"messages": CHAT}),
    ):
        assert client.post(path, {**body, "model": "none"}).status == 404, path
    for path in ("/tokenizer_info", "/props", "/slots"):
        assert client.get(path, query="model=none").status == 404, path


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_detokenize_gives_back_what_was_tokenised(client: Client, path: str) -> None:
    tokens = client.post("/tokenize", {"prompt": "ab"}).json["tokens"]
    assert client.post(path, {"tokens": tokens}).json == {"content": "\x01ab", "prompt": "\x01ab"}
    assert client.post(path, {"tokens": []}).json["content"] == ""
    assert client.post(path, {}).error["param"] == "tokens"
    assert client.post(path, {"tokens": [5, -1]}).error["param"] == "tokens[1]"
    assert client.post(path, {"tokens": ["a"]}).error["param"] == "tokens[0]"


def test_apply_template(client: Client, engine: FakeEngine) -> None:
    assert client.post("/apply-template", {"messages": CHAT}).json == {"prompt": RENDERED}
    plain = client.post("/apply-template", {"messages": CHAT, "add_generation_prompt": False})
    assert plain.json == {"prompt": "<user>Hi"}
    assert client.post("/apply-template", {}).error["param"] == "messages"
    tools = [{"type": "function", "function": {"name": "f"}}]
    more = {"tools": tools, "chat_template_kwargs": {"a": 1}}
    assert client.post("/apply-template", {"messages": CHAT, **more}).status == 200
    assert json.loads(engine.asks[-1].tools) == tools and json.loads(engine.asks[-1].arguments) == {"a": 1}


def test_tokenizer_info(client: Client) -> None:
    info = client.get("/tokenizer_info").json
    assert info["bos_token"] == "\x01" and info["eos_token"] is None
    assert info["model_max_length"] == N_CTX and info["vocab_size"] == 1000 and info["chat_template"] == "{{x}}"


def test_props(client: Client) -> None:
    props = client.get("/props").json
    assert props["total_slots"] == 4 and props["model_alias"] == "fake" and props["is_sleeping"] is False
    assert props["default_generation_settings"]["n_ctx"] == N_CTX
    assert props["default_generation_settings"]["params"]["top_k"] == 40
    assert props["model_path"] == "fake.gguf"  # the caller is an operator: loopback, no keys


class BusyPlanning(FakePlanning):
    _engine: Busy

    def snapshot(self) -> dict[str, Any]:
        row = {"tenant": None, "prompt_tokens": 9, "prompt_tokens_done": 9, "kv_cache_hit": 4}
        row |= {"tokens_left": 5, "completion_tokens": 2}
        return {
            "policy": "fcfs",
            "waiting": [],
            "running": [{"id": f"r{i}", "slot": i, **row} for i in self._engine.busy],
        }


class Busy(FakeEngine):
    busy: range = range(0)

    def __init__(self) -> None:
        super().__init__()
        self.planning = BusyPlanning(self)


@pytest.fixture
def engine() -> Busy:
    return Busy()


def test_slots(client: Client, engine: Busy) -> None:
    assert [row["is_processing"] for row in client.get("/slots").json] == [False] * 4
    engine.busy = range(1, 3)
    rows = client.get("/slots").json
    assert [row["is_processing"] for row in rows] == [False, True, True, False]
    assert rows[1]["id_task"] == "r1" and rows[1]["n_prompt_tokens_cache"] == 4
    assert rows[1]["next_token"] == [{"has_next_token": True, "n_remain": 5, "n_decoded": 2}]
    assert client.get("/slots", query="fail_on_no_slot=1").status == 200
    engine.busy = range(4)
    assert client.get("/slots").status == 200
    assert client.get("/slots", query="fail_on_no_slot=1").status == 503


def test_paths_without_their_prefix(client: Client) -> None:
    assert client.get("/models").json == client.get("/v1/models").json
    assert client.get("/v1/health").json == client.get("/health").json
    with_prefix, without = (client.post(f"{prefix}/chat/completions", {"messages": CHAT}) for prefix in ("/v1", ""))
    assert with_prefix.json["choices"] == without.json["choices"]
