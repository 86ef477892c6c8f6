"""Mutated requests over every route: no 5xx, no hang, what is refused changes nothing, nobody holds up the event loop.

``MULLAMA_LONG=1`` sends 10,000 of them. ``MULLAMA_SEED`` picks others.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import falcon.inspect
import httpx
from mutating import VALID, Mutant, error_of, mutant

from mullama.config import ServeConfig
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.internal.model_routes import ACTIONS
from mullama.web.services import Services

from . import watched
from .support import NAME, ServerProcess

COUNT = 10_000 if os.environ.get("MULLAMA_LONG") else 300
SEED = int(os.environ.get("MULLAMA_SEED", "1"))
#: They take a model away, which is tested elsewhere, and would make every other request wait for it.
LEFT_OUT = {"unload", "sleep", "wake"}


def test_every_route_is_among_the_valid_requests() -> None:
    config = ServeConfig()
    models = ModelManager()
    services = Services(config, models)
    try:
        sent = {path.replace("{model}", "x") for _, path, _, _ in VALID}
        for route in falcon.inspect.inspect_routes(create_app(config, models, services)):
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            shape = re.sub(r"x$", "[^/]+", re.escape(path)) if path.endswith("/x") else re.escape(path)
            assert any(re.fullmatch(shape, one) for one in sent), f"tests/mutating.py: add {route.path} to VALID"
    finally:
        services.close()
    sent_actions = {path.rpartition("/")[2] for method, path, _, _ in VALID if method == "POST"}
    assert set(ACTIONS) - LEFT_OUT <= sent_actions


def state_of(client: httpx.Client) -> dict[str, Any]:
    """What an operator may set, as the server shows it."""

    def shown(path: str) -> Any:
        answer = client.get(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    (row,) = shown("/internal/models")["models"]
    scheduler = shown("/internal/scheduler")
    arbiter = shown("/internal/arbiter")
    shares = {name: (one["weight"], one["priority"]) for name, one in arbiter["models"].items()}
    return {
        "model": {name: row[name] for name in ("name", "state", "pinned", "keep_alive_s", "weights", "error")},
        "scheduler": {name: scheduler[name] for name in ("policy", "params", "fallback")},
        "shadow": scheduler["shadow"] and scheduler["shadow"]["policy"],
        "kv_policy": shown("/internal/kv/policy"),
        "arbiter": (arbiter["policy"], shares),
        "adapters": shown(f"/internal/models/{NAME}/adapters")["adapters"],
    }


def keep(client: httpx.Client) -> None:
    """The model stays: a request that was taken may have set a ``keep_alive`` of no time at all."""
    for action, body in (("pin", {"keep_alive": -1}), ("load", {})):
        answer = client.post(f"/internal/models/{NAME}/{action}", json=body)
        assert answer.status_code == 200, answer.text


def send(client: httpx.Client, one: Mutant) -> tuple[int, bytes]:
    """Status and (of an endless response the beginning of) the body."""
    url = f"{one.path}?{one.query}" if one.query else one.path
    with client.stream(one.method, url, content=one.body, headers=one.headers) as answer:
        if "/kv/events" in one.path and answer.status_code == 200:
            return answer.status_code, b""
        return answer.status_code, answer.read()


def check(one: Mutant, status: int, body: bytes) -> None:
    told = f"{status} {body[:300]!r}\n{one}"
    if status >= 400 and body and one.method != "HEAD":
        message, code = error_of(body)
        assert message and "Traceback" not in message, told
        if status == 503 and (code == "queue_full" or "queue" in message):
            return  # many choices at once are more than the queue takes
        if status == 501:
            return  # a route that is there to say that its work is not
        if one.path.endswith("/pull"):
            return  # there is no such model, and nobody to ask
    assert status < 500, told


def test_mutated_requests(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    server = start(
        *("--ctx-size", "128", "--parallel", "2", "--max-queue", "64", "--no-store-models"),
        program=watched.program(notes),
    )
    rng = random.Random(SEED)
    answered: Counter[int] = Counter()
    sent: list[tuple[int, Mutant]] = []
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        state = state_of(client)
        for _ in range(COUNT):
            one = mutant(rng, NAME)
            sent.append((time.monotonic_ns(), one))
            try:
                status, body = send(client, one)
            except httpx.RemoteProtocolError:
                # A head that is no HTTP ends its connection, and nothing else.
                status, body = 400, b""
            except (httpx.InvalidURL, UnicodeEncodeError, httpx.LocalProtocolError):
                continue  # it cannot even be sent
            answered[status] += 1
            check(one, status, body)
            if one.method not in ("GET", "HEAD", "OPTIONS"):
                if status < 400:
                    keep(client)
                try:
                    now = state_of(client)
                except AssertionError as error:
                    raise AssertionError(f"{error} after {status} {body[:300]!r}\n{one}") from None
                assert status < 400 or now == state, f"refused with {status}, and changed something\n{one}"
                state = now
    print(f"{COUNT} requests: {dict(sorted(answered.items()))}")
    assert {status // 100 for status in answered} >= {2, 4}
    server.assert_serving()
    assert server.kv()["audit"] == []
    watched.check_lag(notes, [(at, str(one)) for at, one in sent])
