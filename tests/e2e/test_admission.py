"""What is let in: the queue's limit, the context's limit, Host names, writes under /internal, several models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from .support import CHAT, COMPLETIONS, NAME, ServerProcess, connect, events_of, long_request, wait_until

Start = Callable[..., ServerProcess]
ASK: Any = [{"role": "user", "content": "hi"}]


@contextlib.contextmanager
def full(server: ServerProcess) -> Iterator[None]:
    """Inside, one request runs and one waits; afterwards both are given up."""
    with connect(server) as first, connect(server) as second:
        first.send(COMPLETIONS, long_request())
        first.head()
        first.chunk()
        second.send(COMPLETIONS, long_request())
        wait_until(lambda: len(server.scheduler()["waiting"]) == 1)
        yield
    server.wait_idle()


def test_a_full_queue(start: Start) -> None:
    running = start("--parallel", "1", "--max-queue", "1", "--ctx-size", "8192")
    with full(running):
        view = running.scheduler()
        assert [one["state"] for one in view["running"]] == ["decode"]
        assert [one["state"] for one in view["waiting"]] == ["waiting"]
        for path, body in ((CHAT, {"messages": ASK}), (COMPLETIONS, {"prompt": "x", "stream": True})):
            reply = running.post(path, body)
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "queue_full"
        with running.sdk() as client, pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model=NAME, messages=ASK)
        assert refused.value.status_code == 503
        # The rest of the server goes on: it is busy, not ill.
        assert running.get("/health").status_code == running.get("/ready").status_code == 200
        assert len(running.scheduler()["waiting"]) == 1
    running.assert_serving()

    # All choices of a request or none: three do not fit in one slot and one place in the queue.
    reply = running.post(COMPLETIONS, {"prompt": "x", "n": 3, "max_tokens": 2})
    assert reply.status_code == 503
    running.wait_idle()
    assert running.complete("x", n=2, max_tokens=2)["usage"]["completion_tokens"] == 4
    running.assert_kv_sound()


def test_a_waiting_request_that_is_given_up_makes_room(start: Start) -> None:
    running = start("--parallel", "1", "--max-queue", "1", "--ctx-size", "8192")
    with connect(running) as first:
        first.send(COMPLETIONS, long_request())
        first.head()
        first.chunk()
        for _ in range(3):
            with connect(running) as second:
                second.send(COMPLETIONS, long_request())
                wait_until(lambda: len(running.scheduler()["waiting"]) == 1)
            wait_until(lambda: not running.scheduler()["waiting"])
        assert len(running.scheduler()["running"]) == 1
    running.wait_idle()
    running.assert_kv_sound()


def test_the_context_s_limit(start: Start) -> None:
    running = start("--parallel", "1", "--ctx-size", "256")
    full = running.complete([504] * 255, max_tokens=5)
    assert full["choices"][0]["finish_reason"] == "length"
    for size in (256, 300):
        reply = running.post(COMPLETIONS, {"prompt": [504] * size, "max_tokens": 1})
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"
    endless = running.complete([504] * 200, max_tokens=500, ignore_eos=True)
    assert endless["choices"][0]["finish_reason"] == "length"
    running.assert_serving()
    running.assert_kv_sound()


def test_prompt_and_completion_stay_within_the_context(start: Start) -> None:
    running = start("--parallel", "1", "--ctx-size", "256")
    for size in (200, 255):
        assert running.complete([504] * size, max_tokens=500, ignore_eos=True)["usage"]["total_tokens"] == 256


def test_health_and_readiness(server: ServerProcess) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    ready = server.get("/ready")
    assert ready.status_code == 200 and ready.json()["models"] == {NAME: True}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_stranger_s_host_header(server: ServerProcess, host: str) -> None:
    for path in ("/v1/models", "/internal/kv", "/health"):
        reply = server.get(path, headers={"Host": host})
        assert reply.status_code == 403
        assert reply.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]:80"])
def test_our_own_host_headers(server: ServerProcess, host: str) -> None:
    assert server.get("/v1/models", headers={"Host": host}).status_code == 200


def test_writes_under_internal_need_json(server: ServerProcess) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        reply = server.post("/internal/kv/drop", b"", headers={"Content-Type": kind})
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert server.post("/internal/kv/drop", {}).status_code == 200


def test_an_allowed_host(start: Start) -> None:
    running = start("--allowed-host", "llm.example", "--parallel", "1", "--ctx-size", "256")
    assert running.get("/v1/models", headers={"Host": "llm.example:443"}).status_code == 200
    assert running.get("/v1/models", headers={"Host": "other.example"}).status_code == 403


def test_two_models(start: Start, smollm2: Path) -> None:
    models = ["--model", f"first={smollm2}", "--model", f"second={smollm2}"]
    running = start(*models, "--parallel", "1", "--ctx-size", "256", model=False)
    assert [model["id"] for model in running.get("/v1/models").json()["data"]] == ["first", "second"]
    assert running.complete("x", max_tokens=1)["model"] == "first", "the first one answers when none is named"
    assert running.complete("x", max_tokens=1, model="second")["model"] == "second"
    assert running.complete("x", max_tokens=1, model="SECOND")["model"] == "second"
    for name in ("first", "second"):
        view = running.get(f"/internal/kv?model={name}").json()
        assert view["model"] == name and view["cells_retained"] > 0
    running.post("/internal/kv/drop?model=second", {})
    assert running.get("/internal/kv?model=first").json()["cells_retained"] > 0
    assert running.get("/internal/kv?model=second").json()["cells_retained"] == 0


def test_a_chat_template_of_one_s_own(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    running = start("--chat-template", f"@{file}", "--parallel", "1", "--ctx-size", "256")
    chat = running.chat([{"role": "user", "content": "Once upon a time"}], max_tokens=8)
    plain = running.complete("Once upon a time", max_tokens=8)
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    events = events_of(running.post(CHAT, {"messages": ASK, "max_tokens": 2, "stream": True}).content)
    assert events[-1] == "[DONE]"
