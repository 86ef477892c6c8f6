"""Sleep on a real process: memory goes back, cached KV is found after the wake, and nobody who asks is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from .support import COMPLETIONS, ServerProcess, wait_until

ADMIN = {"Authorization": "Bearer adm"}
PROMPT = "a prompt that is long enough to be kept when the model sleeps, for it has some hundred bytes and more"


@pytest.fixture
def serve(tmp_path: Path, tiny_model: Callable[..., Path]) -> Iterator[Callable[..., ServerProcess]]:
    started: list[ServerProcess] = []

    def run(*args: str) -> ServerProcess:
        sizes = ["--threads", "1", "--ctx-size", "512", "--parallel", "4", "--admin-key", "adm", "--no-store-models"]
        server = ServerProcess(tmp_path / "server", ["--model", f"m={tiny_model()}", *sizes, *args])
        started.append(server)
        return server.wait_ready()

    yield run
    for server in started:
        server.kill()


def complete(server: ServerProcess) -> dict[str, Any]:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(server.url + COMPLETIONS, json=body, headers={"X-Profile": "true"}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def act(server: ServerProcess, action: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/internal/models/m/{action}", json=body or {}, headers=ADMIN, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def get(server: ServerProcess, path: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(server.url + path, headers=ADMIN, timeout=60).json()
    return found


@pytest.mark.parametrize("level", ["host", "disk"])
def test_a_request_wakes_it_on_its_cached_kv(serve: Callable[..., ServerProcess], tmp_path: Path, level: str) -> None:
    server = serve("--deterministic", "--kv-disk-dir", str(tmp_path / "kv"), "--kv-host-bytes", str(1 << 24))
    text = complete(server)["choices"][0]["text"]
    for _ in range(3):
        wait_until(lambda: get(server, "/internal/models/m")["in_use"] == 0)  # answered, and put away
        row = act(server, "sleep", {"level": level})
        assert (row["state"], row["asleep"]["level"]) == ("asleep", level)
        held = get(server, "/internal/memory")["models"]["m"]
        assert held["weights"]["allocated_bytes"] == held["kv"]["allocated_bytes"] == 0
        assert (held["host_tier_bytes"] > 0) is (level == "host")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: complete(server), range(4)))
        assert {answer["choices"][0]["text"] for answer in answers} == {text}
        assert level in {answer["profile"]["kv_cache_source"] for answer in answers}
        assert get(server, "/internal/models/m")["state"] == "ready"


def test_one_that_nobody_ever_asked_sleeps_and_is_unloaded(serve: Callable[..., ServerProcess]) -> None:
    server = serve("--sleep-after", "0", "--keep-alive", "2")
    wait_until(lambda: get(server, "/internal/models/m")["state"] in ("asleep", "unloaded"))
    wait_until(lambda: get(server, "/internal/models/m")["state"] == "unloaded")
    row = get(server, "/internal/models/m")
    assert (row["memory_bytes"], row["expires_in_s"], row["requests"]) == (None, None, 0)


def test_an_idle_one_sleeps_by_itself(serve: Callable[..., ServerProcess]) -> None:
    server = serve("--sleep-after", "100ms")
    complete(server)
    wait_until(lambda: get(server, "/internal/models/m")["state"] == "asleep")
    assert act(server, "wake")["state"] == "ready"
    complete(server)
