"""What a client can do wrong: each gets a clear error with the right status, and the server keeps serving."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from .support import CHAT, COMPLETIONS, Raw, ServerProcess, connect, request_bytes, wait_until

ASK = [{"role": "user", "content": "hi"}]
VOCABULARY = 49152  # SmolLM2's tokens


@pytest.fixture(autouse=True)
def still_serving(server: ServerProcess) -> Iterator[None]:
    yield
    server.assert_serving()
    server.assert_kv_sound()


def refused(server: ServerProcess, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error object of a refused request, after a check of its shape."""
    reply = server.post(path, body)
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"].startswith("application/json")
    answer = reply.json()
    assert set(answer) == {"error"}
    error: dict[str, Any] = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(server: ServerProcess, stream: bool) -> None:
    long = "word " * 4000
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": long}]}), (COMPLETIONS, {"prompt": long})):
        error = refused(server, path, {**body, "stream": stream})
        assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")
        assert "2048" in error["message"]


def test_a_hundred_thousand_characters(server: ServerProcess) -> None:
    assert refused(server, COMPLETIONS, {"prompt": "x y " * 25_000})["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"   ", b"{", b"[]", b"null", b"1", b'"x"', b'{"a":1}{"a":2}', b"\x00", b"{'prompt': 'x'}",
        b'{"prompt": "\xff\xfe", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"unknown": "\xed\xa0\x80", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
        b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"nobody reads this":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b"[" * 1_000_000,
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_bodies_that_are_not_what_they_should_be(server: ServerProcess, path: str, body: bytes) -> None:
    assert refused(server, path, body)["type"] == "invalid_request_error"


def test_ten_megabytes(server: ServerProcess) -> None:
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": "x" * 10_000_000}]}),
        (COMPLETIONS, {"prompt": [1] * 5_000_000}),
    ):
        assert refused(server, path, body, 413)["code"] == "request_too_large"
    with connect(server) as raw:  # and without an announced length
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        piece = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16))
        raw.sock.sendall(head)
        for _ in range(130):
            raw.sock.sendall(piece)
        assert raw.head()[0] == 413


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": ASK, "temperature": 2.1}, "temperature"),
    (CHAT, {"messages": ASK, "temperature": -0.1}, "temperature"),
    (CHAT, {"messages": ASK, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": ASK, "temperature": True}, "temperature"),
    (CHAT, {"messages": ASK, "top_p": 1.1}, "top_p"),
    (CHAT, {"messages": ASK, "n": 0}, "n"),
    (CHAT, {"messages": ASK, "n": 129}, "n"),
    (CHAT, {"messages": ASK, "n": 1.5}, "n"),
    (CHAT, {"messages": ASK, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": ASK, "max_completion_tokens": -2}, "max_completion_tokens"),
    (CHAT, {"messages": ASK, "stream": "yes"}, "stream"),
    (CHAT, {"messages": ASK, "stop": 5}, "stop"),
    (CHAT, {"messages": ASK, "stop": ["a", ""]}, "stop"),
    (CHAT, {"messages": ASK, "grammar": "root ::= x"}, "grammar"),
    (COMPLETIONS, {"prompt": "x", "n_indent": 5}, "n_indent"),
    (CHAT, {"messages": ASK, "seed": 2**70}, "seed"),
    (CHAT, {"messages": ASK, "logit_bias": {"sky": 1}}, "logit_bias"),
    (CHAT, {"messages": ASK, "logit_bias": {"-1": 1}}, "logit_bias"),
    (CHAT, {"messages": ASK, "logit_bias": {str(VOCABULARY): 1}}, "logit_bias"),
    (CHAT, {"messages": ASK, "logit_bias": {str(2**32): 1}}, "logit_bias"),
    (CHAT, {"messages": ASK, "logit_bias": {"1": 101}}, "logit_bias"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [*ASK, {"role": "user"}]}, "messages[1].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [1, "x"]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, -1]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [1, VOCABULARY]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [2**40]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [[1], [2, VOCABULARY]]}, "prompt[1][1]"),
    (COMPLETIONS, {"prompt": 5}, "prompt"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {str(VOCABULARY): -100}}, "logit_bias"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG, ids=lambda value: json.dumps(value)[:48])
def test_wrong_fields_are_named(server: ServerProcess, path: str, body: dict[str, Any], param: str) -> None:
    error = refused(server, path, body)
    assert error["param"] == param
    assert refused(server, path, {**body, "stream": body.get("stream", True)})["param"] == param


def test_a_wrong_choice_among_several_prompts_starts_none(server: ServerProcess) -> None:
    refused(server, COMPLETIONS, {"prompt": ["fine", "word " * 4000], "max_tokens": 500, "ignore_eos": True})
    server.wait_idle()


def test_unknown_fields_are_ignored(server: ServerProcess) -> None:
    answer = server.complete("x", max_tokens=1, best_colour="blue", metadata={"a": [1]}, store=True)
    assert answer["usage"]["completion_tokens"] == 1


def test_an_unknown_model(server: ServerProcess) -> None:
    for path, body in ((CHAT, {"messages": ASK}), (COMPLETIONS, {"prompt": "x"})):
        error = refused(server, path, {**body, "model": "gpt-9"}, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert server.get("/internal/kv?model=gpt-9").status_code == 404


def test_wrong_methods_and_paths(server: ServerProcess) -> None:
    assert server.get(CHAT).status_code == 405
    assert server.get("/internal/kv/drop").status_code == 405
    assert server.post("/v1/models", {}).status_code == 405
    for path in ("/", "/v1", "/v1/nothing", "/v1/chat/completions/x", "/internal", "/%00", "/v1/../../etc/passwd"):
        reply = server.get(path)
        assert reply.status_code == 404 and reply.json()["error"]["message"]


# -- odd, but JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [r"\ud800", r"\u0000", r"\udc00\ud800", r"\ufffe", r"\u202e", "\U0001f642"])
def test_odd_texts(server: ServerProcess, text: str) -> None:
    """Wherever a text may be: an answer or a 400, never a 500, and no end of the process."""
    for path, fields in (
        (COMPLETIONS, '"prompt": "%s"'),
        (COMPLETIONS, '"prompt": ["%s", "x"]'),
        (COMPLETIONS, '"prompt": "x", "stop": "%s"'),
        (COMPLETIONS, '"prompt": "x", "user": "%s"'),
        (COMPLETIONS, '"prompt": "x", "dry_multiplier": 1, "dry_sequence_breakers": ["%s"]'),
        (COMPLETIONS, '"prompt": "x", "logit_bias": {"%s": 1}'),
        (COMPLETIONS, '"prompt": "x", "%s": 1'),
        (COMPLETIONS, '"prompt": "x", "model": "%s"'),
        (CHAT, '"messages": [{"role": "user", "content": "%s"}]'),
        (CHAT, '"messages": [{"role": "user", "content": [{"type": "text", "text": "%s"}]}]'),
        (CHAT, '"messages": [{"role": "user", "name": "%s", "content": "x"}]'),
        (CHAT, '"messages": [{"role": "%s", "content": "x"}]'),
        (CHAT, '"messages": [{"role": "assistant", "tool_calls": [{"%s": 1}]}]'),
    ):
        body = "{" + fields % text + ', "max_tokens": 1}'
        for stream in (False, True):
            reply = server.post(path, f'{{"stream": {json.dumps(stream)}, {body[1:]}'.encode())
            assert reply.status_code in (200, 400, 404), (body, reply.text)
            assert b'data: {"error"' not in reply.content, body


@pytest.mark.parametrize("depth", [10, 150, 500, 900, 5000, 100_000])
def test_nested_messages(server: ServerProcess, depth: int) -> None:
    """What passes the JSON decoder reaches the chat template, which must survive it too."""
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        nested = opening * depth + "1" + closing * depth
        for field in ('"tool_calls": [{"function": %s}]', '"function_call": {"a": %s}', '"content": %s'):
            message = '{"role": "assistant", ' + field % nested + "}"
            body = '{"max_tokens": 1, "messages": [{"role": "user", "content": "x"}, ' + message + "]}"
            reply = server.post(CHAT, body.encode())
            assert reply.status_code in (200, 400), reply.text
            assert len(reply.content) < 10_000, "an error does not repeat the request"


def mutate(value: Any, rng: random.Random) -> Any:
    """The same JSON with something wrong in it."""
    odd = [None, True, -1, 0, 1.5, 10**40, 1e308, "", "x" * 100, [], {}, [[]], [None], {"a": {}}, "\ud7ff", -(2**63)]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutate(value[at], rng), *value[at + 1 :]]
    return rng.choice(odd)


def test_many_odd_bodies(server: ServerProcess) -> None:
    rng = random.Random(1)
    seeds: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"},
                {"role": "assistant", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
                {"role": "tool", "content": "1", "tool_call_id": "1"},
            ],
            "stream_options": {"include_usage": True}, "response_format": {"type": "text"}, "stop": ["."],
        }),
        (COMPLETIONS, {"prompt": [[1, 2], [3]], "echo": True, "n": 2, "best_of": 2, "suffix": ""}),
    ]  # fmt: skip
    samplers = {
        "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "repeat_penalty": 1.1,
        "repeat_last_n": 8, "presence_penalty": 0.1, "frequency_penalty": 0.1, "dry_multiplier": 0.5, "dry_base": 1.5,
        "dry_allowed_length": 2, "dry_penalty_last_n": 8, "dry_sequence_breakers": ["."], "xtc_probability": 0.1,
        "xtc_threshold": 0.1, "mirostat": 2, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "logit_bias": {"5": 1},
        "seed": 1, "min_tokens": 1, "ignore_eos": False, "user": "ann", "priority": 0,
    }  # fmt: skip
    seen = set()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for i in range(600):
            path, seed = seeds[i % 2]
            body = mutate({**seed, **samplers}, rng)
            if isinstance(body, dict):  # mutated or not, it has to end soon
                body |= {"max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 0}
            reply = client.post(path, content=json.dumps(body).encode())
            seen.add(reply.status_code)
            assert reply.status_code in (200, 400), (body, reply.text)
    assert seen == {200, 400}


# -- below HTTP -------------------------------------------------------------------------------------------------------

GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # a TLS hello
    b"\x00" * 1000,
    b"GET / HTTP/9.9\r\n\r\n",
    b"hello\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
    f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2_000_000,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(100_000)),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:20]))
def test_garbage(server: ServerProcess, garbage: bytes) -> None:
    raw = Raw(server.port, timeout=30)
    try:
        raw.sock.sendall(garbage)
        status, _ = raw.head()
    except ConnectionError:
        status = 0  # it hung up
    finally:
        raw.close()
    assert status in (0, 400, 404, 413, 431)


def test_half_a_request(server: ServerProcess) -> None:
    whole = request_bytes(COMPLETIONS, {"prompt": "x" * 2000, "max_tokens": 3})
    for part in (1, 20, whole.index(b"\r\n\r\n") + 4, len(whole) - 1):
        with connect(server) as raw:
            raw.sock.sendall(whole[:part])
    server.wait_idle()


def test_a_slow_request_holds_up_nobody(server: ServerProcess) -> None:
    whole = request_bytes(COMPLETIONS, {"prompt": "x", "max_tokens": 3, "temperature": 0})
    with connect(server) as slow:
        for at in range(0, 60, 6):
            slow.sock.sendall(whole[at : at + 6])
            time.sleep(0.01)
        server.assert_serving()
        slow.sock.sendall(whole[60:-1])
        server.assert_serving()
        slow.sock.sendall(whole[-1:])
        status, headers = slow.head()
        assert status == 200
        answer = json.loads(slow.file.read(int(headers["content-length"])))
        assert answer["usage"]["completion_tokens"] == 3


def test_a_client_that_does_not_read_holds_up_nobody(server: ServerProcess) -> None:
    with connect(server) as deaf:
        deaf.send(COMPLETIONS, {"prompt": "Once", "stream": True, "ignore_eos": True, "max_tokens": 400})
        wait_until(lambda: server.busy() == 1)
        assert server.complete("One, two, three,", max_tokens=3)["usage"]["completion_tokens"] == 3
    server.wait_idle()


def test_many_idle_connections(server: ServerProcess) -> None:
    idle = [Raw(server.port) for _ in range(200)]
    try:
        server.assert_serving()
    finally:
        for raw in idle:
            raw.close()


def test_pipelined_requests_are_answered_in_order(server: ServerProcess) -> None:
    one = request_bytes(COMPLETIONS, {"prompt": "x", "max_tokens": 2, "temperature": 0})
    with connect(server) as raw:
        raw.sock.sendall(one * 3)
        for _ in range(3):
            status, headers = raw.head()
            assert status == 200
            assert json.loads(raw.file.read(int(headers["content-length"])))["usage"]["completion_tokens"] == 2
