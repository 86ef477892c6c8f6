"""Everything at once: streams that come, go and are cut, policies, weights, adapters and KV that change under them.

20 seconds of it; ``MULLAMA_LONG=1`` makes it ten minutes. What must hold, whatever happened:

- every request ends: with its whole text, with an error that is meant, or because its client left;
- greedy texts are those of a calm server, with an adapter and without;
- nobody waits for longer than the work that was before him: the longest wait is printed, and a request without an end
  is reported with what it waited for, overload and starvation told apart;
- nobody holds up the event loop;
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

import adapters
import httpx

from . import watched
from .support import COMPLETIONS, NAME, ServerProcess, wait_until

SECONDS = 600.0 if os.environ.get("MULLAMA_LONG") else 20.0
SEED = int(os.environ.get("MULLAMA_SEED", "1"))
CLIENTS = 16
TOKENS = 12
PROMPTS = [f"{subject} {verb}" for subject in ("The king", "A dog", "My house", "Two of us") for verb in ("is", "went")]
POLICIES = ["fcfs", "round_robin", "priority", "preemptive", "fair", "srpt", "deadline"]
KV_POLICIES = ["lru", "lfu", "fifo", "cost", "turns"]
ADMIN = {"Authorization": "Bearer admin-of-chaos"}
LORA, OTHER = "style", "other"  # requests ask for the first, the second comes and goes
#: Errors that are meant: the queue is full, the model is busy, or it changes its weights in this moment.
MEANT = {(503, "queue_full"), (409, "model_busy"), (409, "model_not_loaded")}


#: A prompt, and whether the adapter computes it.
Asked = tuple[str, bool]


@dataclass
class Seen:
    """What the clients saw. Shared by their threads."""

    ended: list[tuple[float, float, int]] = field(default_factory=list)  # of whole answers: began, ended, priority
    answered: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest: tuple[float, int] = (0.0, 0)  # seconds, priority
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, began: float, priority: int) -> None:
        now = time.monotonic()
        with self.lock:
            self.answered[what] += 1
            self.longest = max(self.longest, (round(now - began, 1), priority))
            if what == "whole":
                self.ended.append((began, now, priority))

    def why(self, began: float, priority: int) -> str:
        """What a request waited for that has had no end: the server had no time, or others were let in before it."""
        with self.lock:
            ended = [one for one in self.ended if one[1] > began]
        later = [one for one in ended if one[0] > began]
        no_better = sum(one[2] >= priority for one in later)
        if later:
            return f"starvation: {len(later)} that came later were answered, {no_better} of them of no better priority"
        return f"overload: {len(ended)} that came before were answered meanwhile, and none that came later"

    def complain(self, text: str) -> None:
        with self.lock:
            self.wrong.append(text)


def where(http: httpx.Client, tag: float) -> str:
    """What the server says of the request with that ``slo_ms``, and of itself."""
    try:
        row = http.get("/internal/models", headers=ADMIN).json()["models"][0]
        view = http.get("/internal/scheduler", headers=ADMIN).json()
    except (httpx.HTTPError, ValueError) as error:
        return f"the server does not say where it is: {error!r}"
    state = {name: row.get(name) for name in ("state", "in_use", "waiting_for_load", "running", "waiting", "error")}
    told = f"the model: {state}, policy {view.get('policy')}, step {view.get('step')}"
    for one in [*view.get("waiting", ()), *view.get("running", ())]:
        if one["slo_ms"] == tag:
            return f"it is {one}; {told}"
    return f"the engine has no such request; {told}"


def one_request(http: httpx.Client, rng: random.Random, texts: dict[Asked, str], seen: Seen) -> None:
    prompt, priority, is_styled = rng.choice(PROMPTS), rng.randint(-3, 3), rng.random() < 0.3
    stream, leaves = rng.random() < 0.7, rng.random() < 0.2
    body = {
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": TOKENS,
        "stream": stream,
        "priority": priority,
        "preempt": rng.choice(["auto", "swap", "recompute"]),
        "user": rng.choice("abc"),
        "slo_ms": 5000 + rng.random(),  # by which it is found again
        "lora": [{"id": LORA}] if is_styled else [],
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
                        seen.note("left", began, priority)
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
        seen.complain(
            f"no end after {time.monotonic() - began:.0f} s, {seen.why(began, priority)}; "
            f"{where(http, body['slo_ms'])}: {body}"
        )
        return
    if error is not None:
        if error not in MEANT:
            seen.complain(f"{error}: {body}")
        seen.note(f"refused {error[1]}", began, priority)
        return
    if reason not in ("length", "stop"):
        seen.complain(f"it ended with {reason!r}: {body}")
    elif text != texts[prompt, is_styled]:
        seen.complain(f"{prompt!r} went on with {text!r} instead of {texts[prompt, is_styled]!r}: {body}")
    seen.note("whole", began, priority)


def trouble(http: httpx.Client, rng: random.Random, files: list[str], adapter: str, done: Counter[str]) -> None:
    """Something that an operator may do at any time; what the moment forbids is answered with 409."""
    kinds = ["scheduler", "scheduler", "kv policy", "swap", "shadow", "drop", "pin", "sleep", "look", "lora", "no lora"]
    kind = rng.choice(kinds)
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
    elif kind == "lora":
        path, method = f"/internal/models/{NAME}/adapters", "POST"
        body = {"path": adapter, "id": OTHER}
    elif kind == "no lora":
        path, method, body = f"/internal/models/{NAME}/adapters/{OTHER}", "DELETE", {}
    elif kind == "look":
        path, method = rng.choice(["/internal/kv", "/internal/memory", "/internal/kv/tree", "/internal/arbiter"]), "GET"
    answer = http.request(method, path, json=body if method != "GET" else None)
    is_as_it_was = {"lora": "is loaded already", "no lora": "no adapter"}.get(kind, "\n") in answer.text
    assert answer.status_code in (200, 409) or is_as_it_was, f"{kind}: {answer.status_code} {answer.text}"
    done[f"{kind} {answer.status_code}"] += 1


def resources(server: ServerProcess) -> dict[str, int]:
    proc = Path(f"/proc/{server.pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    return {
        "threads": len(list((proc / "task").iterdir())),
        "descriptors": len(list((proc / "fd").iterdir())),
        "resident": int(status["VmRSS"].split()[0]) >> 10,
    }


def calm(server: ServerProcess) -> dict[Asked, str]:
    """The text of each prompt, alone, with the adapter and without."""
    texts = {}
    for prompt in PROMPTS:
        for is_styled in (False, True):
            body = {"prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "lora": [{"id": LORA}] * is_styled}
            texts[prompt, is_styled] = server.post(COMPLETIONS, body).json()["choices"][0]["text"]
    return texts


def test_overload_and_starvation_are_told_apart() -> None:
    seen = Seen()
    began = time.monotonic() - 10.0
    seen.ended = [(began - 5.0, began - 1.0, 0), (began - 5.0, began + 1.0, 0)]
    assert seen.why(began, 1) == "overload: 1 that came before were answered meanwhile, and none that came later"
    seen.note("whole", began + 2.0, -1)
    seen.note("whole", began + 3.0, 2)
    assert seen.why(began, 1) == "starvation: 2 that came later were answered, 1 of them of no better priority"


def test_chaos(start: Callable[..., ServerProcess], smollm2: Path, tmp_path: Path) -> None:
    files = [str(shutil.copy(smollm2, tmp_path / name)) for name in ("twin-a.gguf", "twin-b.gguf")]
    style, other = (str(adapters.build(tmp_path / f"{n}.gguf", smollm2, seed=n)) for n in (1, 2))
    server = start(
        *("--admin-key", "admin-of-chaos", "--scheduler", "preemptive", "--scheduler-arg", "ageing_s=1"),
        *("--ctx-size", "128", "--parallel", "4", "--max-queue", "64", "--deterministic", "--no-store-models"),
        *("--lora", f"{LORA}={style}"),
        program=watched.program(tmp_path / "notes"),
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
        assert http.post(f"/internal/models/{NAME}/adapters", json={"path": other, "id": OTHER}).status_code == 200
        before = resources(server)
        clients = [threading.Thread(target=client, args=(SEED * 1000 + i,)) for i in range(CLIENTS)]
        for one in clients:
            one.start()
        end = time.monotonic() + SECONDS
        try:
            while time.monotonic() < end:
                trouble(http, rng, files, other, done)
                time.sleep(rng.uniform(0.0, 0.3))
        finally:
            stop.set()
            for one in clients:
                one.join()
        print(f"{sum(seen.answered.values())} requests: {dict(seen.answered)}; trouble: {dict(done)}")
        watched.check_lag(tmp_path / "notes")
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
