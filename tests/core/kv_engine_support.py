"""Prompts, answers and faults for the tests of the KV cache through an Engine."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from core_support import greedy

from mullama.engine.engine import Engine
from mullama.engine.requests.generation import BaseGeneration
from mullama.kv.choice import KvCosts
from mullama.kv.events import KvEvent, KvEventKind, KvTier
from mullama.kv.index.tree import unpack
from mullama.types import FinishReason, Profile, Request

Array = npt.NDArray[Any]

KINDS = ("llama", "gemma3", "mamba", "lfm2")
LONG = bool(os.environ.get("MULLAMA_LONG"))

# The reference kernels give the same bits for any chunk and batch: so answers can be compared to the letter.
EXACT: dict[str, Any] = {"deterministic": True}


def exact(layout: str) -> dict[str, Any]:
    """The layout, exact where it can be: in one buffer sums are rounded in the order of cells."""
    return {"kv_layout": layout, **(EXACT if layout == "streams" else {})}


def tokens(seed: int, n: int) -> list[int]:
    """A prompt that shares next to nothing with that of another seed."""
    rng = random.Random(seed)
    return [rng.randint(65, 90) for _ in range(n)]


def request(name: str, prompt: Sequence[int], n: int = 8, **more: Any) -> Request:
    return Request(name, list(prompt), greedy(n), **more)


@dataclass
class Answer:
    text: str
    profile: Profile


def read(generation: BaseGeneration) -> Answer:
    """A generation that succeeds, read to its end."""
    text = "".join(delta.text for delta in generation)  # type: ignore[attr-defined]
    finish = generation.finish
    assert finish is not None and finish.reason is FinishReason.LENGTH, finish
    profile = finish.profile
    assert profile.kv_cache_hit + profile.kv_cache_miss == profile.prompt_tokens
    assert (profile.kv_cache_hit > 0) == (profile.kv_cache_source != "none")
    return Answer(text, profile)


def submit(engine: Engine, *requests: Request) -> list[Any]:
    """All at the same step boundary."""
    gate = threading.Event()
    engine.call(gate.wait)
    try:
        return [engine.submit_sync(one) for one in requests]
    finally:
        gate.set()


def ask(engine: Engine, *requests: Request) -> list[Answer]:
    """Submitted together; returns when the engine has put everything away."""
    answers = [read(generation) for generation in submit(engine, *requests)]
    engine.call(lambda: None).result()
    return answers


def one(engine: Engine, prompt: Sequence[int], n: int = 8, name: str = "r", **more: Any) -> Answer:
    return ask(engine, request(name, prompt, n, **more))[0]


def events(engine: Engine, since: int = 0) -> list[KvEvent]:
    found, lost = engine.kv.events.since(since)
    assert lost == 0
    return found


def history(engine: Engine, name: str) -> list[int]:
    """Prompt and answer of a request that has ended, as the next turn of a chat begins (without the last token)."""
    ended = [
        event
        for event in events(engine, max(engine.kv.events.last_seq - 1000, 0))
        if (event.kind, event.tier, event.request) == (KvEventKind.STORED, KvTier.DEVICE, name)
    ]
    return unpack(ended[-1].tokens)


def totals_agree(engine: Engine, answers: Sequence[Answer]) -> None:
    """What the profiles say is what ``/internal/kv`` says."""
    totals = engine.kv.snapshot()["totals"]
    assert totals["kv_cache_hit"] == sum(answer.profile.kv_cache_hit for answer in answers)
    assert totals["kv_cache_miss"] == sum(answer.profile.kv_cache_miss for answer in answers)
    for source, n in totals["hit_by_source"].items():
        hits = [answer.profile.kv_cache_hit for answer in answers if answer.profile.kv_cache_source == source]
        assert n == sum(hits), source


@dataclass
class Task:
    """A prompt, and what a cold engine makes of it."""

    prompt: list[int]
    text: str
    kv: list[Array]


def exported(engine: Engine, prompt: Sequence[int]) -> list[Array]:
    """Keys and values of a prompt by layer, from the first slot that retains it."""
    slots = [engine.kv.export(row["slot"]) for row in engine.kv.snapshot()["slots"]]
    found = next(slot for slot in slots if slot["tokens"][: len(prompt)] == list(prompt))
    return [np.array(layer[part][: len(prompt)]) for layer in found["layers"] for part in ("k", "v")]


def same(a: list[Array], b: list[Array]) -> bool:
    """Bit by bit; KV that is all zeros is none."""
    return len(a) == len(b) and all(np.array_equal(x, y) and x.any() for x, y in zip(a, b, strict=True))


def near(a: list[Array], b: list[Array]) -> bool:
    """The same but for rounding, which these random models make much of; other tokens' KV is some units off."""
    assert len(a) == len(b)
    return all(float(np.abs(x.astype(np.float32) - y).max()) < 1.0 for x, y in zip(a, b, strict=True))


def workload(engine: Engine, n: int, seed: int = 5, most: int = 220) -> list[Task]:
    """Prompts that begin like earlier ones, or go on with what those were answered. ``engine`` computes them cold."""
    rng = random.Random(seed)
    has_rows = engine.kv.snapshot()["bytes_per_token"] > 0
    pool: list[list[int]] = []
    found: list[Task] = []
    for i in range(n):
        base = list(rng.choice(pool)) if pool and rng.random() < 0.85 else []
        if base and rng.random() < 0.5:
            base = base[: rng.randint(1, len(base))]
        prompt = (base + tokens(1000 * seed + i, rng.choice((1, 3, 20, 70))))[:most]
        engine.kv.drop()
        answer = one(engine, prompt, name=f"cold-{i}")
        assert answer.profile.kv_cache_hit == 0
        found.append(Task(prompt, answer.text, exported(engine, prompt) if has_rows else []))
        pool.append(history(engine, f"cold-{i}"))
        if len(pool) > 8:
            pool.pop(rng.randrange(len(pool)))
    return found


def holders(engine: Engine) -> dict[int, str]:
    """State of every slot that holds cells."""
    return {row["slot"]: row["state"] for row in engine.kv.snapshot()["slots"] if row["state"] != "free"}


def fix_costs(engine: Engine, **costs: float) -> None:
    """Ways are chosen by these costs from now on, whatever the machine does; what is not named is as by default."""
    fixed = KvCosts(**costs)
    engine._kv.finder.costs = lambda: fixed  # type: ignore[method-assign]


class Faulty:
    """Stands before an object of the core; what ``broken`` names is answered by it."""

    def __init__(self, real: Any, **broken: Any) -> None:
        self._real = real
        self.__dict__.update(broken)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
