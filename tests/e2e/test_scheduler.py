"""Policies over HTTP: swapped while 16 streams run, changed, refused, read from a file, shadowed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from .support import COMPLETIONS, ServerProcess, connect, events_of, long_request, run_mullama, text_of, wait_until

Start = Callable[..., ServerProcess]
VIEW = "/internal/scheduler"
SWAPS = 200 if os.environ.get("MULLAMA_LONG") else 40
STREAMS = 16
POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("round_robin", {"quantum_tokens": 5}),
    ("priority", {"ageing_s": 1}),
    ("preemptive", {}),
    ("fair", {"prefill_budget": 16}),
    ("srpt", {}),
    ("deadline", {"default_slo_ms": 500}),
    ("fcfs", {"chunk": 8}),
]


def put(server: ServerProcess, policy: str, params: dict[str, Any] | None = None, **extra: Any) -> httpx.Response:
    body = {"policy": policy, "params": params or {}}
    return httpx.put(server.url + VIEW, json=body, timeout=60, **extra)


def body_of(index: int) -> dict[str, Any]:
    """A short context: there greedy output does not depend on who computes beside it."""
    return {
        "prompt": f"Item {index}: the colour of the", "max_tokens": 24, "temperature": 0, "ignore_eos": True,
        "stream": True, "priority": index % 4, "user": f"tenant {index % 3}", "slo_ms": 50 * (1 + index % 5),
    }  # fmt: skip


def streamed(server: ServerProcess, index: int) -> str:
    """The text of one streamed answer, which must be complete."""
    with connect(server) as raw:
        raw.send(COMPLETIONS, body_of(index))
        status, _ = raw.head()
        assert status == 200
        events = events_of(raw.rest())
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    return text_of(events)


def test_swaps_under_streams_drop_nothing(start: Start) -> None:
    server = start("--parallel", "4", "--ctx-size", "512")
    alone = [streamed(server, index) for index in range(STREAMS)]
    swaps_done = threading.Event()

    def client(index: int) -> int:
        """The same request again and again while policies change; how often it was asked."""
        asked = 0
        while not swaps_done.is_set() or not asked:
            assert streamed(server, index) == alone[index]
            asked += 1
        return asked

    handed_over = []
    with ThreadPoolExecutor(STREAMS) as pool:
        clients = [pool.submit(client, index) for index in range(STREAMS)]
        try:
            wait_until(lambda: server.busy() > 4)
            for number in range(SWAPS):
                policy, params = POLICIES[number % len(POLICIES)]
                reply = put(server, policy, params)
                assert reply.status_code == 200, reply.text
                answer = reply.json()
                assert (answer["policy"], answer["params"] | params) == (policy, answer["params"])
                handed_over.append(answer["handed_over"])
        finally:
            swaps_done.set()
        assert all(one.result() >= 1 for one in clients)
    assert max(handed_over) > 4, "running and waiting ones"
    view = server.scheduler()
    assert view["swaps"] == SWAPS
    assert view["fallback"] is None
    server.wait_idle()
    assert server.kv()["parked_sequences"] == 0
    server.assert_kv_sound()


def test_what_is_wrong_is_named_and_changes_nothing(server: ServerProcess) -> None:
    before = server.scheduler()
    for reply, part in (
        (put(server, "fare"), "round_robin"),
        (put(server, "priority", {"age": 3}), "ageing_s"),
        (put(server, "priority", {"ageing_s": -1}), "ageing_s must be"),
        (put(server, ""), "mullama schedulers"),
        (httpx.put(server.url + VIEW, json={"policy": 5}, timeout=60), "policy"),
        (httpx.put(server.url + VIEW, json=[], timeout=60), "object"),
        (httpx.patch(server.url + VIEW, json={"params": {"no": 1}}, timeout=60), "prefill_budget"),
        (httpx.patch(server.url + VIEW, json={"policy": "fair"}, timeout=60), "PUT"),
    ):
        assert reply.status_code == 400, reply.text
        assert part in reply.json()["error"]["message"]
    assert put(server, "./mine.py:Mine").status_code == 403
    assert httpx.put(server.url + VIEW, content=b"{}", timeout=60).status_code == 415
    after = server.scheduler()
    assert (after["policy"], after["params"], after["swaps"]) == (before["policy"], before["params"], before["swaps"])
    server.assert_serving()


def test_parameters_change(start: Start) -> None:
    server = start("--scheduler", "priority", "--scheduler-arg", "ageing_s=5", "--scheduler-arg", "prefill_budget=99")
    view = server.scheduler()
    assert (view["policy"], view["params"]["ageing_s"], view["params"]["prefill_budget"]) == ("priority", 5.0, 99)
    reply = httpx.patch(server.url + VIEW, json={"params": {"ageing_s": 7}}, timeout=60)
    assert reply.status_code == 200
    assert reply.json()["params"]["ageing_s"] == 7.0
    assert server.scheduler()["params"]["prefill_budget"] == 99


@pytest.mark.parametrize("when", ["at the start", "live"])
def test_a_policy_from_a_file(start: Start, tmp_path: Path, when: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from mullama.scheduling import Plan\n"
        "class Mine:\n"
        "    def __init__(self, most: int = 3):\n"
        "        self.most, self.seqs = most, {}\n"
        "    def add(self, seq): self.seqs[seq.id] = seq\n"
        "    def remove(self, seq_id): self.seqs.pop(seq_id)\n"
        "    def plan(self, state):\n"
        "        for seq in self.seqs.values():\n"
        "            if seq.state == 'decode': return Plan({seq.id: 1})\n"
        "            if seq.state == 'prefill' or state.free_slots:\n"
        "                return Plan({seq.id: min(seq.prefill_left, self.most)})\n"
    )
    spec = f"{file}:Mine"
    if when == "live":
        server = start("--admin-key", "secret", "--parallel", "2")
        key = {"Authorization": "Bearer secret"}
        assert put(server, spec, {"most": 5}).status_code == 403
        reply = put(server, spec, {"most": 5}, headers=key)
        assert reply.status_code == 200, reply.text
        assert reply.json()["params"] == {"most": 5}
    else:
        server = start("--scheduler", spec, "--parallel", "2")
    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(lambda index: streamed(server, index), range(3)))
    assert all(texts)
    view = server.scheduler(headers={"Authorization": "Bearer secret"} if when == "live" else None)
    assert (view["policy"], view["fallback"]) == ("Mine", None)


def test_an_urgent_request_overtakes(start: Start) -> None:
    server = start("--scheduler", "preemptive", "--parallel", "1", "--ctx-size", "8192")
    with connect(server) as batch:
        batch.send(COMPLETIONS, long_request(priority=10))
        batch.head()
        batch.chunk()
        urgent = server.complete("One, two,", priority=0, max_tokens=4)
        assert urgent["usage"]["completion_tokens"] == 4
        batch.chunk()  # it goes on
        (running,) = wait_until(lambda: server.scheduler()["running"])
        assert running["preemptions"] == 1
    server.wait_idle()
    assert server.kv()["parked_bytes"] == 0


def test_a_shadow_over_http(start: Start) -> None:
    server = start("--shadow-scheduler", "srpt", "--parallel", "2")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda index: streamed(server, index), range(6)))
    shadow = wait_until(lambda: (found := server.scheduler()["shadow"])["ttft_ms"] and found)
    assert (shadow["policy"], shadow["off"]) == ("srpt", None)
    assert shadow["observed"] > 0
    reply = httpx.put(f"{server.url}{VIEW}/shadow", json={"policy": "fair"}, timeout=60)
    assert reply.json()["shadow"] == "fair"
    assert server.scheduler()["shadow"]["policy"] == "fair"
    assert httpx.put(f"{server.url}{VIEW}/shadow", json={"policy": "fare"}, timeout=60).status_code == 400
    gone = httpx.delete(f"{server.url}{VIEW}/shadow", headers={"Content-Type": "application/json"}, timeout=60)
    assert gone.status_code == 200, gone.text
    assert server.scheduler()["shadow"] is None


@pytest.mark.parametrize(
    ("flags", "part"),
    [(("--scheduler", "fare"), "round_robin"), (("--scheduler-arg", "age=1"), "prefill_budget"),
     (("--scheduler-arg", "chunk"), "NAME=VALUE"), (("--shadow-scheduler", "x.py:Y"), "x.py")],
)  # fmt: skip
def test_a_wrong_scheduler_at_the_start_is_one_line(smollm2: Path, flags: tuple[str, ...], part: str) -> None:
    done = run_mullama("serve", "--port", "0", "--model", str(smollm2), *flags)
    assert done.returncode != 0
    (line,) = [text for text in done.stderr.decode().splitlines() if text.startswith("error:")]
    assert part in line
    assert "Traceback" not in done.stderr.decode()
