"""Streams: the chunks, the usage, the profile, errors on the way, pings."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from mullama.errors import ComputeFailed, QueueFull
from mullama.web.services import Services
from mullama.web.stream.event_stream import PING, Silence, event_json
from mullama.web.stream.generations import Merged

from .conftest import Client
from .fake_engine import FakeEngine, FakeGeneration

URL = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
USAGE = {"stream_options": {"include_usage": True}}
PROFILE = {"X-Profile": "true"}


def test_chunks_of_a_chat(client: Client) -> None:
    result = client.post(URL, BODY)
    assert result.status == 200
    assert result.headers["cache-control"] == "no-cache"
    *chunks, done = result.events
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["id"].startswith("chatcmpl-")
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["model"] for chunk in chunks} == {"fake"}
    assert not any("usage" in chunk or "profile" in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello wörld!"
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_chunks_of_a_completion(client: Client) -> None:
    *chunks, done = client.post("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 1}).events
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ("Hel", None),
        ("", "length"),
    ]


def test_text_is_escaped(client: Client, engine: FakeEngine) -> None:
    engine.reply = ['"quoted"\n', "back\\slash", "\u2028\x01", "日本"]
    chunks = client.post(URL, BODY).events[:-1]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "".join(engine.reply)


def test_the_role_comes_with_the_first_text_in_one_piece(client: Client, engine: FakeEngine) -> None:
    engine.reply = ["", "", "a"]
    chunks = client.post(URL, BODY).events
    assert len(chunks) == 4  # the role, the text, the finish, [DONE]: held-back text makes no chunk


def test_an_empty_reply_still_has_a_role(client: Client, engine: FakeEngine) -> None:
    engine.reply = []
    *chunks, _ = client.post(URL, BODY).events
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[1]["choices"][0]["finish_reason"] == "stop"


def test_include_usage(client: Client, engine: FakeEngine) -> None:
    engine.cached = 2
    *chunks, last, done = client.post(URL, BODY | USAGE).events
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert client.post(URL, BODY | {"stream_options": {"include_usage": False}}).events[-2]["choices"]


def test_the_profile_is_in_the_usage_chunk_when_there_is_one(client: Client) -> None:
    plain = client.post(URL, BODY | USAGE).events
    *chunks, last, _ = client.post(URL, BODY | USAGE, headers=PROFILE).events
    assert last["profile"]["completion_tokens"] == 4
    assert not any("profile" in chunk for chunk in chunks)
    assert len(chunks) + 2 <= len(plain) + 1  # merging may differ; never a chunk for the profile
    assert sum(not chunk["choices"] for chunk in [*chunks, last]) == 1


def test_else_the_profile_is_in_the_chunk_with_the_finish_reason(client: Client) -> None:
    *chunks, last, _ = client.post(URL, BODY, headers=PROFILE).events
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["profile"]["completion_tokens"] == 4
    assert "profiles" not in last
    assert not any("profile" in chunk for chunk in chunks)


def test_with_several_choices_the_profile_is_in_the_last_chunk(client: Client) -> None:
    *chunks, last, _ = client.post(URL, BODY | {"n": 3}, headers=PROFILE).events
    assert last["profile"]["completion_tokens"] == 12
    assert len(last["profiles"]) == 3
    assert not any("profile" in chunk for chunk in chunks)


def test_several_choices(client: Client) -> None:
    *chunks, last, _ = client.post(URL, BODY | USAGE | {"n": 3}).events
    texts = {0: "", 1: "", 2: ""}
    finished = []
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            finished.append(choice["index"])
        else:
            assert choice["index"] not in finished
    assert texts == dict.fromkeys(range(3), "Hello wörld!")
    assert sorted(finished) == [0, 1, 2]
    assert last["usage"]["completion_tokens"] == 12


def test_an_error_on_the_way_is_an_event_and_the_end(client: Client, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 2, ComputeFailed("the logits are not finite")
    *chunks, error = client.post(URL, BODY | USAGE).events
    assert chunks
    assert error == {
        "error": {
            "message": "the logits are not finite",
            "type": "server_error",
            "param": None,
            "code": "compute_failed",
        }
    }


def test_an_error_of_one_choice_ends_them_all(client: Client, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 2, ComputeFailed("no")
    assert client.post(URL, BODY | {"n": 2}).events[-1]["error"]["message"] == "no"
    assert not engine.running


def test_an_unexpected_error_does_not_leak(client: Client, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 1, ValueError("/secret/path")
    result = client.post(URL, BODY)
    assert result.events[-1]["error"]["type"] == "server_error"
    assert b"secret" not in result.body


@pytest.mark.parametrize("n", [1, 2])
def test_a_generation_that_raises_is_an_event_too(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    async def broken(self: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(FakeGeneration, "__anext__", broken)
    result = client.post(URL, BODY | {"n": n})
    assert result.events[-1]["error"]["type"] == "server_error"
    assert b"secret" not in result.body


def test_refused_before_the_start_keeps_its_status(client: Client, engine: FakeEngine) -> None:
    engine.submit_errors = [None, QueueFull("the queue is full", retry_after=3)]
    result = client.post(URL, BODY | {"n": 2})
    assert result.status == 503
    assert result.headers["retry-after"] == "3"
    assert result.error["code"] == "queue_full"
    assert all(generation.cancelled_at for generation in engine.generations)


def test_silence_is_filled_with_pings_and_loses_nothing(client: Client, services: Services, engine: FakeEngine) -> None:
    services.ping_seconds = 0.03
    engine.first_delay, engine.delay = 0.1, 0.05
    result = client.post(URL, BODY)
    assert 3 <= result.body.count(PING) <= 8
    assert result.body.startswith(PING)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in result.events[:-1])
    assert text == "Hello wörld!"


def test_a_fast_stream_is_not_pinged(client: Client, services: Services, engine: FakeEngine) -> None:
    services.ping_seconds = 0.05
    engine.reply, engine.delay = ["x"] * 30, 0.005
    assert PING not in client.post(URL, BODY).body


def test_pings_of_several_choices(client: Client, services: Services, engine: FakeEngine) -> None:
    services.ping_seconds = 0.03
    engine.first_delay = 0.1
    result = client.post(URL, BODY | {"n": 2})
    assert PING in result.body
    assert result.events[-1] == "[DONE]"


def test_silence_lets_a_real_cancellation_through() -> None:
    async def main() -> list[str]:
        log = []
        silence = Silence(0.01)

        async def wait() -> None:
            while True:
                with silence:
                    await asyncio.sleep(5)
                log.append("ping")

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.035)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        silence.close()
        return log

    start = time.monotonic()
    assert 2 <= len(asyncio.run(main())) <= 4
    assert time.monotonic() - start < 1


def test_merged_events_are_bounded_while_nobody_reads() -> None:
    class Endless:
        id, finish = "x", None

        def __init__(self) -> None:
            self.taken = 0

        def __aiter__(self) -> Endless:
            return self

        async def __anext__(self) -> Any:
            await asyncio.sleep(0)
            self.taken += 1
            return "delta"

        def cancel(self) -> None: ...

    async def main() -> int:
        generations = [Endless(), Endless()]
        merged = Merged(generations)  # type: ignore[arg-type]
        for _ in range(100):
            await asyncio.sleep(0)
        held = sum(generation.taken for generation in generations)
        assert len(await merged.next()) == held
        merged.close()
        return held

    assert asyncio.run(main()) <= 5


LINE_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
def test_no_client_sees_a_line_end_inside_an_event(client: Client, engine: FakeEngine, endpoint: str) -> None:
    """``str.splitlines`` knows more ends of lines than the event stream: httpx's ``iter_lines`` splits there."""
    engine.reply = [f"a{end}b" for end in LINE_ENDS] + ["漢字\u2028", "\u2029"]
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    if endpoint == "/v1/completions":
        asked = {"prompt": f"x{LINE_ENDS}", "echo": True}
    reply = client.post(endpoint, asked | {"stream": True, "n": 2})
    lines = reply.body.decode().splitlines()
    assert all(line == "" or line.startswith("data: ") for line in lines)
    texts = ["", ""]
    for line in lines:
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice.get("text", choice.get("delta", {}).get("content", ""))
    assert texts == [("x" + LINE_ENDS if endpoint == "/v1/completions" else "") + "".join(engine.reply)] * 2


def test_errors_and_other_events_have_no_line_end_inside(client: Client, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 1, ComputeFailed("not\u2028finite")
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    lines = client.post("/v1/chat/completions", body).body.decode().splitlines()
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "not\u2028finite"
    assert event_json({"\u2028": ["\x85", 1.5, None]}) == rb'{"\u2028":["\u0085",1.5,null]}'
    assert event_json("Â\u00a8 ⁨漢") == '"Â\u00a8 ⁨漢"'.encode()  # neighbours of those bytes stay
