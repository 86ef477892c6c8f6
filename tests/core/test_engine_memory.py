"""The memory report of an engine: its sums, against llama.cpp's own count and the system's pages."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kv_engine_support import KINDS, request, tokens

from mullama._core import Context, Model
from mullama.engine.engine import Engine
from mullama.errors import EngineDead

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells it")
LONG = pytest.mark.skipif(not os.environ.get("MULLAMA_LONG"), reason="takes a gigabyte; set MULLAMA_LONG=1")


def check_sums(report: dict[str, Any], engine: Engine) -> None:
    """What holds for every report of an engine with one cell a token."""
    kv, weights = report["kv"], report["weights"]
    requests = sum(one["kv_bytes"] for one in report["requests"])
    assert requests + kv["retained_bytes"] - kv["shared_bytes"] == kv["used_bytes"]
    parts = [kv[part] for part in ("full", "window", "recurrent") if part in kv]
    for field in ("allocated_bytes", "resident_bytes", "used_bytes"):
        assert kv[field] == sum(part[field] for part in parts)
    assert all(part["used_bytes"] <= part["allocated_bytes"] for part in parts)
    assert all(part["resident_bytes"] <= part["allocated_bytes"] for part in [*parts, report["compute"], weights])
    allocated = engine.memory()
    for part in ("weights", "kv", "compute"):
        assert report[part]["allocated_bytes"] == sum(allocated[part].values()), part
    assert weights["resident_bytes"] == weights["mapped_bytes"] + weights["copied_bytes"]
    assert report["resident_bytes"] == (
        weights["resident_bytes"] + kv["resident_bytes"] + report["compute"]["resident_bytes"]
        + report["output"]["resident_bytes"] + report["tables_bytes"] + report["host_tier_bytes"]
        + report["parked_bytes"] + report["staging_bytes"]
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["streams", "unified"])
@pytest.mark.parametrize("kind", KINDS)
def test_kv_of_the_requests_adds_up(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], kind: str, layout: str
) -> None:
    engine = make_engine(tiny_model(kind), kv_layout=layout)
    ended = engine.submit_sync(request("ended", tokens(1, 50), 4))
    assert sum(delta.n_tokens for delta in ended) == 4
    running = [engine.submit_sync(request(name, tokens(n, n), 400)) for name, n in (("a", 30), ("b", 60))]
    for generation in running:
        next(generation)
    report = engine.memory_report_sync()
    check_sums(report, engine)
    by_id = {one["id"]: one for one in report["requests"]}
    assert by_id.keys() == {"a", "b"}
    assert report["kv"]["retained_bytes"] > 0
    for one in by_id.values():
        assert 0 < one["kv_bytes"] <= one["kv_bytes_peak"]
        assert one["kv_byte_seconds"] > 0
    if kind == "llama":  # one cell a token: b has twice a's prompt
        cell = report["kv"]["full"]["bytes_per_cell"]
        assert by_id["a"]["kv_bytes"] >= 30 * cell
        assert by_id["b"]["kv_bytes"] >= 60 * cell
    for generation in running:
        generation.cancel()
        assert list(generation) is not None
    after = engine.memory_report_sync()
    check_sums(after, engine)
    assert after["requests"] == []


def test_a_preempted_request_has_its_kv_in_host_memory(make_engine: Callable[..., Engine]) -> None:
    from mullama.types import Preempt

    engine = make_engine()
    generation = engine.submit_sync(request("one", tokens(1, 100), 400))
    next(generation)

    def preempt() -> tuple[dict[str, Any], Any]:
        from mullama.engine.memory import report as memory

        (handle,) = [handle for handle in engine._seqs.slots if handle]
        engine._seqs.preempt(handle, Preempt.SWAP)
        return memory._at_boundary(engine._parts)

    found, _ = engine.call(preempt).result()
    (row,) = found["kv"]["requests"]
    assert (row["state"], row["kv_bytes"]) == ("preempted", 0)
    assert row["parked_bytes"] == found["parked_bytes"] > 0
    assert row["kv_bytes_peak"] >= 100 * found["kv"]["parts"]["full"]["bytes_per_cell"]
    assert found["parked_sequences"] == 1
    generation.cancel()
    assert list(generation) is not None


@LINUX
def test_cells_take_memory_when_they_are_used(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(ctx_size=65536, parallel=2)
    before = engine.memory_report_sync()["kv"]
    assert before["allocated_bytes"] > 8 << 20
    assert before["resident_bytes"] < 1 << 20
    assert sum(delta.n_tokens for delta in engine.submit_sync(request("one", tokens(1, 4000), 4))) == 4
    after = engine.memory_report_sync()["kv"]
    assert after["used_bytes"] >= 4000 * after["full"]["bytes_per_cell"]
    grown = after["resident_bytes"] - before["resident_bytes"]
    # K and V of each layer begin and end within a page; a batch reads some cells beyond.
    assert 0.9 * after["used_bytes"] <= grown <= after["used_bytes"] + (1 << 19)


def test_it_is_for_event_loops_too_and_not_of_a_closed_engine(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    report = asyncio.run(engine.memory_report())
    check_sums(report, engine)
    assert json.loads(json.dumps(report)) == report
    engine.close()
    with pytest.raises(EngineDead):
        engine.memory_report_sync()


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_those_that_are_counted(models: Callable[..., Model], kind: str) -> None:
    context = Context(models(kind), n_slots=3, n_ctx=512)
    memory = context.memory()
    sums: dict[str, int] = {}
    for part, _, address, size in context.buffers():
        assert address > 0
        sums[part] = sums.get(part, 0) + size
    assert sums.pop("weights") == sum(memory["weights"].values())
    assert sums.pop("compute") == sum(memory["compute"].values())
    assert sum(sums.values()) == sum(memory["kv"].values())
    assert sums.keys() == context.cell_bytes().keys()
    context.close()
    with pytest.raises(RuntimeError, match="closed"):
        context.buffers()
    with pytest.raises(RuntimeError, match="closed"):
        context.cell_bytes()


# A process of its own: what the tests before have left in this one is nobody's part.
ALONE = """
import json, sys
from kv_engine_support import request
from mullama.config import ServeConfig
from mullama.engine.engine import Engine
from mullama.observe import process_memory as system

path, n_ctx = sys.argv[1], int(sys.argv[2])
engine = Engine.load(path, config=ServeConfig(ctx_size=n_ctx, parallel=4, page_dir=sys.argv[3]))
found = []

def note():
    report, process = engine.memory_report_sync(), system.process_memory()
    libraries = process.file - report["weights"]["mapped_bytes"]
    found.append({"rss": process.rss, "total": report["resident_bytes"] + libraries + system.baseline(), **report})

note()
for turn in range(3):
    words = [" ".join(f"{turn} {i} {k} word" for k in range(80)) for i in range(4)]
    generations = [engine.submit_sync(request(str(i), engine.tokenize(text), 32)) for i, text in enumerate(words)]
    for generation in generations:
        assert sum(delta.n_tokens for delta in generation) == 32
    note()
engine.close()
print(json.dumps(found))
"""


def alone(path: Path, n_ctx: int, pages: Path) -> list[dict[str, Any]]:
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path), str(n_ctx), str(pages)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def check_shares(reports: list[dict[str, Any]]) -> None:
    """5 % of what the process really takes, before, while and after prompts went to host memory."""
    for report in reports:
        assert abs(report["rss"] - report["total"]) <= 0.05 * report["rss"], report
    assert reports[-1]["host_tier_bytes"] > 0


@LINUX
@pytest.mark.parametrize("n_ctx", [1024, 8192])
def test_smollm2_is_accounted_for(smollm2: Path, tmp_path: Path, n_ctx: int) -> None:
    check_shares(alone(smollm2, n_ctx, tmp_path))


@LINUX
@LONG
@pytest.mark.parametrize("n_ctx", [1024, 8192])
def test_gemma3_is_accounted_for(gemma3: Path, tmp_path: Path, n_ctx: int) -> None:
    check_shares(alone(gemma3, n_ctx, tmp_path))


@LINUX
@LONG
@pytest.mark.parametrize("n_ctx", [4096, 32768])
def test_a_model_of_a_billion_and_a_half_is_accounted_for(tmp_path: Path, n_ctx: int) -> None:
    from dataclasses import replace

    import shaped

    path = shaped.build(tmp_path / "model.gguf", replace(shaped.QWEN_1_5B, kind="Q4_0", embd_kind="Q8_0"), random=True)
    check_shares(alone(path, n_ctx, tmp_path))
