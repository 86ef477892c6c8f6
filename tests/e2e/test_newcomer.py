"""The first evaluation of somebody new: a model by its name on the hub, one chat with a profile, one look inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_support import Hub, LocalServer, split_tiny

from .support import ServerProcess, clean_env, run_mullama

REPO = "Qwen/Qwen2.5-7B-Instruct-GGUF"
STEM = "qwen2.5-7b-instruct"
#: What the README promises of every profiled answer.
FIRST_FIELDS = (
    *("kv_cache_hit", "kv_cache_miss", "kv_cache_evict", "prefill_ms", "decode_ms", "queue_ms"),
    "time_to_first_token_ms",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub at HF_ENDPOINT with a split model, and empty homes for everybody. ``hub.server`` is the server."""
    (tmp_path / "files").mkdir()
    parts = split_tiny(tmp_path / "files", f"{STEM}-q4_k_m")
    assert len(parts) > 1
    hub = Hub(REPO, {path.name: path.read_bytes() for path in parts} | {f"{STEM}-q2_k.gguf": b"never asked for"})
    with LocalServer(hub) as server:
        hub.server = server  # type: ignore[attr-defined]
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "mullama"))
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield hub


def test_the_first_evaluation(hub: Hub, tmp_path: Path) -> None:
    args = ["--model", REPO, "--quant", "Q4_K_M", "--threads", "1"]
    with ServerProcess(tmp_path / "first", args) as server:
        assert [model["id"] for model in server.get("/v1/models").json()["data"]] == [STEM]
        body = {"model": STEM, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 8}
        reply = server.post("/v1/chat/completions", body, headers={"X-Profile": "true"})
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        assert answer["model"] == STEM
        assert answer["choices"][0]["message"]["content"]
        profile = answer["profile"]
        assert set(FIRST_FIELDS) <= set(profile)
        assert profile["kv_cache_miss"] == answer["usage"]["prompt_tokens"] > 0
        assert profile["prefill_ms"] > 0 and profile["decode_ms"] > 0
        view = server.get("/internal/scheduler").json()
        assert (view["model"], view["waiting"], view["running"]) == (STEM, [], [])

    asked = len(hub.server.seen)  # type: ignore[attr-defined]
    hub.server.routes.clear()  # type: ignore[attr-defined]
    with ServerProcess(tmp_path / "second", args) as server:  # from the cache, without a word to the hub
        server.complete("Hello", max_tokens=2)
    assert len(hub.server.seen) == asked  # type: ignore[attr-defined]


def test_the_same_from_the_command_line(hub: Hub) -> None:
    pulled = run_mullama("pull", f"{REPO}:Q4_K_M")
    assert pulled.returncode == 0, pulled.stderr
    assert b"in 3 files" in pulled.stdout
    asked = run_mullama("run", REPO, "Hello", "--quant", "q4_k_m", "--max-tokens", "4", "--threads", "1")
    assert (asked.returncode, bool(asked.stdout.strip())) == (0, True), asked.stderr
    hub.server.routes.clear()  # type: ignore[attr-defined]
    for command in (("list",), ("show", f"{REPO}:Q4_K_M"), ("du",), ("verify",)):
        done = run_mullama(*command)
        assert done.returncode == 0, done.stderr
        assert STEM.encode() in done.stdout.lower()
    refused = run_mullama("serve", "--model", REPO, "--quant", "Q2_K", "--port", "0", HF_HUB_OFFLINE="1")
    assert refused.returncode == 1
    assert b"no model in Q2_K" in refused.stderr
    assert clean_env()["HF_ENDPOINT"] == hub.server.url  # type: ignore[attr-defined]
