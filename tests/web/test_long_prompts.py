"""Long texts beside running streams: tokenised at a pace, in the pool, and no longer than they need to be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mullama.web.services import Services
from mullama.web.work import SHARE_BESIDE_STREAMS, Pace

from .conftest import Client
from .fake_engine import FakeEngine

LONG = "word " * 2000
CALLS = [
    ("/v1/completions", {"prompt": LONG}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
]
urls = pytest.mark.parametrize(("url", "fields"), CALLS, ids=["text", "chat"])


class Asked(FakeEngine):
    """Notes how it was asked for the tokens of prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int | None, Callable[[], None] | None, str]] = []

    def prompt_tokens(
        self, text: str, *, most: int | None = None, between: Callable[[], None] | None = None
    ) -> list[int]:
        self.asked.append((most, between, threading.current_thread().name))
        return super().prompt_tokens(text, most=most, between=between)


@pytest.fixture
def engine() -> Asked:
    engine = Asked()
    engine.info = replace(engine.info, n_ctx=300)
    return engine


@urls
def test_a_prompt_is_refused_by_the_tokeniser(client: Client, engine: Asked, url: str, fields: dict[str, Any]) -> None:
    result = client.post(url, fields)
    assert (result.status, result.error["code"]) == (400, "context_length_exceeded")
    assert "at least 300 tokens" in result.error["message"]
    [(most, between, thread)] = engine.asked
    assert most == 299
    assert between is not None and thread.startswith("mullama-web")


@urls
@pytest.mark.parametrize("policy", ["truncate_left", "truncate_middle"])
def test_what_is_cut_is_counted_to_its_end(
    client: Client, engine: Asked, url: str, fields: dict[str, Any], policy: str
) -> None:
    if url == "/v1/chat/completions":
        fields = {"messages": [{"role": "user", "content": LONG}, {"role": "user", "content": "short"}]}
    result = client.post(url, {**fields, "context_policy": policy})
    assert result.status == 200
    assert result.json["context"]["prompt_tokens_before"] > len(LONG)
    assert engine.asked[0][0] is None


def test_short_texts_stay_on_the_loop_and_never_sleep(client: Client, engine: Asked) -> None:
    assert client.post("/v1/completions", {"prompt": "short"}).status == 200
    [(_, between, thread)] = engine.asked
    assert between is None and not thread.startswith("mullama-web")


def test_open_requests_are_counted(services: Services, client: Client, engine: Asked) -> None:
    seen = []
    submit = engine.submit

    def watched(request: Any) -> Any:
        seen.append(services.n_open)
        return submit(request)

    engine.submit = watched  # type: ignore[method-assign]
    assert client.post("/v1/completions", {"prompt": "short", "n": 2}).status == 200
    assert seen == [1, 1]
    engine.submit_errors = [None]
    assert client.post("/v1/completions", {"prompt": [0] * 400}).status == 400
    assert services.n_open == 0


def test_a_pace_is_a_small_share_of_a_core() -> None:
    now_ns, slept, busy = 0, [], True
    pace = Pace(lambda: busy, clock_ns=lambda: now_ns, sleep=slept.append)
    pace()  # what was done before is not known
    for spent_ms in (2, 3):
        now_ns += spent_ms * 1_000_000
        pace()
    busy = False
    now_ns += 50_000_000
    pace()
    assert slept == pytest.approx([0.018, 0.027])
    assert 0.005 / (0.005 + sum(slept)) == pytest.approx(SHARE_BESIDE_STREAMS)
