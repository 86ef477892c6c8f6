"""Streams that run while the weights of their engine change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from core_support import greedy

from mullama.engine.engine import Engine
from mullama.types import FinishReason, Request

PROMPTS = ["the sun is here", "all that we have to do here and there and", "I", "of her and the others in it"]


def request(name: str, prompt: str, n: int = 60, **more: Any) -> Request:
    return Request(name, list(prompt.encode()), greedy(n), **more)


class Streams:
    """Requests that run in threads of their own until they have ended."""

    def __init__(self, engine: Engine, requests: list[Request]) -> None:
        self.generations = [engine.submit_sync(one) for one in requests]
        self.texts = [""] * len(requests)
        self._threads = [threading.Thread(target=self._read, args=(i,)) for i in range(len(requests))]
        for thread in self._threads:
            thread.start()

    def _read(self, i: int) -> None:
        for delta in self.generations[i]:
            self.texts[i] += delta.text

    def join(self) -> list[str]:
        for thread in self._threads:
            thread.join()
        return self.texts

    @property
    def spans(self) -> list[list[tuple[str, int]]]:
        return [[(s.weights, s.from_token) for s in g.finish.profile.weights] for g in self.generations if g.finish]


def wait_for_tokens(engine: Engine, n: int) -> None:
    deadline = time.monotonic() + 60
    while engine.counters()["sampled_tokens"] < n:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def run(engine: Engine, requests: list[Request], during: Callable[[], Any] = lambda: None) -> Streams:
    before = engine.counters()["sampled_tokens"]
    streams = Streams(engine, requests)
    wait_for_tokens(engine, before + 20)
    during()
    streams.join()
    assert [g.finish.reason for g in streams.generations if g.finish] == [FinishReason.LENGTH] * len(requests)
    return streams


def say(engine: Engine, prompt: list[int], n: int = 5) -> str:
    return "".join(delta.text for delta in engine.submit_sync(Request("say", prompt, greedy(n))))


def begins_alike(streams: Streams, plain: list[str]) -> bool:
    """Whether each text is what it was up to the change of weights: what is computed again may differ in last bits."""
    starts = [spans[1][1] for spans in streams.spans]
    return all(a[:n] == b[:n] for a, b, n in zip(streams.texts, plain, starts, strict=True))


def requests(n: int = 440) -> list[Request]:
    """So long that they outlast what happens to them meanwhile, and still fit a context of 512 tokens."""
    return [request(f"r{i}", prompt, n) for i, prompt in enumerate(PROMPTS)]
