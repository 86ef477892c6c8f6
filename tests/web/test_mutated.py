"""Mutated requests over every route of an app with a fake engine: none is a 5xx, what is refused changes nothing, and
no step of the event loop computes for long.

(``tests/e2e/test_mutated.py`` does the same to a real server.)
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import pytest
from mutating import Mutant, error_of, mutant

from mullama.config import ServeConfig
from mullama.errors import InvalidRequest
from mullama.kv.eviction import registry as kv_registry
from mullama.scheduling import registry
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.services import Services

from .conftest import Client
from .test_tells import Telling, TellingKv, TellingPlanning

COUNT = 10_000 if os.environ.get("MULLAMA_LONG") else 1500
SEED = int(os.environ.get("MULLAMA_SEED", "1"))


class WholeKv(TellingKv):
    _engine: Whole

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self._engine.kv_policy = kv_registry.create(spec, params)
        return {"policy": spec, "params": dict(self._engine.kv_policy.params())}


class WholePlanning(TellingPlanning):
    _engine: Whole

    def set_arbiter_policy(self, policy: str) -> None:
        if policy not in ("round_robin", "weighted", "priority"):
            raise InvalidRequest(f"there is no arbiter policy '{policy[:40]}'", param="policy")
        self._engine.arbiter_policy = policy

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self._engine.policy = registry.create(spec, params)
        return {"policy": spec, "params": dict(self._engine.policy.params()), "handed_over": 0}

    async def aconfigure(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self._engine.policy.configure(**params)  # type: ignore[attr-defined]
        return {"policy": self._engine.policy.name, "params": dict(self._engine.policy.params()), "handed_over": 0}

    async def aset_shadow(self, spec: str | None, params: Mapping[str, Any] | None = None) -> None:
        self._engine.shadow = None if spec is None else registry.create(spec, params)

    def set_share(self, *, weight: float = 1.0, priority: int = 0) -> None:
        if not 0 < weight <= 1000 or not -1000 <= priority <= 1000:
            raise InvalidRequest("weight: it is out of range", param="weight")
        super().set_share(weight=weight, priority=priority)


class Whole(Telling):
    """With what the real one refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = WholeKv(self)
        self.planning = WholePlanning(self)
        self.policy, self.kv_policy = registry.create("fcfs"), kv_registry.create("lru")
        self.shadow: Any = None


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    engine = Whole()
    engine.reply = ["a"]
    config = ServeConfig(max_body_bytes=1 << 20, store_models=False)
    models = ModelManager([("fake", engine)])

    async def no_watch() -> None:
        """What watches idle models would outlive the loop of a request."""

    monkeypatch.setattr(models.idle, "_watch", no_watch)
    services = Services(config, models)
    yield Client(create_app(config, models, services), services)
    services.close()


def state_of(client: Client) -> dict[str, Any]:
    served = client._services.models.get("fake")
    engine: Any = served.engine
    return {
        "model": (served.state, served.pinned, served.keep_alive_s, served.failures.n),
        "policies": (engine.policy, dict(engine.policy.params()), engine.kv_policy, engine.shadow),
        "engine": (engine.arbiter_policy, dict(engine.share), dict(engine.loras)),
        "calls": [call for call in engine.kv_calls if call[0] not in ("save", "load", "policy")],
    }


def sendable(one: Mutant) -> bool:
    """Whether a client could send it; and one that is answered without end, or by others, is left out."""
    path = one.path
    return not path.endswith(("/events", "/pull")) and all(char.isprintable() for char in path)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each step of an event loop has computed, in ns of its thread: other programs do not count."""
    found: list[int] = []
    run = asyncio.Handle._run  # type: ignore[attr-defined]

    def timed(self: Any) -> None:
        began = time.thread_time_ns()
        run(self)
        found.append(time.thread_time_ns() - began)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    return found


def test_mutated_requests(client: Client, steps: list[int]) -> None:
    rng = random.Random(SEED)
    statuses = set()
    worst = (0, "")
    all_steps: list[int] = []
    for _ in range(COUNT):
        one = mutant(rng, "fake")
        if not sendable(one):
            continue
        before = state_of(client)
        headers = {name: value for name, value in one.headers.items() if value.isprintable() or value == "\t"}
        result = client.request(one.method, quote(one.path, safe="/%;"), one.body or b"", headers, one.query)
        statuses.add(result.status)
        worst = max(worst, (max(steps), str(one)))
        all_steps += steps
        steps.clear()
        told = f"{result.status} {result.body[:300]!r}\n{one}"
        if result.status >= 400 and result.body:
            message, code = error_of(result.body)
            assert message, told
            if one.method != "GET":
                assert state_of(client) == before, told
            assert result.status < 500 or result.status == 501 or (result.status, code) == (503, "queue_full"), told
        assert result.status < 500 or result.body, told
    assert {200, 400, 404, 405, 415} <= statuses
    all_steps.sort()
    p99 = all_steps[int(0.99 * len(all_steps))] / 1e6
    print(f"{len(all_steps)} steps of the event loop: p99 {p99:.2f} ms, worst {worst[0] / 1e6:.1f} ms in {worst[1]}")
    assert worst[0] <= 50e6 and p99 <= 10, worst
