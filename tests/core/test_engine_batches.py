"""Lists of prompts, unread generations, and what help shows of an engine."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from core_support import greedy

from mullama.api import Engine
from mullama.engine.kv_control import KvControl
from mullama.engine.planning.control import PlanningControl
from mullama.engine.weights.control import WeightControl
from mullama.errors import ContextLengthExceeded, InvalidRequest, QueueFull
from mullama.types import FinishReason, Request, SamplingParams

PROMPTS = [f"PROMPT NUMBER {i} " * (1 + i % 3) for i in range(23)]


@pytest.fixture
def engine(tiny_model: Callable[..., Path], tmp_path: Path) -> Iterator[Engine]:
    config = {"ctx_size": 256, "parallel": 3, "threads": 1, "batch_size": 64, "page_dir": str(tmp_path), "max_queue": 4}
    with Engine.load(tiny_model(), name="tiny", config={**config, "deterministic": True}) as engine:
        yield engine


def options(n: int = 6) -> dict[str, Any]:
    return {"max_tokens": n, "temperature": 0, "ignore_eos": True}


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_list_gives_a_list_in_order(engine: Engine) -> None:
    alone = [engine.generate(prompt, **options()) for prompt in PROMPTS]
    assert len(set(alone)) > 3
    steps = engine.counters()["steps"]
    assert engine.generate(PROMPTS, **options()) == alone
    assert engine.counters()["steps"] - steps < len(PROMPTS) * 6, "computed together"
    assert engine.generate([engine.tokenize(prompt) for prompt in PROMPTS], **options()) == alone
    assert engine.generate(tuple(PROMPTS[:2]), **options()) == alone[:2]
    assert engine.generate([PROMPTS[0]], **options()) == alone[:1]
    assert asyncio.run(engine.agenerate(PROMPTS, **options())) == alone


def test_progress_is_told(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    engine.generate(PROMPTS[:5], progress=lambda done, total: seen.append((done, total)), **options(2))
    assert seen == [(done, 5) for done in range(1, 6)]
    engine.generate(PROMPTS[:5], **options(2))
    assert capsys.readouterr().err == "", "no bar where nobody looks"
    engine.generate(PROMPTS[:5], progress=True, **options(2))
    out, err = capsys.readouterr()
    assert out == "" and "5/5" in err


def test_one_that_fails_ends_the_others(engine: Engine) -> None:
    with pytest.raises(ContextLengthExceeded, match="prompt 3 of 5: the prompt has"):
        engine.generate([*PROMPTS[:3], "x" * 999, PROMPTS[4]], **options())
    with pytest.raises(InvalidRequest, match="prompt 1 of 2: the prompt is empty"):
        engine.generate(["a", ""], **options())
    with pytest.raises(InvalidRequest, match="prompt 1 of 2: the prompt is empty"):
        asyncio.run(engine.agenerate(["a", ""], **options()))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, progress=stop, **options(100))
    until(lambda: not engine.planning.snapshot()["running"] and not engine.planning.snapshot()["waiting"])
    assert engine.generate("a", **options(2))


def test_a_batch_beside_others_waits_for_room(engine: Engine) -> None:
    """Others fill slots and queue: a batch takes what room there is, and says so when there is none at all."""
    others = [engine.submit_sync(Request(f"o{i}", [65 + i], greedy(150))) for i in range(6)]
    texts = engine.generate(PROMPTS[:5], **options(3))
    assert len(texts) == 5 and all(texts)
    for other in others:
        other.cancel()
    until(lambda: not engine.planning.snapshot()["running"])
    gate = threading.Event()
    engine.call(gate.wait)  # nothing goes on meanwhile
    try:
        filling = [engine.submit_sync(Request(f"f{i}", [65 + i], greedy(5))) for i in range(7)]
        with pytest.raises(QueueFull):
            engine.generate(PROMPTS[:2], **options(3))
    finally:
        gate.set()
    assert [sum(delta.n_tokens for delta in one) for one in filling] == [5] * 7


def test_what_nobody_reads_gives_its_slot_back(engine: Engine) -> None:
    for i in range(3):
        engine.submit_sync(Request(f"dropped-{i}", [65 + i], greedy(200)))
    gc.collect()
    until(lambda: not engine.planning.snapshot()["running"])
    kept = engine.submit_sync(Request("kept", [70], greedy(50)))
    gc.collect()
    assert sum(delta.n_tokens for delta in kept) == 50
    assert kept.finish is not None and kept.finish.reason is FinishReason.LENGTH
    for delta in engine.submit_sync(Request("left", [71], greedy(200))):
        assert delta
        break
    gc.collect()
    until(lambda: not engine.planning.snapshot()["running"])


def test_help_spells_the_options_out() -> None:
    for method in (Engine.generate, Engine.stream, Engine.chat, Engine.agenerate, Engine.astream):
        parameters = inspect.signature(method).parameters
        for field in fields(SamplingParams):
            assert parameters[field.name].default == field.default, field.name
        assert parameters["priority"].default == 0
        assert not any(one.kind is one.VAR_KEYWORD for one in parameters.values())


@pytest.mark.parametrize("kind", [Engine, KvControl, PlanningControl, WeightControl])
def test_every_public_method_has_its_docstring(kind: type) -> None:
    public = [name for name in dir(kind) if not name.startswith("_")]
    assert len(public) > 5
    assert [name for name in public if not inspect.getdoc(getattr(kind, name))] == []
