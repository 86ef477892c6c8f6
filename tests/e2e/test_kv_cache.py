"""The KV cache over HTTP, in a real process: sharing, salts, inspection, a restart after kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from .support import ServerProcess, wait_until

Start = Callable[..., ServerProcess]
REQUESTS = 500 if os.environ.get("MULLAMA_LONG") else 60
SYSTEM = "You are the keeper of a lighthouse, and you answer every question about the sea in one short sentence. " * 6


def ask(server: ServerProcess, question: str, **fields: Any) -> dict[str, Any]:
    """A completion with its profile."""
    body = {"prompt": SYSTEM + question, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    reply = httpx.post(server.url + "/v1/completions", json=body, headers={"X-Profile": "true"}, timeout=120)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    profile = answer["profile"]
    assert profile["kv_cache_hit"] + profile["kv_cache_miss"] == profile["prompt_tokens"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == profile["kv_cache_hit"]
    return answer


def get(server: ServerProcess, path: str) -> dict[str, Any]:
    reply = httpx.get(server.url + path, timeout=60)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_a_shared_prefix_is_computed_once(start: Start) -> None:
    server = start("--parallel", "4", "--ctx-size", "512")
    with ThreadPoolExecutor(4) as pool:
        profiles = [a["profile"] for a in pool.map(lambda i: ask(server, f" Question {i}: why?"), range(4))]
    hits = sorted(profile["kv_cache_hit"] for profile in profiles)
    assert hits[0] == 0 and hits[1] > 100, "one computed the prefix, the others took it over"
    totals = get(server, "/internal/kv")["totals"]
    assert totals["kv_cache_hit"] == sum(hits)
    assert totals["kv_cache_miss"] == sum(profile["kv_cache_miss"] for profile in profiles)


def test_salts_keep_tenants_apart(start: Start) -> None:
    server = start("--parallel", "2", "--ctx-size", "512")
    assert ask(server, " Why?", cache_salt="a")["profile"]["kv_cache_hit"] == 0
    assert ask(server, " Why?", cache_salt="b")["profile"]["kv_cache_source"] == "none"
    assert ask(server, " Why?")["profile"]["kv_cache_hit"] == 0
    again = ask(server, " Why?", cache_salt="a")["profile"]
    assert again["kv_cache_hit"] == again["prompt_tokens"] - 1
    assert len({node["namespace"] for node in get(server, "/internal/kv/tree")["nodes"]}) == 3


def test_what_is_cached_can_be_seen_pinned_and_dropped(start: Start) -> None:
    server = start("--parallel", "2", "--ctx-size", "512")
    first = ask(server, " One?")
    view = get(server, "/internal/kv")
    assert view["audit"] == []
    (row,) = [slot for slot in view["slots"] if slot["state"] == "retained"]
    cells = first["profile"]["prompt_tokens"] + 8 - 1
    assert row["cells"] == cells == view["cells_used"]
    runs = get(server, "/internal/kv/map")["caches"][0]["streams"][row["slot"]]["runs"]
    assert sum(n for _, n, owner in runs if owner == row["slot"]) == cells
    pinned = httpx.post(server.url + "/internal/kv/pin", json={"prompt": SYSTEM, "ttl_s": 60}).json()
    assert pinned["pinned_tokens"] > 100
    assert any(node["pinned_s"] > 50 for node in get(server, "/internal/kv/tree")["nodes"])
    dropped = httpx.post(server.url + "/internal/kv/drop", json={}).json()
    assert dropped["cells_freed"] == cells
    after = get(server, "/internal/kv")
    assert after["cells_used"] == 0 and after["index"]["nodes"] == 0
    kinds = []
    with httpx.stream("GET", server.url + "/internal/kv/events?since=0", timeout=30) as events:
        for line in events.iter_lines():
            if line.startswith("data: "):
                kinds.append(json.loads(line[6:])["kind"])
                if kinds[-1] == "dropped":
                    break
    assert kinds[0] == "stored"


def test_the_disk_tier_survives_kill_9(spawn: Start, start: Start, tmp_path: Path) -> None:
    options = ("--parallel", "2", "--ctx-size", "512", "--kv-disk-dir", str(tmp_path / "kv"))
    server = spawn(*options)
    first = ask(server, " Is it deep?")
    wait_until(lambda: get(server, "/internal/kv")["tiers"]["disk"]["tokens"] >= first["profile"]["prompt_tokens"])
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(10)
    for file in (tmp_path / "kv").rglob("*.kv"):
        (file.parent / ("0" * 32 + ".kv")).write_bytes(file.read_bytes()[:-1])  # torn
        break
    second = ask(start(*options), " Is it deep?")
    assert second["profile"]["kv_cache_source"] == "disk"
    assert second["profile"]["kv_cache_hit"] == second["profile"]["prompt_tokens"] - 1
    assert second["choices"] == first["choices"]


def test_determinism_does_not_depend_on_the_cache_or_on_neighbours(start: Start) -> None:
    """Contexts beyond 512 cells, where the fast attention takes other paths for other batches."""
    server = start("--parallel", "3", "--ctx-size", "1024", "--deterministic")
    long = " The wind turned, and the boats came home before the storm."
    questions = [long * (28 + i) + f" Day {i}:" for i in range(3)]
    alone = []
    for question in questions:
        httpx.post(server.url + "/internal/kv/drop", json={})
        alone.append(ask(server, question, max_tokens=24)["choices"][0]["text"])
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda question: ask(server, question, max_tokens=24), questions))
    assert [answer["choices"][0]["text"] for answer in together] == alone
    again = [ask(server, question, max_tokens=24) for question in questions]
    assert all(answer["profile"]["kv_cache_hit"] > 400 for answer in again)
    assert [answer["choices"][0]["text"] for answer in again] == alone


def test_too_few_cells_for_all_fail_nobody(start: Start) -> None:
    """Requests that fit alone all succeed where the KV budget holds two or three of eight at a time."""
    server = start("--parallel", "8", "--ctx-size", "512", "--kv-tokens", "900", "--max-queue", str(REQUESTS))
    rng = random.Random(7)
    words = SYSTEM.split()
    prompts = [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(20, 260))) for i in range(REQUESTS)]

    def send(prompt: str) -> tuple[int, int]:
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        reply = httpx.post(server.url + "/v1/completions", json=body, timeout=1200)
        return reply.status_code, reply.json().get("usage", {}).get("completion_tokens", 0)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, prompts))
    assert answers == [(200, 24)] * REQUESTS
    server.assert_kv_sound()
