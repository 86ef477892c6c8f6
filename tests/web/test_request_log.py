"""X-Request-ID, and the line that ``--log-requests`` writes for each request, over real connections."""

from __future__ import annotations

import http.client
import json
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from mullama.config import ServeConfig
from mullama.logs import TextLines

from .conftest import Client, Live
from .fake_engine import FakeEngine

COMPLETIONS = "/v1/completions"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


# -- the id


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", b"", 200),
        ("GET", "/v1/models", b"", 200),
        ("POST", COMPLETIONS, b'{"prompt": "x"}', 200),
        ("POST", COMPLETIONS, b'{"prompt": "x", "stream": true}', 200),
        ("POST", COMPLETIONS, b"{", 400),
        ("GET", "/nowhere", b"", 404),
        ("DELETE", COMPLETIONS, b"", 405),
    ],
)
def test_every_answer_has_the_id_of_its_request(
    client: Client, method: str, path: str, body: bytes, status: int
) -> None:
    answer = client.request(method, path, body, {"Content-Type": "application/json", "X-Request-ID": "abc-123:x"})
    assert (answer.status, answer.headers["x-request-id"]) == (status, "abc-123:x")


def test_one_that_another_middleware_refuses_has_it_too(client: Client) -> None:
    answer = client.get("/v1/models", headers={"Host": "evil.example", "X-Request-ID": "mine"})
    assert (answer.status, answer.headers["x-request-id"]) == (403, "mine")


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "\x01", "é", "a\tb"])
def test_what_cannot_be_an_id_is_replaced(client: Client, given: str) -> None:
    scope: dict[str, str] = {"X-Request-ID": given}
    first, second = (client.get("/health", headers=scope).headers["x-request-id"] for _ in range(2))
    assert re.fullmatch(r"[0-9a-f]{32}", first) and first != second


def test_an_error_nobody_expected_has_it(client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "submit", fail)
    answer = client.post(COMPLETIONS, {"prompt": "x"}, headers={"X-Request-ID": "mine"})
    assert (answer.status, answer.headers["x-request-id"]) == (500, "mine")


# -- the lines


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append({"message": record.getMessage(), **record.mullama_facts})  # type: ignore[attr-defined]
        self.text.append(TextLines().format(record))

    def wait(self, n: int) -> list[dict[str, Any]]:
        end = time.monotonic() + 20
        while len(self.found) < n:
            assert time.monotonic() < end, self.found
            time.sleep(0.005)
        return self.found


@pytest.fixture
def lines(config: ServeConfig) -> Any:
    config.log_requests = True
    log = logging.getLogger("mullama.requests")
    handler = Lines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)


def ask(live: Live, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    data = json.dumps(body).encode() if body is not None else b""
    connection.request(method, path, data, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_for_an_answer(live: Callable[..., Live], engine: FakeEngine, lines: Lines, stream: bool) -> None:
    engine.reply = ["a", "b", "c"]
    running = live()
    status, _ = ask(
        running, "POST", COMPLETIONS, {"prompt": "1234", "stream": stream, "n": 2}, **{"X-Request-ID": "me"}
    )
    (line,) = lines.wait(1)
    assert status == 200
    assert line["message"] == f"POST {COMPLETIONS}"
    wanted = {"id": "me", "status": 200, "model": "fake", "prompt_tokens": 5, "completion_tokens": 6, "finish": "stop"}
    assert line.items() >= wanted.items()
    assert line["ms"] > 0 and line["client"].startswith("127.0.0.1:")
    assert " INFO requests: POST /v1/completions id=me status=200 ms=" in lines.text[0]


def test_lines_for_what_is_refused_and_for_what_is_no_generation(
    live: Callable[..., Live], engine: FakeEngine, lines: Lines
) -> None:
    running = live()
    for method, path, body in (
        ("GET", "/health", None),
        ("POST", COMPLETIONS, {"prompt": 5}),
        ("GET", "/a%0ab%20c", None),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "REFUSE"}]}),
    ):
        ask(running, method, path, body)
    found = lines.wait(4)
    assert [line["status"] for line in found] == [200, 400, 404, 400]
    assert all("completion_tokens" not in line for line in found)
    assert all(len(text.splitlines()) == 1 for text in lines.text), "a path cannot forge a line"


def test_a_client_that_leaves(live: Callable[..., Live], engine: FakeEngine, lines: Lines) -> None:
    engine.reply = ["x"] * 100_000
    engine.delay = 0.01
    running = live()
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("POST", COMPLETIONS, json.dumps({"prompt": "x", "stream": True}))
    answer = connection.getresponse()
    answer.readline()
    answer.close()
    connection.close()
    (line,) = lines.wait(1)
    assert (line["status"], line["finish"]) == (499, "cancelled")
    assert 0 < line["completion_tokens"] < 100_000


def test_without_the_option_there_are_none(
    live: Callable[..., Live], engine: FakeEngine, lines: Lines, config: ServeConfig
) -> None:
    config.log_requests = False
    assert ask(live(), "POST", COMPLETIONS, {"prompt": "x"})[0] == 200
    assert lines.found == []
