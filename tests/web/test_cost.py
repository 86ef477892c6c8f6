"""What a short request costs the event loop, in calls: times depend on the machine, and calls are what is added."""

from __future__ import annotations

import dataclasses
import sys
import typing
import uuid
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import mullama
from mullama.engine.client import AsyncGeneration
from mullama.types import Request

from .conftest import Client
from .fake_engine import FakeEngine

OURS = str(Path(mullama.__file__).parent)
#: What looks into classes, or copies objects, each time that it is asked.
DEAR = {str(module.__file__) for module in (dataclasses, typing, uuid)}
MOST = 98  # calls of our own functions until the engine has a request; what is resumed counts again

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
TEXT = ("/v1/completions", {"prompt": "hi"})
KEYS = {"X-Profile": "true", "Authorization": "Bearer none", "X-Request-ID": "mine"}

Calls = Counter[tuple[str, str]]  # by file and function


class Counted:
    """The app, and what is called while it answers: ``until_submit``, and in ``all``."""

    def __init__(self, client: Client, engine: FakeEngine) -> None:
        self._app, self._submit = client.app, engine.submit
        self.all: Calls = Counter()
        self.until_submit: Calls = Counter()

    def submit(self, request: Request) -> AsyncGeneration:
        self.until_submit = self.all.copy()
        return self._submit(request)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.all.clear()
        sys.setprofile(self._note)
        try:
            await self._app(scope, receive, send)
        finally:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and (code.co_filename.startswith(OURS) or code.co_filename in DEAR):
            self.all[code.co_filename, code.co_name] += 1


@pytest.fixture
def counted(client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(client, engine)
    monkeypatch.setattr(client, "app", counted)
    monkeypatch.setattr(engine, "submit", counted.submit)
    return counted


@pytest.mark.parametrize("headers", [{}, KEYS])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [CHAT, TEXT])
def test_a_short_request_takes_few_calls(
    client: Client, counted: Counted, path: str, body: dict[str, Any], stream: bool, headers: dict[str, str]
) -> None:
    body = {**body, "stream": stream, "max_tokens": 4, "temperature": 0}
    for _ in range(2):  # the first one makes what is made once
        assert client.post(path, body, headers=headers).status == 200
    assert [call for call in counted.all if call[0] in DEAR] == []
    assert 0 < counted.until_submit.total() <= MOST, counted.until_submit.most_common(12)
