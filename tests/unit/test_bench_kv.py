"""Benchmarks of the KV cache: the optimum against brute force, the replay of a trace, the index."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench import kv_trace, micro_index
from bench.belady import NEVER, Reading, Units, next_reads, optimum
from bench.kv_trace import MIB, Prompt, Rows, best, percent, prompts_of, replay, result_table, size_name
from mullama.kv.eviction.registry import BUILTINS, create
from mullama.kv.index.tree import pack, unpack
from mullama.workload.base import TraceRequest

# -- the optimum ----------------------------------------------------------------------------------------------------


def brute_force(readings: list[Reading], capacity: int) -> int:
    """Try every choice of what to keep after each request, whether it is a prefix or not."""

    @functools.cache
    def most(at: int, cached: frozenset[int]) -> int:
        if at == len(readings):
            return 0
        reading = readings[at]
        hits = 0
        while hits < reading.n_read and reading.units[hits] in cached:
            hits += 1
        there = cached | set(reading.units)
        size = min(capacity, len(there))
        return hits + max(most(at + 1, frozenset(kept)) for kept in itertools.combinations(sorted(there), size))

    return most(0, frozenset())


prompts_st = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1, max_size=5)


@given(prompts=prompts_st, capacity=st.integers(0, 4), unit=st.integers(1, 2))
@example(prompts=[[1], [0, 1], [1, 0], [0], [0, 1, 0]], capacity=2, unit=1)  # the fourth brings 0 anew
def test_the_optimum_is_the_best_of_all_choices(prompts: list[list[int]], capacity: int, unit: int) -> None:
    units = Units(unit)
    readings = [units.reading(pack(prompt)) for prompt in prompts]
    hits = optimum(readings, capacity)
    assert sum(hits) == brute_force(readings, capacity)
    assert all(0 <= n <= reading.n_read for n, reading in zip(hits, readings, strict=True))


@given(prompts=prompts_st)
def test_with_room_for_all_the_optimum_is_what_prompts_share(prompts: list[list[int]]) -> None:
    units = Units(1)
    readings = [units.reading(pack(prompt)) for prompt in prompts]

    def shared(prompt: list[int], other: list[int]) -> int:
        """All but the last token may be taken over."""
        return sum(1 for n in range(1, len(prompt)) if prompt[:n] == other[:n])

    expected = [max((shared(prompt, other) for other in prompts[:i]), default=0) for i, prompt in enumerate(prompts)]
    assert optimum(readings, 1000) == expected


def test_units_are_prefixes() -> None:
    units = Units(2)
    first = units.reading(pack([1, 2, 3, 4, 5]))
    assert first == Reading((0, 1, 2), 2)  # the last token is computed: nobody reads the third unit
    assert units.reading(pack([1, 2, 3, 4])) == Reading((0, 1), 2)
    assert units.reading(pack([3, 4])).units == (3,)  # the same tokens, but with nothing before them
    assert units.reading(pack([1])) == Reading((4,), 0)


def test_when_units_are_read_next() -> None:
    readings = [Reading((0, 1), 2), Reading((2,), 1), Reading((0, 1), 1)]
    assert next_reads(readings) == [[3, NEVER], [NEVER], [NEVER, NEVER]]


# -- the replay -----------------------------------------------------------------------------------------------------


def request(prompt: int, *blocks: int, out: int = 2, size: int = 4) -> TraceRequest:
    return TraceRequest(0.0, prompt, out, blocks=blocks, block_tokens=size)


def test_prompts_share_what_their_blocks_share() -> None:
    first, second = prompts_of([request(7, 5, 6), request(10, 5, 8)])
    assert unpack(first.prompt) == [20, 21, 22, 23, 24, 25, 26]
    assert unpack(first.answer) == [-1, -2]
    assert unpack(second.prompt) == [20, 21, 22, 23, 32, 33, 34, 35, -3, -4]  # two tokens that no block covers
    assert unpack(second.answer) == [-5, -6]
    assert [prompt.answer for prompt in prompts_of([request(7, 5, 6)], answers=False)] == [b""]


def chat(*lengths: int) -> list[Prompt]:
    """Prompts that each begin with the whole one before."""
    return [Prompt(pack(range(n)), pack([-n])) for n in lengths]


@pytest.mark.parametrize("name", BUILTINS)
def test_a_chat_reuses_all_but_what_is_new(name: str) -> None:
    assert replay(chat(10, 20, 20, 30), 10**6, create(name), 10) == [0, 10, 19, 20]
    assert replay(chat(10, 20, 20, 30), 0, create(name), 10) == [0, 0, 0, 0]


def test_a_full_cache_forgets_by_its_policy() -> None:
    a, b, c = (Prompt(pack(range(start, start + 30)), b"") for start in (0, 100, 200))
    requests = [a, b, a, c, a]
    assert replay(requests, 600, create("lru"), 10) == [0, 0, 29, 0, 29]
    assert replay(requests, 600, create("fifo"), 10) == [0, 0, 29, 0, 0]


@given(prompts=prompts_st, capacity=st.integers(0, 8))
def test_no_policy_beats_the_optimum(prompts: list[list[int]], capacity: int) -> None:
    """In units of one token, whatever a policy keeps."""
    made = [Prompt(pack(tokens), pack([-1 - i])) for i, tokens in enumerate(prompts)]
    most = best(made, capacity, 1, 1)
    for name in BUILTINS:
        assert sum(replay(made, capacity, create(name), 1)) <= most
    assert best(made, 10**6, 1, 1) == sum(replay(made, 10**6, create("lru"), 1))


def test_kv_of_which_only_the_size_is_known_can_be_cut() -> None:
    left, right = Rows(10, 7).split(4)
    assert (left.n_bytes, right.n_bytes) == (28, 42)
    assert [part.n_bytes for part in right.split(1)] == [7, 35]


# -- what is printed ------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    results = {
        "prompt_tokens": 1000,
        "infinite_reused": 500,
        "reused": {"lru": {"256": 250, "1024": 500}, "optimum": {"256": 499, "1024": 500}},
    }
    lines = result_table(results, [256, 1024]).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "policy",
        "256 MiB",
        "of infinite",
        "1 GiB",
        "of infinite",
    ]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["lru", "25.0 %", "50.0 %", "50.0 %", "100.0 %"]
    assert [cell.strip() for cell in lines[-1].split("|")[1:-1]] == [
        "infinite",
        "50.0 %",
        "100.0 %",
        "50.0 %",
        "100.0 %",
    ]
    assert percent(0, 0) == "–"
    assert [size_name(mib) for mib in (1, 1024, 1536, 2048)] == ["1 MiB", "1 GiB", "1536 MiB", "2 GiB"]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    trace = tmp_path / "trace.jsonl"
    rows = [(1024, [0, 1]), (1500, [0, 1, 2]), (600, [0, 3]), (1024, [0, 1])]
    lines = [
        json.dumps({"timestamp": i, "input_length": n, "output_length": 32, "hash_ids": blocks})
        for i, (n, blocks) in enumerate(rows)
    ]
    trace.write_text("\n".join(lines) + "\n")
    record, plots = tmp_path / "r.json", [tmp_path / "a.svg", tmp_path / "b.svg"]
    sizes = ["--sizes", "1,2", "--token-bytes", str(MIB // 64)]  # 64 and 128 tokens
    for plot in plots:
        assert kv_trace.main([str(trace), *sizes, "--json", str(record), "--plot", str(plot)]) == 0
    assert plots[0].read_bytes() == plots[1].read_bytes() and b"<svg" in plots[0].read_bytes()
    out = capsys.readouterr().out
    assert all(f"| {name} " in out for name in (*BUILTINS, "optimum", "infinite"))
    results = json.loads(record.read_text())["results"]
    # Prompts of 64, 94, 38 and 64 tokens, answers of two: 64, 32 and 63 could be taken over. The first two do not fit
    # into 64 tokens with their answers, so that only what the third leaves is found there.
    assert (results["prompt_tokens"], results["infinite_reused"], results["answer_tokens"]) == (260, 159, 8)
    assert results["reused"]["lru"] == {"1": 32, "2": 159}
    assert results["reused"]["optimum"] == {"1": 159, "2": 159}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["none.jsonl"], "cannot read the trace file"), (["none.jsonl", "--requests", "0"], "n: 0 is out of range")],
)
def test_what_goes_wrong_is_one_line(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kv_trace.main(arguments) == 1
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


# -- the index ------------------------------------------------------------------------------------------------------


def test_the_index_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_index, "WANTED_US", 1e9)  # this machine may be busy
    record = tmp_path / "r.json"
    assert micro_index.main(["--entries", "150", "--tokens", "800", "--prompts", "5", "--json", str(record)]) == 0
    results = json.loads(record.read_text())["results"]
    assert (
        results["memory"]["entries"] >= 150 and results["memory"]["bytes an entry"] > results["memory"]["of it tokens"]
    )
    kinds = results["timings"]
    assert kinds["nothing cached"]["cached"] == 0
    assert kinds["a chat of 10-token turns"]["stretches"] > kinds["a chat goes on"]["stretches"] > 1
    assert kinds["a chat goes on"]["cached"] > 500
    assert "worst 99th percentile" in capsys.readouterr().out


def test_the_index_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_index, "WANTED_US", 0.0)
    arguments = ["--entries", "20", "--tokens", "400", "--prompts", "2", "--json", str(tmp_path / "r.json")]
    assert micro_index.main(arguments) == 1
