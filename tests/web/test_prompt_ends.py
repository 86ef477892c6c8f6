"""How the prompt of a chat ends, and what is kept of it: prefixes, prompts without an answer's beginning, tokens."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Client
from .fake_engine import N_CTX, FakeEngine

ASKED = {"role": "user", "content": "hi"}
BEGUN = {"role": "assistant", "content": "I am"}


def prompt_of(engine: FakeEngine) -> str:
    return engine.detokenize(list(engine.requests[-1].prompt))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [ASKED, BEGUN], "continue_final_message": True},
        {"messages": [ASKED, BEGUN], "continue_final_message": True, "add_generation_prompt": False},
        {"messages": [ASKED, BEGUN | {"prefix": True}]},
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "I am"}], "prefix": True}]},
    ],
)
def test_an_answer_goes_on_with_its_beginning(client: Client, engine: FakeEngine, body: dict[str, Any]) -> None:
    reply = client.post("/v1/chat/completions", body)
    assert reply.json["choices"][0]["message"]["content"] == "Hello wörld!"  # only what is new
    assert prompt_of(engine).endswith("<assistant>I am")
    assert engine.rendered[-1] == BEGUN  # no template sees how it is spelled


def test_a_prompt_may_end_with_the_last_message(client: Client, engine: FakeEngine) -> None:
    assert client.post("/v1/chat/completions", {"messages": [ASKED], "add_generation_prompt": False}).status == 200
    assert prompt_of(engine) == "<user>hi"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [ASKED], "continue_final_message": True}, "continue_final_message"),
        ({"messages": [BEGUN | {"prefix": True}, ASKED]}, "messages[0].prefix"),
        ({"messages": [ASKED | {"prefix": True}]}, "messages[0].prefix"),
        (
            {"messages": [ASKED, BEGUN], "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": None, "prefix": True}]}, "messages[1].prefix"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(client: Client, body: dict[str, Any], param: str) -> None:
    reply = client.post("/v1/chat/completions", body)
    assert (reply.status, reply.error["param"]) == (400, param)


def test_anthropic_s_last_turn_of_the_assistant_begins_the_answer(client: Client, engine: FakeEngine) -> None:
    body = {"model": "fake", "max_tokens": 5, "messages": [ASKED, BEGUN]}
    assert client.post("/v1/messages", body).json["content"][0]["text"] == "Hello wörld!"
    assert prompt_of(engine) == "<user>hi<assistant>I am"
    count = client.post("/v1/messages/count_tokens", body).json["input_tokens"]
    assert count == len(engine.requests[-1].prompt)


def test_the_template_is_shown_with_the_same_ends(client: Client) -> None:
    body = {"messages": [ASKED, BEGUN], "continue_final_message": True}
    assert client.post("/apply-template", body).json["prompt"] == "<user>hi<assistant>I am"
    tokens = client.post("/tokenize", body).json["count"]
    assert tokens == 1 + len("<user>hi<assistant>I am")


@pytest.mark.parametrize(
    ("more", "kept"), [({}, "defg"), ({"truncation_side": "right"}, "abc"), ({"truncation_side": "left"}, "defg")]
)
def test_tokens_are_kept_from_one_end(client: Client, engine: FakeEngine, more: dict[str, str], kept: str) -> None:
    body = {"prompt": "abcdefg", "truncate_prompt_tokens": 4, **more}
    reply = client.post("/v1/completions", body)
    assert prompt_of(engine) == kept  # the first of four is the beginning of the sequence
    assert reply.json["usage"]["prompt_tokens"] == 4


def test_a_long_prompt_fits_when_it_is_cut(client: Client, engine: FakeEngine) -> None:
    text = "x" * 3 * N_CTX
    chat = {"messages": [{"role": "user", "content": text}]}
    for path, body in (("chat/completions", chat), ("completions", {"prompt": text})):
        assert client.post(f"/v1/{path}", body).status == 400
        reply = client.post(f"/v1/{path}", body | {"truncate_prompt_tokens": -1, "max_tokens": 10})
        assert (reply.status, len(engine.requests[-1].prompt)) == (200, N_CTX - 10)
        refused = client.post(f"/v1/{path}", body | {"truncate_prompt_tokens": N_CTX + 1})
        assert (refused.status, refused.error["param"]) == (400, "truncate_prompt_tokens")


def test_who_asks_has_two_names(client: Client, engine: FakeEngine) -> None:
    body = {"prompt": "x", "safety_identifier": "ann"}
    client.post("/v1/completions", body)
    client.post("/v1/completions", body | {"user": "ben"})
    assert [request.user for request in engine.requests] == ["ann", "ben"]
