"""Tokens, templates and slots of a real model, as lm-eval and clients of llama-server ask for them."""

from __future__ import annotations

import pytest

from .support import NAME, ServerProcess

CHAT = [{"role": "user", "content": "Wie heißt <|im_end|> du? 🦙"}]
TEXT = "Once upon a time, 🦙 <|im_end|>"


def test_the_tokens_of_a_chat_are_those_it_is_answered_for(server: ServerProcess) -> None:
    counted = server.post("/tokenize", {"messages": CHAT}).json()
    reply = server.chat(CHAT, max_tokens=1)
    assert counted["count"] == reply["usage"]["prompt_tokens"] == len(counted["tokens"])
    prompt = server.post("/apply-template", {"messages": CHAT}).json()["prompt"]
    assert CHAT[0]["content"] in prompt and prompt.endswith("assistant\n")


@pytest.mark.parametrize("special", [True, False])
def test_there_and_back(server: ServerProcess, special: bool) -> None:
    tokens = server.post("/tokenize", {"content": TEXT, "parse_special": special, "with_pieces": True}).json()["tokens"]
    pieces = [one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"]) for one in tokens]
    assert b"".join(pieces).decode() == TEXT
    assert any(isinstance(one["piece"], list) for one in tokens), "no token is a part of a character"
    assert ("<|im_end|>" in [one["piece"] for one in tokens]) is special
    ids = [one["id"] for one in tokens]
    assert server.post("/detokenize", {"tokens": ids}).json()["prompt"] == TEXT


def test_what_a_remote_tokenizer_asks_for(server: ServerProcess) -> None:
    info = server.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and "im_start" in info["chat_template"]
    (eos,) = server.post("/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": [eos]}).json()["prompt"] == info["eos_token"]


def test_props_and_slots(server: ServerProcess) -> None:
    props = server.get("/props").json()
    assert props["model_alias"] == NAME and props["eos_token"] == "<|im_end|>"
    rows = server.get("/slots").json()
    assert len(rows) == props["total_slots"] and not any(row["is_processing"] for row in rows)
