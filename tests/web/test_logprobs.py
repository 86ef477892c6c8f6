"""Log-probabilities and token ids in answers, streamed and whole; fields about tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.types import TokenScore
from mullama.web.stream.told_tokens import TokenWish, picked

from .conftest import Client, Result
from .fake_engine import BOS, FakeEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def joined(answer: Result) -> dict[str, Any]:
    """What the chunks of a stream with one choice say together."""
    assert answer.events[-1] == "[DONE]" or answer.text.endswith("data: [DONE]\n\n")
    found: dict[str, Any] = {}
    for event in answer.events:
        if event == "[DONE]":
            continue
        for name in ("prompt_logprobs", "prompt_token_ids"):
            if name in event:
                found[name] = event[name]
        for choice in event["choices"]:
            text = choice.get("text", choice.get("delta", {}).get("content", ""))
            found["text"] = found.get("text", "") + (text or "")
            for name in ("prompt_logprobs", "prompt_token_ids"):
                if name in choice:
                    found[name] = choice[name]
            found["token_ids"] = found.get("token_ids", []) + choice.get("token_ids", [])
            for name, values in (choice.get("logprobs") or {}).items():
                if values is not None:
                    found.setdefault("logprobs", {}).setdefault(name, []).extend(values)
            found["finish_reason"] = choice["finish_reason"]
    return found


def test_a_chat_tells_them(client: Client, engine: FakeEngine) -> None:
    body = client.post(CHAT, {**HI, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}).json
    assert engine.requests[0].sampling.logprobs == 2
    content = body["choices"][0]["logprobs"]["content"]
    assert body["choices"][0]["logprobs"]["refusal"] is None
    assert [one["token"] for one in content] == ["Hel", "lo"]
    assert content[0]["logprob"] == -101 / 64
    assert content[0]["bytes"] == list(b"Hel")
    assert content[0]["top_logprobs"] == [
        {"token": "Hel", "logprob": -101 / 64, "bytes": [72, 101, 108]},
        {"token": "1", "logprob": -101 / 64 - 1, "bytes": [49]},
    ]
    alone = client.post(CHAT, {**HI, "logprobs": True}).json["choices"][0]["logprobs"]["content"]
    assert all(one["top_logprobs"] == [] for one in alone) and len(alone) == 4
    assert client.post(CHAT, {**HI, "logprobs": False, "top_logprobs": 0}).json["choices"][0]["logprobs"] is None


def test_a_completion_tells_them(client: Client) -> None:
    logprobs = client.post(TEXT, {"prompt": "ab", "logprobs": 2, "max_tokens": 2}).json["choices"][0]["logprobs"]
    assert logprobs == {
        "text_offset": [0, 3],
        "token_logprobs": [-101 / 64, -102 / 64],
        "tokens": ["Hel", "lo"],
        "top_logprobs": [{"Hel": -101 / 64, "1": -101 / 64 - 1}, {"lo": -102 / 64, "1": -102 / 64 - 1}],
    }
    none = client.post(TEXT, {"prompt": "ab", "logprobs": 0, "max_tokens": 1}).json["choices"][0]["logprobs"]
    assert none["top_logprobs"] == [{"Hel": -101 / 64}], "the token itself is always there"
    assert client.post(TEXT, {"prompt": "ab", "logprobs": False}).json["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_what_lm_eval_asks_for(client: Client, engine: FakeEngine, max_tokens: int) -> None:
    """Its loglikelihoods: several prompts as token ids, echoed, each with its log-probabilities."""
    body = {"prompt": [[5, 97, 98], [6, 99]], "temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234}
    choices = client.post(TEXT, {**body, "echo": True}).json["choices"]
    assert [request.sampling.prompt_logprobs for request in engine.requests] == [1, 1]
    logprobs = choices[0]["logprobs"]
    assert logprobs["tokens"][:3] == ["\x05", "a", "b"] and len(logprobs["tokens"]) == 3 + max_tokens
    assert logprobs["token_logprobs"][:3] == [None, -97 / 64, -98 / 64]
    assert logprobs["top_logprobs"][:3] == [None, {"a": -97 / 64}, {"b": -98 / 64}]
    assert logprobs["text_offset"] == list(range(3 + max_tokens))
    assert choices[0]["text"] == "\x05ab" + "Hel" * max_tokens
    assert choices[1]["logprobs"]["tokens"][:2] == ["\x06", "c"]
    assert choices[0]["finish_reason"] == "length"


def test_a_prompt_as_vllm_spells_it(client: Client) -> None:
    choice = client.post(TEXT, {"prompt": [5, 97], "prompt_logprobs": 2, "max_tokens": 1}).json["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "97": {"logprob": -97 / 64, "rank": 1, "decoded_token": "a"},
            "98": {"logprob": -97 / 64 - 1, "rank": 2, "decoded_token": "1"},
        },
    ]
    assert choice["logprobs"] is None and choice["text"] == "Hel"
    chat = client.post(CHAT, {**HI, "prompt_logprobs": 0}).json
    assert chat["prompt_logprobs"][0] is None and all(len(one) == 1 for one in chat["prompt_logprobs"][1:])
    assert "prompt_logprobs" not in chat["choices"][0]


def test_token_ids(client: Client, engine: FakeEngine) -> None:
    choice = client.post(TEXT, {"prompt": "ab", "return_token_ids": True, "max_tokens": 2}).json["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([BOS, 97, 98], [101, 102])
    assert engine.requests[0].sampling.logprobs is None
    chat = client.post(CHAT, {**HI, "return_token_ids": True, "max_tokens": 2}).json
    assert chat["choices"][0]["token_ids"] == [101, 102]
    assert chat["prompt_token_ids"] == list(engine.requests[1].prompt)
    named = client.post(TEXT, {"prompt": "ab", "logprobs": 1, "return_tokens_as_token_ids": True, "max_tokens": 1}).json
    assert named["choices"][0]["logprobs"]["top_logprobs"] == [{"token_id:101": -101 / 64}]


@pytest.mark.parametrize("holds_back", [False, True])
@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, {**HI, "logprobs": True, "top_logprobs": 3}),
        (CHAT, {**HI, "logprobs": True, "return_token_ids": True, "prompt_logprobs": 1}),
        (TEXT, {"prompt": "abc", "logprobs": 2}),
        (TEXT, {"prompt": "abc", "logprobs": 2, "echo": True}),
        (TEXT, {"prompt": "abc", "logprobs": 2, "echo": True, "max_tokens": 0}),
        (TEXT, {"prompt": "abc", "prompt_logprobs": 2, "return_token_ids": True}),
    ],
    ids=str,
)
def test_a_stream_tells_the_same(
    client: Client, engine: FakeEngine, url: str, body: dict[str, Any], holds_back: bool
) -> None:
    engine.holds_back = holds_back
    whole = client.post(url, body).json
    choice = whole["choices"][0]
    told = joined(client.post(url, {**body, "stream": True}))
    assert told["text"] == (choice["text"] if url == TEXT else choice["message"]["content"])
    assert told["finish_reason"] == choice["finish_reason"]
    assert told["token_ids"] == choice.get("token_ids", [])
    for name in ("prompt_logprobs", "prompt_token_ids"):
        assert told.get(name) == whole.get(name, choice.get(name))
    logprobs = {name: values for name, values in (choice["logprobs"] or {}).items() if values is not None}
    assert told.get("logprobs", {}) == logprobs


pieces = st.binary(max_size=6) | st.text(max_size=4).map(str.encode)
scores = st.builds(
    TokenScore,
    st.integers(0, 50),
    pieces,
    st.floats(max_value=0.0),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 50), pieces, st.floats(max_value=0.0)), max_size=4).map(tuple),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(scores, max_size=12), st.lists(st.integers(0, 12)), st.booleans(), st.integers(0, 4))
def test_any_split_tells_the_same(tokens: list[TokenScore], cuts: list[int], as_ids: bool, k: int) -> None:
    from mullama.web.stream.told_tokens import width

    wish = TokenWish(n_top=k, ids=True, as_ids=as_ids)
    chat, text = wish.of_chat(tokens), wish.of_text(tokens, 0)
    parts = {"content": [], "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    ids: list[int] = []
    at = offset = 0
    for cut in [*sorted(cuts), len(tokens)]:
        some = tokens[at:cut]
        at = max(at, cut)
        parts["content"] += wish.of_chat(some)["logprobs"]["content"]
        told = wish.of_text(some, offset)
        offset += width(some)
        ids += told["token_ids"]
        for name, values in told["logprobs"].items():
            parts[name] += values
    assert parts.pop("content") == chat["logprobs"]["content"]
    assert parts == text["logprobs"] and ids == text["token_ids"] == chat["token_ids"]
    assert all(one >= -9999.0 for one in text["logprobs"]["token_logprobs"])


def test_tokens_that_are_no_text(client: Client) -> None:
    half = TokenScore(1, b"\xf0\x9f", -1.0, 1, ((2, b"\x98", -1.5),))
    wish = TokenWish(n_top=1)
    assert wish.of_chat([half])["logprobs"]["content"][0]["token"] == "\\xf0\\x9f"
    assert wish.of_chat([half])["logprobs"]["content"][0]["bytes"] == [0xF0, 0x9F]
    told = wish.of_text([half, TokenScore(2, b"\x98\x80", -1.0, 1), TokenScore(3, b"!", -1.0, 1)], 0)["logprobs"]
    assert told["tokens"] == ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"]
    assert told["text_offset"] == [0, 1, 1], "characters are counted where they begin"


def test_the_likelier_of_two_tokens_with_one_text_counts() -> None:
    wish = TokenWish(n_top=2)
    two = TokenScore(7, b"a", -3.0, 3, ((8, b"a", -1.0), (9, b"b", -2.0)))
    assert wish.of_text([two], 0)["logprobs"]["top_logprobs"] == [{"a": -1.0, "b": -2.0}]


def test_the_best_of_several(client: Client, engine: FakeEngine) -> None:
    body = client.post(TEXT, {"prompt": "ab", "n": 2, "best_of": 4, "max_tokens": 1}).json
    assert len(engine.requests) == 4 and engine.requests[0].sampling.logprobs == 0
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 4
    assert len({request.sampling.seed for request in engine.requests}) in (1, 4)

    def choice(*logprobs: float) -> list[TokenScore]:
        return [TokenScore(1, b"a", one, 1) for one in logprobs]

    four = [choice(-1.0, -1.0), choice(-0.1, -0.1, -0.1, -9.0), choice(-0.5), choice()]
    assert picked(four, 4, 4) == [0, 1, 2, 3]
    assert picked(four, 4, 2) == [3, 2]
    assert picked([*four, *four], 4, 1) == [3, 7]


def test_fields_about_tokens(client: Client, engine: FakeEngine) -> None:
    body = {"stop_token_ids": [7, 8, 7], "bad_words": ["x y"], "allowed_token_ids": [9, 7]}
    client.post(TEXT, {"prompt": "ab", **body, "logprobs_mode": "processed_logprobs"})
    sampling = engine.requests[0].sampling
    assert sampling.stop_token_ids == (7, 8)
    assert sampling.bad_words == ("x y",)
    assert sampling.allowed_token_ids == (9, 7)
    assert sampling.logprobs_mode == "processed"
    client.post(CHAT, HI)
    assert engine.requests[1].sampling.logprobs_mode == "raw"


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": 3}, "logprobs"),
        (CHAT, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": True}, "prompt_logprobs"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (TEXT, {"logprobs": 21}, "logprobs"),
        (TEXT, {"logprobs": True}, "logprobs"),
        (TEXT, {"logprobs_mode": "raw_logits"}, "logprobs_mode"),
        (TEXT, {"allowed_token_ids": []}, "allowed_token_ids"),
        (TEXT, {"allowed_token_ids": [1000]}, "allowed_token_ids[0]"),
        (TEXT, {"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        (TEXT, {"bad_words": [" "]}, "bad_words"),
        (TEXT, {"bad_words": ["x"] * 257}, "bad_words"),
        (TEXT, {"n": 3, "best_of": 2}, "best_of"),
        (TEXT, {"best_of": 2, "stream": True}, "best_of"),
        (TEXT, {"best_of": 1000}, "best_of"),
        (TEXT, {"prompt": [[5] * 4000] * 4, "prompt_logprobs": 20}, "prompt_logprobs"),
    ],
    ids=str,
)
def test_what_is_refused(client: Client, engine: FakeEngine, url: str, body: dict[str, Any], param: str) -> None:
    base: dict[str, Any] = HI if url == CHAT else {"prompt": "ab"}
    answer = client.post(url, {**base, **body})
    assert answer.status == 400 and answer.json["error"]["param"] == param
    assert engine.requests == []
