"""What opening a request costs is off the event loop: breakers, many biases, a thousand choices."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mullama.errors import InvalidRequest, QueueFull
from mullama.serving.manager import ModelManager
from mullama.web.openai.schemas import MAX_CHOICES
from mullama.web.services import FEW_BIASES, Services
from mullama.web.stream import generations

from .conftest import Client
from .fake_engine import FakeEngine

POOL = "mullama-web"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "is_dear"),
    [
        ({"dry_multiplier": 1, "dry_sequence_breakers": ["a", "b"]}, True),
        ({"dry_multiplier": 1}, True),
        ({"dry_multiplier": 0, "dry_sequence_breakers": ["a", "b"]}, False),
        ({"logit_bias": {str(i): 1 for i in range(FEW_BIASES + 1)}}, True),
        ({"logit_bias": {str(i): 1 for i in range(FEW_BIASES)}}, False),
        ({}, False),
    ],
)
def test_what_is_dear_is_prepared_in_the_pool_once_for_all_choices(
    client: Client, engine: FakeEngine, path: str, fields: dict[str, Any], is_dear: bool
) -> None:
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "n": 3, **fields}
    assert client.post(path, body).status == 200
    assert len(engine.prepared) == is_dear
    assert all(thread.startswith(POOL) for thread, _ in engine.prepared)
    assert [request.prepared for request in engine.requests] == [1 if is_dear else None] * 3


def test_a_refusal_there_is_the_request_s_own(client: Client, engine: FakeEngine, services: Services) -> None:
    def refuses(sampling: Any) -> Any:
        raise InvalidRequest("dry_sequence_breakers: too many", param="dry_sequence_breakers")

    engine.prepare = refuses  # type: ignore[method-assign]
    result = client.post("/v1/completions", {"prompt": "x", "dry_multiplier": 1})
    assert (result.status, result.error["param"]) == (400, "dry_sequence_breakers")
    assert services.models.get("fake").in_use == 0 and services.n_open == 0 and engine.requests == []


def test_others_go_on_while_a_thousand_choices_are_submitted(
    engine: FakeEngine, services: Services, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    monkeypatch.setattr(generations, "TURN_S", -1.0)  # a turn each
    turns = 0
    submit = engine.submit

    async def counts() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    tasks: list[asyncio.Task[None]] = []

    def submits(request: Any) -> Any:
        if not tasks:
            tasks.append(asyncio.get_running_loop().create_task(counts()))
        elif len(engine.requests) == MAX_CHOICES - 1:
            tasks[0].cancel()
        return submit(request)

    engine.submit = submits  # type: ignore[method-assign]
    engine.reply = ["a"]
    assert client.post("/v1/completions", {"prompt": ["x"] * MAX_CHOICES}).status == 200
    assert turns >= MAX_CHOICES - 2


def test_one_choice_that_is_refused_cancels_those_before(
    client: Client, engine: FakeEngine, services: Services
) -> None:
    engine.submit_errors = [None, None, QueueFull("full", retry_after=1)]
    engine.hang = True
    assert client.post("/v1/completions", {"prompt": ["a", "b", "c", "d"]}).status == 503
    assert [generation.cancelled_at is not None for generation in engine.generations] == [True, True]
    assert services.models.get("fake").in_use == 0 and services.n_open == 0
    assert isinstance(services.models, ModelManager)
