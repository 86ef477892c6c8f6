"""Everything at once: streams that come, go and are cut, policies, weights and KV that change under them.

20 seconds of it; ``MULLAMA_LONG=1`` makes it ten minutes. What must hold, whatever happened:

- every request ends: with its whole text, with an error that is meant, or because its client left;
- greedy texts are those of a calm server;
- nobody waits for longer than the work that was before him (``longest`` is printed, with what was waited for);
- afterwards threads, descriptors and memory are back, the KV cache's audit is clean, nothing runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .support import COMPLETIONS, NAME, ServerProcess, wait_until

SECONDS = 600.0 if os.environ.get("MULLAMA_LONG") else 20.0
SEED = int(os.environ.get("MULLAMA_SEED", "1"))
CLIENTS = 16
TOKENS = 12
PROMPTS = [f"{subject} {verb}" for subject in ("The king", "A dog", "My house", "Two of us") for verb in ("is", "went")]
POLICIES = ["fcfs", "round_robin", "priority", "preemptive", "fair", "srpt", "deadline"]
KV_POLICIES = ["lru", "lfu", "fifo", "cost", "turns"]
ADMIN = {"Authorization": "Bearer admin-of-chaos"}
#: Errors that are meant: the queue is full, the model is busy, or it changes its weights in this moment.
MEANT = {(503, "queue_full"), (409, "model_busy"), (409, "model_not_loaded")}


@dataclass
class Seen:
    """What the clients saw. Shared by their threads."""

    answered: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest: tuple[float, int] = (0.0, 0)  # seconds, priority
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, seconds: float, priority: int) -> None:
        with self.lock:
            self.answered[what] += 1
            self.longest = max(self.longest, (round(seconds, 1), priority))

    def complain(self, text: str) -> None:
        with self.lock:
            self.wrong.append(text)


def one_request(http: httpx.Client, rng: random.Random, texts: dict[str, str], seen: Seen) -> None:
    prompt, priority = rng.choice(PROMPTS), rng.randint(-3, 3)
    stream, leaves = rng.random() < 0.7, rng.random() < 0.2
    body = {
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": TOKENS,
        "stream": stream,
        "priority": priority,
        "preempt": rng.choice(["auto", "swap", "recompute"]),
        "user": rng.choice("abc"),
        "slo_ms": 5000,
    }
    began = time.monotonic()
    text, reason, error = "", None, None
    try:
        with http.stream("POST", COMPLETIONS, json=body) as answer:
            if answer.status_code != 200:
                found = json.loads(answer.read())["error"]
                error = (answer.status_code, found["code"])
            elif not stream:
                (choice,) = json.loads(answer.read())["choices"]
                text, reason = choice["text"], choice["finish_reason"]
            else:
                for line in answer.iter_lines():
                    if leaves and rng.random() < 0.3:
                        seen.note("left", time.monotonic() - began, priority)
                        return
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        error = (200, event["error"]["code"])
                        break
                    for choice in event["choices"]:
                        text += choice["text"]
                        reason = choice["finish_reason"] or reason
    except httpx.TimeoutException:
        seen.complain(f"no end after {time.monotonic() - began:.0f} s: {body}")
        return
    seconds = time.monotonic() - began
    if error is not None:
        if error not in MEANT:
            seen.complain(f"{error}: {body}")
        seen.note(f"refused {error[1]}", seconds, priority)
        return
    if reason not in ("length", "stop"):
        seen.complain(f"it ended with {reason!r}: {body}")
    elif text != texts[prompt]:
        seen.complain(f"{prompt!r} went on with {text!r} instead of {texts[prompt]!r}")
    seen.note("whole", seconds, priority)


def trouble(http: httpx.Client, rng: random.Random, files: list[str], done: Counter[str]) -> None:
    """Something that an operator may do at any time; what the moment forbids is answered with 409."""
    kind = rng.choice(["scheduler", "scheduler", "kv policy", "swap", "shadow", "drop", "pin", "sleep", "look"])
    path, method, body = "/internal/scheduler", "PUT", {"policy": rng.choice(POLICIES)}
    if kind == "kv policy":
        path, body = "/internal/kv/policy", {"policy": rng.choice(KV_POLICIES)}
    elif kind == "swap":
        path, method = f"/internal/models/{NAME}/swap", "POST"
        body = {"to": rng.choice(files), "kv": rng.choice(["carry", "recompute"])}
    elif kind == "shadow":
        path, body = "/internal/scheduler/shadow", {"policy": rng.choice(POLICIES)}
    elif kind == "drop":
        path, method, body = "/internal/kv/drop", "POST", {"prompt": rng.choice(PROMPTS)}
    elif kind == "pin":
        path, method, body = "/internal/kv/pin", "POST", {"prompt": rng.choice(PROMPTS), "ttl_s": 0.5}  # type: ignore[dict-item]
    elif kind == "sleep":
        path, method, body = f"/internal/models/{NAME}/sleep", "POST", {"level": "host"}
    elif kind == "look":
        path, method = rng.choice(["/internal/kv", "/internal/memory", "/internal/kv/tree", "/internal/arbiter"]), "GET"
    answer = http.request(method, path, json=body if method != "GET" else None)
    assert answer.status_code in (200, 409), f"{kind}: {answer.status_code} {answer.text}"
    done[f"{kind} {answer.status_code}"] += 1


def resources(server: ServerProcess) -> dict[str, int]:
    proc = Path(f"/proc/{server.pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    return {
        "threads": len(list((proc / "task").iterdir())),
        "descriptors": len(list((proc / "fd").iterdir())),
        "resident": int(status["VmRSS"].split()[0]) >> 10,
    }


def calm(server: ServerProcess) -> dict[str, str]:
    """The text of each prompt, alone; and one of every kind of trouble, so that what it takes once is taken."""
    return {
        prompt: server.post(
            COMPLETIONS, {"prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
        ).json()["choices"][0]["text"]
        for prompt in PROMPTS
    }  # fmt: skip


def test_chaos(start: Callable[..., ServerProcess], smollm2: Path, tmp_path: Path) -> None:
    files = [str(shutil.copy(smollm2, tmp_path / name)) for name in ("twin-a.gguf", "twin-b.gguf")]
    server = start(
        *("--admin-key", "admin-of-chaos", "--scheduler", "preemptive", "--scheduler-arg", "ageing_s=1"),
        *("--ctx-size", "128", "--parallel", "4", "--max-queue", "64", "--deterministic", "--no-store-models"),
    )
    texts = calm(server)
    seen, done, rng = Seen(), Counter[str](), random.Random(SEED)
    stop = threading.Event()

    def client(seed: int) -> None:
        mine = random.Random(seed)
        with httpx.Client(base_url=server.url, timeout=120 + SECONDS / 2, trust_env=False) as http:
            while not stop.is_set():
                one_request(http, mine, texts, seen)

    with httpx.Client(base_url=server.url, timeout=120, trust_env=False, headers=ADMIN) as http:
        for path in files:  # once before the resources are counted
            assert http.post(f"/internal/models/{NAME}/swap", json={"to": path}).status_code == 200
        before = resources(server)
        clients = [threading.Thread(target=client, args=(SEED * 1000 + i,)) for i in range(CLIENTS)]
        for one in clients:
            one.start()
        end = time.monotonic() + SECONDS
        try:
            while time.monotonic() < end:
                trouble(http, rng, files, done)
                time.sleep(rng.uniform(0.0, 0.3))
        finally:
            stop.set()
            for one in clients:
                one.join()
        print(f"{sum(seen.answered.values())} requests: {dict(seen.answered)}; trouble: {dict(done)}")
        print(f"longest wait {seen.longest[0]} s, of a request of priority {seen.longest[1]}")
        assert seen.wrong == []
        assert seen.answered["whole"] > 0 and server.process.poll() is None

        def idle() -> bool:
            view = http.get("/internal/scheduler")
            return view.status_code == 200 and not view.json()["running"] and not view.json()["waiting"]

        server.complete(PROMPTS[0])  # wakes it, if it sleeps
        wait_until(idle, 60)
        view = http.get("/internal/kv").json()
        assert view["audit"] == [] and view["cells_running"] == 0 and view["parked_sequences"] == 0
        assert calm(server) == texts
        with contextlib.suppress(httpx.HTTPError):
            http.delete("/internal/scheduler/shadow")

    def is_back() -> Any:
        now = resources(server)
        return now["threads"] <= before["threads"] + 12 and now["descriptors"] <= before["descriptors"] + 6 and now

    after = wait_until(is_back, 60)
    print(f"before {before}, after {after}")
    assert after["resident"] <= before["resident"] * 1.25 + 64, "MiB"
