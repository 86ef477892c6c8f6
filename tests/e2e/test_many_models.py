"""Models that come and go under their users, in a real process: nobody touches a model that has been freed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from .support import COMPLETIONS, ServerProcess, connect, long_request, wait_until

ADMIN = {"Authorization": "Bearer adm", "Content-Type": "application/json"}
SIZES = ("--threads", "1", "--ctx-size", "512", "--parallel", "4", "--admin-key", "adm", "--no-store-models")
VIEWS = (
    *("/internal/models", "/internal/memory", "/internal/scheduler?model=m", "/internal/kv?model=m"),
    *("/internal/kv/tree?model=m", "/internal/kv/map?model=m", "/v1/models", "/internal/arbiter"),
)
ROUNDS = 12


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """``serve("a=FILE", "--flag", …)``: a ready server of these models; it ends in order."""
    started: list[ServerProcess] = []

    def run(*args: str) -> ServerProcess:
        models = [word for arg in args if "=" in arg for word in ("--model", arg)]
        flags = [arg for arg in args if "=" not in arg]
        started.append(ServerProcess(tmp_path / f"server{len(started)}", [*models, *SIZES, *flags]))
        return started[-1].wait_ready()

    yield run
    for server in started:
        server.__exit__()


def act(server: ServerProcess, name: str, action: str, **body: Any) -> httpx.Response:
    url = f"{server.url}/internal/models/{name}/{action}"
    return httpx.post(url, json=body, headers=ADMIN, timeout=60)


def states(server: ServerProcess) -> dict[str, str]:
    rows = httpx.get(f"{server.url}/internal/models", headers=ADMIN, timeout=60).json()["models"]
    return {row["name"]: row["state"] for row in rows}


def test_no_endpoint_touches_a_freed_model(
    serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path]
) -> None:
    server = serve(f"m={tiny_model('llama')}", f"other={tiny_model('gemma3')}")
    over = threading.Event()
    seen: set[tuple[str, int]] = set()

    def look(path: str) -> None:
        while not over.is_set():
            seen.add((path, httpx.get(server.url + path, headers=ADMIN, timeout=60).status_code))

    def change() -> None:
        prompt = "the sun is not the moon, and what is it then? " * 4
        while not over.is_set():
            for path in ("pin", "unpin", "drop"):
                body = {"prompt": prompt, **({"ttl_s": 5} if path == "pin" else {})}
                url = f"{server.url}/internal/kv/{path}?model=m"
                seen.add((path, httpx.post(url, json=body, headers=ADMIN, timeout=60).status_code))

    def ask() -> None:
        while not over.is_set():
            body = {"model": "m", "prompt": "the sun", "max_tokens": 4, "ignore_eos": True}
            answer = httpx.post(server.url + COMPLETIONS, json=body, headers=ADMIN, timeout=60)
            seen.add(("completions", answer.status_code))

    with ThreadPoolExecutor(len(VIEWS) + 2) as pool:
        work = [pool.submit(look, path) for path in VIEWS] + [pool.submit(change), pool.submit(ask)]
        try:
            for _ in range(ROUNDS):
                assert act(server, "m", "unload", force=True).status_code == 200
                assert act(server, "m", "load").status_code == 200
        finally:
            over.set()
        for one in work:
            one.result()
    # Not loaded now, or closed under the question: both are said. Nothing else may come of it.
    assert {status for _, status in seen} <= {200, 409, 503}, sorted(seen)
    assert {path for path, status in seen if status == 200} >= {*VIEWS, "completions"}
    assert server.process.poll() is None


def test_whichever_ends_first_makes_room(serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path]) -> None:
    names = {"a": tiny_model("llama"), "b": tiny_model("gemma3"), "c": tiny_model("llama", seed=8)}
    server = serve(*(f"{name}={path}" for name, path in names.items()), "--max-models", "2")
    headers = "Authorization: Bearer adm\r\n"
    with connect(server) as long, connect(server) as short:
        long.send(COMPLETIONS, long_request(model="a"), headers=headers)
        assert long.head()[0] == 200
        short.send(COMPLETIONS, long_request(model="b"), headers=headers)
        assert short.head()[0] == 200
        with ThreadPoolExecutor(1) as pool:
            body = {"model": "c", "prompt": "x", "max_tokens": 1}
            waiting = pool.submit(httpx.post, server.url + COMPLETIONS, json=body, headers=ADMIN, timeout=60)
            wait_until(lambda: "unloading" in states(server).values() or waiting.done())
            short.close()
            assert waiting.result().status_code == 200
    wait_until(lambda: "unloading" not in states(server).values())
    found = states(server)
    assert found["c"] == "ready"
    assert sorted(found.values()) == ["ready", "ready", "unloaded"]


def test_a_request_keeps_its_model_until_it_has_ended(
    serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path]
) -> None:
    server = serve(f"a={tiny_model('llama')}")
    with connect(server) as stream:
        stream.send(COMPLETIONS, long_request(model="a"), headers="Authorization: Bearer adm\r\n")
        assert stream.head()[0] == 200
        assert stream.chunk()
        refused = act(server, "a", "unload")
        # a tiny model fills its context in no time: then there is nothing to refuse any more
        assert refused.status_code in (200, 409)
        assert stream.rest().endswith(b"data: [DONE]\n\n")
    assert act(server, "a", "unload", force=True).json()["state"] == "unloaded"
    body = {"model": "a", "prompt": "x", "max_tokens": 1, "keep_alive": 0}
    assert httpx.post(server.url + COMPLETIONS, json=body, headers=ADMIN, timeout=60).status_code == 200
    wait_until(lambda: states(server)["a"] == "unloaded")


def test_a_model_that_is_gone_is_an_error_of_its_own(
    serve: Callable[..., ServerProcess], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "b.gguf"
    file.write_bytes(tiny_model("gemma3").read_bytes())
    server = serve(f"a={tiny_model('llama')}", f"b={file}", "--max-models", "1")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    body = {"model": "b", "prompt": "x", "max_tokens": 1}
    for _ in range(2):
        answer = httpx.post(server.url + COMPLETIONS, json=body, headers=ADMIN, timeout=60)
        assert answer.status_code in (400, 404, 500), answer.text
        assert answer.json()["error"]["message"]
    assert states(server)["b"] == "failed"
    ok = httpx.post(server.url + COMPLETIONS, json={**body, "model": "a"}, headers=ADMIN, timeout=60)
    assert ok.status_code == 200
    file.write_bytes(whole)
    assert act(server, "b", "load").json()["state"] == "ready"  # by hand there is no pause after failures
    answer = httpx.post(server.url + COMPLETIONS, json=body, headers=ADMIN, timeout=60)
    assert answer.status_code == 200, answer.text
