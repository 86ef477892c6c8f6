"""Context policies over HTTP: what reaches the engine, and that the response says what was dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import openai
import pytest
from docs_support import ROOT, blocks, names

from mullama.config import ServeConfig
from mullama.web.openai.chunks import ChunkFormat
from mullama.web.openai.context_policy import ContextPolicy
from mullama.web.services import Services
from mullama.web.stream.event_stream import EventStream

from .conftest import Client, Live, Result
from .fake_engine import BOS, FakeEngine
from .test_direct import Door, group_of, raw_response
from .test_live import sdk

Start = Callable[..., Live]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
API = ROOT / "docs" / "api.md"
N_CTX = 100
SYSTEM = {"role": "system", "content": "s" * 2}
#: Each user message of the fake template has 6 + 4 tokens, each reply 11 + 9.
TURNS = [
    message
    for turn in range(4)
    for message in ({"role": "user", "content": f"u{turn}.."}, {"role": "assistant", "content": f"reply {turn}.."})
]
QUESTION = {"role": "user", "content": "u4.."}
MESSAGES = [SYSTEM, *TURNS, QUESTION]
N_WHOLE = 1 + 10 + 4 * 30 + 10 + 11
FIELDS: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 10}  # so the prompt may have 90 tokens
TOKENS = list(range(100, 250))


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.info = replace(engine.info, n_ctx=N_CTX)
    return engine


def parts(result: Result, stream: bool) -> tuple[Any, Any]:
    """The ``context`` of a response (None without), and the rest of what matters: text, usage."""
    assert result.status == 200, result.body
    if not stream:
        body = result.json
        choice = body["choices"][0]
        return body.get("context"), (choice.get("text") or choice["message"]["content"], body["usage"])
    *chunks, last, done = result.events
    assert done == "[DONE]"
    assert not any("context" in chunk for chunk in (*chunks[1:], last)), "only the first chunk says it"
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)
    return chunks[0].get("context"), (text, last["usage"])


def post(client: Client, url: str, stream: bool, **fields: Any) -> Result:
    return client.post(url, {**fields, "stream": stream, "stream_options": {"include_usage": True}})


streams = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
urls = pytest.mark.parametrize("url", [CHAT, TEXT], ids=["chat", "text"])


def test_the_chat_is_as_long_as_it_is_meant_to_be(client: Client, engine: FakeEngine) -> None:
    engine.info = replace(engine.info, n_ctx=4096)
    client.post(CHAT, FIELDS)
    assert len(engine.requests[0].prompt) == N_WHOLE > N_CTX


@streams
@pytest.mark.parametrize(
    ("policy", "kept", "span"),
    [
        ("truncate_left", [SYSTEM, *TURNS[6:], QUESTION], [1, 7]),
        ("truncate_middle", [SYSTEM, *TURNS[:2], QUESTION], [3, 9]),
    ],
)
def test_a_chat_is_cut_between_turns(
    client: Client, engine: FakeEngine, stream: bool, policy: str, kept: list[Any], span: list[int]
) -> None:
    n_kept = 1 + 10 + 30 + 10 + 11
    result = post(client, CHAT, stream, **FIELDS, context_policy=policy)
    context, (text, usage) = parts(result, stream)
    assert engine.rendered == kept
    assert list(engine.requests[0].prompt) == engine.tokenize(engine.render_chat(json.dumps(kept).encode()))
    assert context == {
        "policy": policy,
        "prompt_tokens_before": N_WHOLE,
        "prompt_tokens": n_kept,
        "dropped_tokens": 90,
        "dropped_messages": 6,
        "dropped_message_range": span,
    }
    assert result.headers["x-context-dropped"] == "90"
    assert text == "Hello wörld!"
    assert usage["prompt_tokens"] == n_kept


@pytest.mark.parametrize(
    ("max_tokens", "num_dropped"),
    [(1, 4), (8, 4), (9, 6), (38, 6), (39, 8), (4000, 8), (None, 8)],
)
def test_the_completion_has_its_room(
    client: Client, engine: FakeEngine, max_tokens: int | None, num_dropped: int
) -> None:
    """92 tokens are left without two turns, 62 without three, 32 without any; more than half is never kept free."""
    fields = FIELDS | {"max_tokens": max_tokens, "context_policy": "truncate_left"}
    expected = N_WHOLE - 15 * num_dropped
    context = client.post(CHAT, fields).json["context"]
    assert context["dropped_messages"] == num_dropped
    assert context["prompt_tokens"] == len(engine.requests[0].prompt) == expected


def test_messages_keep_all_they_had(client: Client, engine: FakeEngine) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    last = [
        {"role": "user", "name": "ann", "content": "ü"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    assert client.post(CHAT, {"messages": [*TURNS, *last], "context_policy": "truncate_left"}).status == 200
    last[2]["name"] = "f"  # some templates name the function that a result is of
    assert engine.rendered == last


@streams
@pytest.mark.parametrize(
    ("policy", "prompt", "kept", "span"),
    [
        ("truncate_left", TOKENS, TOKENS[60:], [0, 60]),
        ("truncate_left", [BOS, *TOKENS], [BOS, *TOKENS[61:]], [1, 62]),
        ("truncate_left", "a" * 60 + "b" * 89, [BOS] + [98] * 89, [1, 61]),
        ("truncate_middle", TOKENS, TOKENS[:45] + TOKENS[105:], [45, 105]),
        ("truncate_middle", "a" * 60 + "b" * 89, [BOS] + [97] * 44 + [98] * 45, [45, 105]),
    ],
)
def test_a_completion_is_cut_between_tokens(
    client: Client, engine: FakeEngine, stream: bool, policy: str, prompt: Any, kept: list[int], span: list[int]
) -> None:
    result = post(client, TEXT, stream, prompt=prompt, max_tokens=10, context_policy=policy)
    context, (text, usage) = parts(result, stream)
    assert list(engine.requests[0].prompt) == kept
    n_dropped = span[1] - span[0]
    assert context == {
        "policy": policy,
        "prompt_tokens_before": 90 + n_dropped,
        "prompt_tokens": 90,
        "dropped_tokens": n_dropped,
        "dropped_token_range": span,
    }
    assert result.headers["x-context-dropped"] == str(n_dropped)
    assert text == "Hello wörld!"
    assert usage["prompt_tokens"] == 90


def test_without_a_bos_of_the_vocabulary_no_first_token_is_special(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "tokenize", lambda text, **_: [ord(c) for c in text])
    client.post(TEXT, {"prompt": [BOS, *TOKENS], "max_tokens": 10, "context_policy": "truncate_left"})
    assert list(engine.requests[0].prompt) == TOKENS[60:]


@streams
def test_several_prompts_have_a_report_each(client: Client, engine: FakeEngine, stream: bool) -> None:
    prompts = [TOKENS, [5, 6], TOKENS[:95]]
    fields = {"prompt": prompts, "n": 2, "max_tokens": 10, "context_policy": "truncate_left"}
    result = client.post(TEXT, {**fields, "stream": stream})
    first = result.events[0] if stream else result.json
    one, fits, other = first["context"]
    assert (one["dropped_tokens"], fits, other["dropped_tokens"]) == (60, None, 5)
    assert result.headers["x-context-dropped"] == "65"
    assert [len(request.prompt) for request in engine.requests] == [90, 90, 2, 2, 90, 90]
    if stream:
        assert sum("context" in event for event in result.events[:-1]) == 1


def test_echo_repeats_the_prompt_as_it_came(client: Client) -> None:
    text = "a" * 60 + "b" * 89
    fields = {"prompt": text, "echo": True, "max_tokens": 10, "context_policy": "truncate_left"}
    result = client.post(TEXT, fields).json
    assert result["choices"][0]["text"] == text + "Hello wörld!"
    assert result["context"]["dropped_tokens"] == 60
    first = client.post(TEXT, fields | {"stream": True}).events[0]
    assert (first["choices"][0]["text"], first["context"]) == (text, result["context"])


def test_a_stream_without_text_says_it_in_its_last_chunk(client: Client, engine: FakeEngine) -> None:
    engine.reply = []
    chunk, done = client.post(TEXT, {"prompt": TOKENS, "stream": True, "context_policy": "truncate_left"}).events
    assert (chunk["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")
    assert chunk["context"]["dropped_tokens"] == 100


@streams
@pytest.mark.parametrize("policy", ["truncate_left", "truncate_middle", "error", None])
@pytest.mark.parametrize(
    ("url", "fields"), [(CHAT, {"messages": [SYSTEM, *TURNS[:2]]}), (TEXT, {"prompt": TOKENS[:90]})]
)
def test_what_fits_is_left_alone(
    client: Client, engine: FakeEngine, url: str, fields: dict[str, Any], policy: str | None, stream: bool
) -> None:
    result = post(client, url, stream, **fields, max_tokens=10, context_policy=policy)
    assert result.status == 200
    assert b'"context"' not in result.body
    assert "x-context-dropped" not in result.headers
    if url == TEXT:
        assert list(engine.requests[0].prompt) == TOKENS[:90]


@streams
@urls
@pytest.mark.parametrize("fields", [{}, {"context_policy": "error"}, {"context_policy": None}])
def test_error_is_the_default(client: Client, engine: FakeEngine, url: str, stream: bool, fields: Any) -> None:
    result = client.post(url, {**FIELDS, "prompt": TOKENS, "stream": stream, **fields})
    assert result.status == 400
    assert result.error["code"] == "context_length_exceeded"
    assert not engine.requests


@streams
@pytest.mark.parametrize("policy", ["truncate_left", "truncate_middle"])
def test_a_last_message_that_does_not_fit_is_refused(
    client: Client, engine: FakeEngine, policy: str, stream: bool
) -> None:
    messages = [SYSTEM, *TURNS, {"role": "user", "content": "x" * 80}]
    result = client.post(CHAT, {"messages": messages, "context_policy": policy, "stream": stream})
    assert result.status == 400
    assert result.error["code"] == "context_length_exceeded"
    assert result.error["param"] == "messages"
    for size in (N_WHOLE + 76, 108, N_CTX):
        assert str(size) in result.error["message"]
    assert not engine.requests


def test_what_error_takes_is_taken(client: Client, engine: FakeEngine) -> None:
    """A chat that cannot be cut so far leaves the completion less than it wants."""
    messages = [{"role": "user", "content": "x" * 80}]
    result = client.post(CHAT, {"messages": messages, "max_tokens": 50, "context_policy": "truncate_left"})
    assert (result.status, len(engine.requests[0].prompt)) == (200, 98)
    assert b'"context"' not in result.body


@urls
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("left", "it must be one of error, truncate_left, truncate_middle"),
        ("", "it must be one of error, truncate_left, truncate_middle"),
        ("shift", "this model cannot shift; it must be one of error, truncate_left, truncate_middle"),
        (5, "expected a string"),
        (["error"], "expected a string"),
    ],
)
def test_wrong_values(client: Client, engine: FakeEngine, url: str, value: object, words: str) -> None:
    result = client.post(url, {"messages": [QUESTION], "prompt": "x", "context_policy": value})
    assert result.status == 400
    assert result.error["param"] == "context_policy"
    assert words in result.error["message"]
    assert not engine.requests


@urls
def test_the_server_s_policy_holds_where_the_request_names_none(client: Client, config: ServeConfig, url: str) -> None:
    config.context_policy = "truncate_middle"
    fields = {**FIELDS, "prompt": TOKENS}
    for none in ({}, {"context_policy": None}):
        assert client.post(url, fields | none).json["context"]["policy"] == "truncate_middle"
    own = client.post(url, fields | {"context_policy": "truncate_left"})
    assert own.json["context"]["policy"] == "truncate_left"
    assert client.post(url, fields | {"context_policy": "error"}).error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_differs_in_nothing_but_the_member(client: Client, n: int) -> None:
    cut = client.post(CHAT, FIELDS | {"n": n, "stream": True, "context_policy": "truncate_left"}).events
    same = client.post(CHAT, FIELDS | {"messages": [SYSTEM, *TURNS[6:], QUESTION], "n": n, "stream": True}).events
    assert cut[0].pop("context")["dropped_tokens"] == 90
    for event in (*cut[:-1], *same[:-1]):
        event["id"] = event["created"] = None
    assert cut == same


@pytest.mark.parametrize(
    ("path", "fields"), [(CHAT, FIELDS), (TEXT, {"prompt": TOKENS}), (TEXT, {"prompt": TOKENS, "echo": True})]
)
def test_the_direct_path_has_the_bytes_of_the_ordinary_one(
    live: Start, engine: FakeEngine, path: str, fields: dict[str, Any]
) -> None:
    engine.reply, engine.delay = ["Hel", "", "lo", "!"], 0.02
    call = (path, fields | {"stream": True, "context_policy": "truncate_left"})
    direct = raw_response(live(), *call, headers="Connection: close\r\n")
    ordinary = raw_response(live(direct=False), *call, headers="Connection: close\r\n")
    assert direct == ordinary
    assert direct.count(b'"context":{"policy":"truncate_left"') == 1
    assert b"\nx-context-dropped: " in direct


@pytest.mark.parametrize("n", [1, 2])
def test_the_direct_path_opens_behind_the_first_chunk(services: Services, engine: FakeEngine, n: int) -> None:
    async def go() -> None:
        group, door = await group_of(services, engine, n), Door()
        chunks = ChunkFormat(group, created=0, is_chat=True, include_usage=False, only_first={"context": {"a": 1}})
        stream = EventStream(group, chunks, ping_seconds=9.0, body=door)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        engine.generations[-1].deliver("1", 1)
        first = await waiting
        assert door.sent == []
        assert first.count(b'"context":{"a":1}') == 1
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        for generation in engine.generations:
            generation.deliver("2", 1)
        assert len(door.sent) == n
        assert b"context" not in b"".join(door.sent)
        waiting.cancel()
        await stream.close()
        await asyncio.sleep(0.01)

    asyncio.run(go())


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_the_official_client_reads_it(live: Start, engine: FakeEngine, n: int, direct: bool) -> None:
    engine.delay = 0.005
    extra: Any = {"extra_body": {"context_policy": "truncate_left"}, "model": "fake", "max_tokens": 10, "n": n}
    with sdk(live(direct=direct)) as client:
        whole = client.chat.completions.create(messages=MESSAGES, **extra)  # type: ignore[call-overload]
        chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **extra))  # type: ignore[call-overload]
        pieces = list(client.completions.create(prompt=TOKENS, stream=True, **extra))
        with client.chat.completions.with_streaming_response.create(messages=MESSAGES, **extra) as raw:
            assert raw.headers["x-context-dropped"] == "90"
    assert whole.model_extra["context"]["dropped_messages"] == 6
    assert isinstance(chunks[0], openai.types.chat.ChatCompletionChunk)
    assert chunks[0].model_extra["context"] == whole.model_extra["context"]
    assert pieces[0].model_extra["context"]["dropped_token_range"] == [0, 60]
    for stream in (chunks, pieces):
        assert not any("context" in one.model_extra for one in stream[1:])
    for index in range(n):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == "Hello wörld!"
        texts = [piece.choices[0].text for piece in pieces if piece.choices[0].index == index]
        assert "".join(texts) == "Hello wörld!"


def test_the_documentation_names_every_field(client: Client) -> None:
    of_chat = client.post(CHAT, FIELDS | {"context_policy": "truncate_left"}).json["context"]
    of_text = client.post(TEXT, {"prompt": TOKENS, "context_policy": "truncate_left"}).json["context"]
    said = [name for cell in names(API, "Prompts that do not fit") for name in cell.split("`, `")]
    assert said == list(ContextPolicy)
    text = API.read_text(encoding="utf-8")
    for field in {*of_chat, *of_text}:
        assert f"`{field}`" in text, field
    (example,) = [json.loads(block.text) for block in blocks(API, "json") if "truncate_left" in block.text]
    assert list(example["context"]) == list(of_chat)
    shown = example["context"]
    assert shown["prompt_tokens_before"] - shown["prompt_tokens"] == shown["dropped_tokens"]
    assert shown["dropped_message_range"][1] - shown["dropped_message_range"][0] == shown["dropped_messages"]
