"""The context policy ``shift`` over HTTP: what the engine is asked, and that the response says what was dropped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from docs_support import ROOT, blocks

from mullama.config import ServeConfig
from mullama.errors import ConfigError
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.services import Services

from .conftest import Client, Live, Result
from .fake_engine import FakeEngine
from .test_direct import raw_response
from .test_live import sdk

Start = Callable[..., Live]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
API = ROOT / "docs" / "api.md"
N_CTX = 100
MESSAGES = [{"role": "user", "content": "hi"}]
FIELDS: dict[str, Any] = {"messages": MESSAGES, "prompt": [5, 6, 7], "context_policy": "shift"}

streams = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
urls = pytest.mark.parametrize("url", [CHAT, TEXT], ids=["chat", "text"])


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.info = replace(engine.info, n_ctx=N_CTX, can_shift=True)
    return engine


def unable(engine: FakeEngine) -> None:
    engine.info = replace(engine.info, can_shift=False)


def shift(n: int) -> dict[str, Any]:
    return {"policy": "shift", "dropped_tokens": n}


def is_silent(result: Result) -> bool:
    return result.status == 200 and b'"context"' not in result.body and "x-context-dropped" not in result.headers


# -- what the engine is asked


@streams
@urls
def test_every_generation_may_shift(client: Client, engine: FakeEngine, url: str, stream: bool) -> None:
    fields = FIELDS | {"prompt": [[5], [6, 7]], "n": 2, "stream": stream}
    assert client.post(url, fields).status == 200
    assert [request.context_shift for request in engine.requests] == [True] * (2 if url == CHAT else 4)


@urls
@pytest.mark.parametrize("policy", ["error", "truncate_left", "truncate_middle", None])
def test_no_other_policy_shifts(client: Client, engine: FakeEngine, url: str, policy: str | None) -> None:
    engine.shifts = [46]
    assert is_silent(client.post(url, FIELDS | {"context_policy": policy}))
    assert [request.context_shift for request in engine.requests] == [False]


@urls
@pytest.mark.parametrize(
    ("max_tokens", "asked"), [(None, None), (1, 1), (N_CTX, N_CTX), (10 * N_CTX, 10 * N_CTX), (2**40, 2**30)]
)
def test_max_tokens_may_exceed_the_context(
    client: Client, engine: FakeEngine, url: str, max_tokens: int | None, asked: int | None
) -> None:
    fields = FIELDS | {"max_tokens": max_tokens, "min_tokens": max_tokens}
    assert client.post(url, fields).status == 200
    (request,) = engine.requests
    assert (request.sampling.max_tokens, request.sampling.min_tokens) == (asked, asked or 0)


@urls
def test_min_tokens_may_exceed_the_context_without_max_tokens(client: Client, engine: FakeEngine, url: str) -> None:
    assert client.post(url, FIELDS | {"min_tokens": 3 * N_CTX}).status == 200
    assert engine.requests[0].sampling.min_tokens == 3 * N_CTX


@streams
@pytest.mark.parametrize(
    ("url", "too_long"),
    [(CHAT, {"messages": MESSAGES * 20}), (TEXT, {"prompt": [5] * N_CTX}), (TEXT, {"prompt": [[5], [5] * N_CTX]})],
)
def test_a_prompt_that_does_not_fit_is_refused(
    client: Client, engine: FakeEngine, url: str, too_long: dict[str, Any], stream: bool
) -> None:
    result = client.post(url, FIELDS | too_long | {"stream": stream})
    assert result.status == 400
    assert result.error["code"] == "context_length_exceeded"
    assert all(generation.cancelled_at for generation in engine.generations), "nothing of it goes on"


def test_a_prompt_that_leaves_one_token_is_not_cut(client: Client, engine: FakeEngine) -> None:
    prompt = list(range(100, 100 + N_CTX - 1))
    assert is_silent(client.post(TEXT, FIELDS | {"prompt": prompt, "max_tokens": 5 * N_CTX}))
    assert list(engine.requests[0].prompt) == prompt


# -- models that cannot


@streams
@urls
def test_a_request_that_names_it_is_refused(client: Client, engine: FakeEngine, url: str, stream: bool) -> None:
    unable(engine)
    result = client.post(url, FIELDS | {"stream": stream})
    assert result.status == 400
    assert result.error["param"] == "context_policy"
    assert result.error["message"].endswith("cannot shift; it must be one of error, truncate_left, truncate_middle")
    assert not engine.requests


@urls
def test_an_unknown_name_is_answered_with_the_model_s_policies(client: Client, engine: FakeEngine, url: str) -> None:
    message = client.post(url, FIELDS | {"context_policy": "slide"}).error["message"]
    assert message == "context_policy: it must be one of error, truncate_left, truncate_middle, shift"


@urls
@pytest.mark.parametrize("can_shift", [True, False])
def test_the_server_s_policy(
    client: Client, engine: FakeEngine, config: ServeConfig, url: str, can_shift: bool
) -> None:
    """It holds where the request names none; for a model that cannot, ``error`` does."""
    config.context_policy = "shift"
    if not can_shift:
        unable(engine)
    engine.shifts = [46]
    result = client.post(url, FIELDS | {"context_policy": None})
    assert result.status == 200
    assert [request.context_shift for request in engine.requests] == [can_shift]
    assert result.json.get("context") == (shift(46) if can_shift else None)
    assert is_silent(client.post(url, FIELDS | {"context_policy": "error"}))
    assert not engine.requests[-1].context_shift
    long = client.post(url, {"messages": MESSAGES * 20, "prompt": [5] * N_CTX})
    assert long.error["code"] == "context_length_exceeded"


def test_a_model_that_cannot_is_in_the_log(
    services: Services, config: ServeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """The fixture serves two models; the other one cannot."""
    with caplog.at_level(logging.WARNING, "mullama.web.app"):
        create_app(config, services.models, services)
        assert caplog.messages == []
        config.context_policy = "shift"
        create_app(config, services.models, services)
    assert caplog.messages == ["--context-policy shift: 'other' cannot shift; 'error' holds for it instead"]


@pytest.mark.parametrize("policy", ["nonsense", ""])
def test_a_policy_that_there_is_not_stops_the_app(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"context_policy: '{policy}' is not one of error, ") as raised:
        create_app(ServeConfig(context_policy=policy), ModelManager([("fake", FakeEngine())]))
    assert raised.value.param == "context_policy"


# -- what the response says


@urls
def test_an_answer_says_what_was_dropped(client: Client, engine: FakeEngine, url: str) -> None:
    engine.shifts = [46]
    result = client.post(url, FIELDS, headers={"X-Profile": "true"})
    assert result.json["context"] == shift(46)
    assert result.headers["x-context-dropped"] == "46"
    assert result.json["profile"]["context_shifted"] == 46
    assert result.json["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("shifts", "context", "total"),
    [
        ([46, 0, 138, 0], [shift(46), None, shift(138), None], "184"),
        ([0, 0, 0, 46], [None, None, None, shift(46)], "46"),
    ],
)
def test_several_choices_have_an_entry_each(
    client: Client, engine: FakeEngine, shifts: list[int], context: list[Any], total: str
) -> None:
    engine.shifts = shifts
    result = client.post(TEXT, FIELDS | {"prompt": [[5], [6, 7]], "n": 2})
    assert result.json["context"] == context
    assert result.headers["x-context-dropped"] == total
    assert [choice["index"] for choice in result.json["choices"]] == [0, 1, 2, 3]


@streams
@urls
@pytest.mark.parametrize("n", [1, 2])
def test_a_choice_that_does_not_fill_the_context_says_nothing(
    client: Client, engine: FakeEngine, url: str, stream: bool, n: int
) -> None:
    assert is_silent(client.post(url, FIELDS | {"n": n, "stream": stream}))
    assert all(request.context_shift for request in engine.requests)


@urls
@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("with_profile", [False, True])
@pytest.mark.parametrize("shifts", [[46], [46, 0, 138], [0, 46, 0]])
def test_a_stream_says_it_with_the_finish_reason(
    client: Client, engine: FakeEngine, url: str, shifts: list[int], with_usage: bool, with_profile: bool
) -> None:
    """In no chunk of its own, and nothing else differs."""
    fields = FIELDS | {"n": len(shifts), "stream": True, "stream_options": {"include_usage": with_usage}}
    headers = {"X-Profile": "true"} if with_profile else {}
    engine.total_ms = 12.5
    plain = client.post(url, fields, headers=headers).events
    assert not any("context" in event for event in plain[:-1])
    engine.shifts = list(shifts)
    result = client.post(url, fields, headers=headers)
    assert "x-context-dropped" not in result.headers
    events = result.events
    dropped = [0] * len(shifts)
    for event in events[:-1]:
        context = event.pop("context", None)
        if context is not None:
            (choice,) = event["choices"]
            assert choice["finish_reason"] == "stop"
            assert context == shift(context["dropped_tokens"])
            dropped[choice["index"]] += context["dropped_tokens"]
    assert dropped == shifts
    profiles = [event["profile"]["context_shifted"] for event in events[:-1] if "profile" in event]
    assert profiles == [sum(shifts)] * with_profile
    assert bare(events) == bare(plain)


def bare(events: list[Any]) -> list[str]:
    """A stream's chunks without what differs between any two, in an order that does not depend on the clock."""
    *chunks, done = events
    assert done == "[DONE]"
    differing = ("id", "created", "profile", "profiles")
    return sorted(json.dumps({k: v for k, v in chunk.items() if k not in differing}) for chunk in chunks)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_direct_path_has_the_bytes_of_the_ordinary_one(live: Start, engine: FakeEngine, path: str) -> None:
    engine.reply, engine.delay, engine.total_ms = ["Hel", "", "lo", "!"], 0.02, 12.5
    engine.shifts = [46, 46]
    call = (path, FIELDS | {"stream": True})
    headers = "Connection: close\r\nX-Profile: true\r\n"
    direct = raw_response(live(), *call, headers=headers)
    ordinary = raw_response(live(direct=False), *call, headers=headers)
    assert direct == ordinary
    assert direct.count(b'"context":{"policy":"shift","dropped_tokens":46}') == 1


@pytest.mark.parametrize("direct", [True, False])
def test_the_official_client_reads_it(live: Start, engine: FakeEngine, direct: bool) -> None:
    engine.delay = 0.005
    extra: Any = {"extra_body": {"context_policy": "shift"}, "model": "fake", "max_tokens": 10 * N_CTX, "n": 2}
    engine.shifts = [0, 46, 46, 138]
    with sdk(live(direct=direct)) as client:
        whole = client.chat.completions.create(messages=MESSAGES, **extra)  # type: ignore[call-overload]
        chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **extra))  # type: ignore[call-overload]
    assert whole.model_extra["context"] == [None, shift(46)]
    said = {chunk.choices[0].index: chunk.model_extra["context"] for chunk in chunks if "context" in chunk.model_extra}
    assert said == {0: shift(46), 1: shift(138)}


def test_the_documentation_shows_it(client: Client, engine: FakeEngine) -> None:
    (example,) = [json.loads(block.text) for block in blocks(API, "json") if "shift" in block.text]
    engine.shifts = [example["context"]["dropped_tokens"]]
    assert client.post(CHAT, FIELDS).json["context"] == example["context"]
