"""Many requests at once: each answer is what it would have been alone, and nothing is left when they are gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .support import COMPLETIONS, ServerProcess, events_of, request_bytes, text_of, wait_until

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "def fibonacci(n):",
    "The three primary colours are",
    "Water boils at",
    "Dear Sir or Madam,",
    "In the beginning",
    "The opposite of hot is",
)
MOST = 6  # tokens of a request in the churn
LONG = os.environ.get("MULLAMA_LONG") == "1"


def test_eight_at_once_say_what_each_says_alone(start: Callable[..., ServerProcess]) -> None:
    running = start("--parallel", "8", "--ctx-size", "512")

    def text(prompt: str) -> str:
        said: str = running.complete(prompt, max_tokens=16)["choices"][0]["text"]
        return said

    alone = [text(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:  # from retained prefixes
        assert list(pool.map(text, PROMPTS)) == alone
    running.drop_kv()
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda prompt: running.complete(prompt, max_tokens=16), PROMPTS))
    assert [reply["choices"][0]["text"] for reply in replies] == alone
    assert max(reply["profile"]["mean_batch_size"] for reply in replies) > 1, "they ran together"
    running.assert_kv_sound()


def test_more_than_there_are_slots_wait_their_turn(server: ServerProcess) -> None:
    alone = {prompt: server.complete(prompt, max_tokens=8)["choices"][0]["text"] for prompt in PROMPTS}
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda prompt: (prompt, server.complete(prompt, max_tokens=8)), PROMPTS * 2))
    for prompt, reply in replies:
        assert reply["choices"][0]["text"] == alone[prompt]
    assert max(reply["profile"]["queue_ms"] for _, reply in replies) > 0
    server.assert_kv_sound()


# -- churn ------------------------------------------------------------------------------------------------------------


class Churn:
    """Requests of which a third are given up at random moments; a seed makes two rounds the same."""

    def __init__(self, server: ServerProcess, expected: dict[str, str]) -> None:
        self._server = server
        self._expected = expected
        self.finished = 0
        self.given_up = 0

    def round(self, count: int, seed: int) -> None:
        asyncio.run(self._round(count, random.Random(seed)))

    async def _round(self, count: int, rng: random.Random) -> None:
        gate = asyncio.Semaphore(12)
        plans = [self._plan(i, rng) for i in range(count)]

        async def one(plan: dict[str, Any]) -> None:
            async with gate:
                await self._one(**plan)

        await asyncio.gather(*map(one, plans))

    def _plan(self, index: int, rng: random.Random) -> dict[str, Any]:
        ways = ("half", "connect", "wait", "stream")
        return {
            "prompt": rng.choice(PROMPTS[:4]),
            "max_tokens": rng.randint(1, MOST),
            "stream": rng.random() < 0.6,
            "give_up": rng.choice(ways) if index % 3 == 0 else None,
            "seconds": rng.uniform(0, 0.1),
            "num_bytes": rng.randint(1, 800),
            "reset": rng.random() < 0.5,
        }

    async def _one(
        self, *, prompt: str, max_tokens: int, stream: bool, give_up: str | None, seconds: float, num_bytes: int,
        reset: bool,
    ) -> None:  # fmt: skip
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": stream or give_up == "stream"}
        if give_up:
            body |= {"max_tokens": 200, "ignore_eos": True}
        data = request_bytes(COMPLETIONS, body, headers="Connection: close\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        try:
            writer.write(data[: len(data) // 2] if give_up == "half" else data)
            await writer.drain()
            if give_up == "wait":
                await asyncio.sleep(seconds)
            elif give_up == "stream":
                with contextlib.suppress(asyncio.IncompleteReadError):
                    await reader.readexactly(num_bytes)
            if give_up:
                self.given_up += 1
                return
            self._check(await reader.read(), prompt, max_tokens)
            self.finished += 1
        finally:
            if reset and give_up:  # an RST instead of a FIN
                raw: socket.socket = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _check(self, response: bytes, prompt: str, max_tokens: int) -> None:
        """The answer of a request that was not given up is whole, and right."""
        head, _, body = response.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), response
        if b"text/event-stream" in head:
            events = events_of(unchunk(body))
            assert events[-1] == "[DONE]"
            text, reason = text_of(events), events[-2]["choices"][0]["finish_reason"]
        else:
            choice = json.loads(body)["choices"][0]
            text, reason = choice["text"], choice["finish_reason"]
        assert reason == "length"
        assert self._expected[prompt].startswith(text) and text
        if max_tokens == MOST:
            assert text == self._expected[prompt]


def unchunk(body: bytes) -> bytes:
    parts = []
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            return b"".join(parts)
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]


def proc_count(server: ServerProcess, what: str) -> int:
    return len(list(Path(f"/proc/{server.pid}/{what}").iterdir()))


def rss(server: ServerProcess) -> int:
    """Resident bytes, without the pages of mapped files (the weights come and go with the page cache)."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="counts what the process holds through /proc")
@pytest.mark.timeout(3600 if LONG else 300)
def test_churn_leaves_nothing_behind(start: Callable[..., ServerProcess]) -> None:
    """MULLAMA_LONG=1: two rounds of 1,000 requests instead of 300."""
    running = start("--parallel", "4", "--ctx-size", "512", "--max-queue", "1000", "--threads", "0")
    expected = {prompt: running.complete(prompt, max_tokens=MOST)["choices"][0]["text"] for prompt in PROMPTS[:4]}
    # What the server starts on first use (its thread pool) belongs to the start.
    running.post(COMPLETIONS, {"prompt": "word " * 60_000, "max_tokens": 1})
    running.post(COMPLETIONS, {"prompt": "word " * 60_000, "max_tokens": 1})
    running.wait_idle()
    fds = wait_until(lambda: proc_count(running, "fd"))
    threads = proc_count(running, "task")

    churn = Churn(running, expected)
    count = 1000 if LONG else 300
    sizes = []
    for number in (1, 2):
        churn.round(count, seed=20)
        assert churn.finished + churn.given_up == number * count
        assert churn.given_up == number * -(-count // 3)
        running.wait_idle()
        running.assert_kv_sound()
        wait_until(lambda: proc_count(running, "fd") <= fds)
        wait_until(lambda: proc_count(running, "task") <= threads)
        sizes.append(rss(running))
    assert sizes[1] - sizes[0] < 30 << 20, sizes

    used = running.kv()["cells_used"]
    assert running.drop_kv() == used
    assert running.assert_kv_sound()["cells_used"] == 0
    running.assert_serving()
