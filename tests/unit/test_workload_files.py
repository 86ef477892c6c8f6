"""Trace files: Azure's CSV, Mooncake's JSONL, and mullama's own recordings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from compare_support import requests_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.errors import ConfigError
from mullama.workload.base import Client, Outcome, TraceRequest, Workload
from mullama.workload.recorded import read_trace, write_outcomes, write_trace
from mullama.workload.spec import parse_workload

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,396,109
2023-11-16 18:15:51.1805900,879,55
2023-11-16 18:16:46.6805900,91,0
"""
MOONCAKE = [
    {"timestamp": 0, "input_length": 1300, "output_length": 500, "hash_ids": [0, 1, 2]},
    {"timestamp": 2500, "input_length": 1024, "output_length": 40, "hash_ids": [0, 1]},
    {"timestamp": 3000, "input_length": 700, "output_length": 8, "hash_ids": [0, 9]},
]


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    file = tmp_path / "conv.csv"
    file.write_text(AZURE)
    return file


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    file = tmp_path / "conversation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in MOONCAKE))
    return file


def test_azure(azure: Path) -> None:
    trace = requests_of(f"azure:{azure}")
    assert [round(request.at_s, 4) for request in trace] == [0.0, 4.25, 4.5, 60.0]
    assert [(r.prompt_tokens, r.output_tokens) for r in trace] == [(374, 44), (396, 109), (879, 55), (91, 1)]


def test_azure_scaled(azure: Path) -> None:
    spec = f"azure:{azure},skip=1,n=2,time_scale=2,length_scale=0.5,max_prompt=400,max_out=50,priority=3,slo_ms=900"
    assert requests_of(spec) == [
        TraceRequest(0.0, 198, 50, priority=3, slo_ms=900.0),
        TraceRequest(pytest.approx(0.5), 400, 28, priority=3, slo_ms=900.0),
    ]


def test_mooncake_keeps_its_blocks(mooncake: Path) -> None:
    trace = requests_of(f"mooncake:{mooncake}")
    assert [(r.at_s, r.prompt_tokens, r.blocks, r.block_tokens) for r in trace] == [
        (0.0, 1300, (0, 1, 2), 512),
        (2.5, 1024, (0, 1), 512),
        (3.0, 700, (0, 9), 512),
    ]


@pytest.mark.parametrize("scale", ["length_scale=0.0625", "block=32", "block=32,length_scale=0.0625"])
def test_mooncake_scales_blocks_with_lengths(mooncake: Path, scale: str) -> None:
    trace = requests_of(f"mooncake:{mooncake},{scale}")
    assert [(r.prompt_tokens, r.blocks, r.block_tokens) for r in trace] == [
        (81, (0, 1, 2), 32),
        (64, (0, 1), 32),
        (44, (0, 9), 32),
    ]
    cut = requests_of(f"mooncake:{mooncake},{scale},max_prompt=33")
    assert [(r.prompt_tokens, r.blocks) for r in cut] == [(33, (0, 1)), (33, (0, 1)), (33, (0, 9))]


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("azure", "", ("TIMESTAMP", "ContextTokens", "GeneratedTokens")),
        ("azure", "TIMESTAMP,ContextTokens\nx,1\n", ("lacks GeneratedTokens",)),
        ("azure", AZURE.splitlines()[0] + "\nyesterday,1,2\n", ("line 2", "yesterday")),
        ("azure", AZURE.splitlines()[0] + "\n2023-11-16 18:15:46,many,2\n", ("line 2", "ContextTokens", "many")),
        ("azure", AZURE.splitlines()[0] + "\n2023-11-16 18:15:46,-5,2\n", ("line 2", "-5")),
        ("azure", AZURE.splitlines()[0] + "\n2023-11-16 18:15:46,5\n", ("line 2", "GeneratedTokens")),
        ("azure", AZURE.splitlines()[0] + "\n", ("no request left",)),
        ("mooncake", "{\n", ("line 1", "JSON")),
        ("mooncake", "[1]\n", ("line 1", "object")),
        ("mooncake", "[" * 100_000 + "\n", ("mooncake",)),
        ("mooncake", '{"timestamp": 0, "input_length": true, "output_length": 1, "hash_ids": []}', ("input_length",)),
        ("mooncake", '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": ["x"]}', ("hash_ids",)),
        ("mooncake", '{"timestamp": 1e999, "input_length": 5, "output_length": 1, "hash_ids": []}', ("timestamp",)),
    ],
)
def test_damaged_files(tmp_path: Path, kind: str, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_workload(f"{kind}:{tmp_path / 'trace'}")
    for word in words:
        assert word in caught.value.message


def test_binary_files(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(b"\xff\xfe\0\1")
    for kind in ("azure", "mooncake", "file"):
        with pytest.raises(ConfigError):
            parse_workload(f"{kind}:{tmp_path / 'trace'}")
        with pytest.raises(ConfigError):
            parse_workload(f"{kind}:{tmp_path}")


# -- mullama's own format --------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
REQUESTS = st.builds(
    TraceRequest,
    at_s=st.floats(0, 1e6),
    prompt_tokens=st.integers(1, 9999),
    output_tokens=st.integers(1, 9999),
    priority=st.integers(-100, 100),
    user=st.none() | TEXT,
    slo_ms=st.none() | st.floats(0.5, 1e6),
    group=TEXT,
    blocks=st.lists(st.integers(0, 50), max_size=4).map(tuple),
    block_tokens=st.integers(1, 512),
)
CLIENTS = st.builds(Client, st.lists(REQUESTS, max_size=3).map(tuple), st.floats(0, 100))


@settings(deadline=None)
@given(
    st.lists(REQUESTS, min_size=1, max_size=5),
    st.lists(CLIENTS, max_size=3),
    st.none() | st.floats(1, 1e5),
    TEXT,
    st.integers(0, 1 << 40),
)
def test_a_recorded_workload_is_the_workload(
    scratch: Callable[[], Path],
    requests: list[TraceRequest],
    clients: list[Client],
    stop_s: float | None,
    spec: str,
    seed: int,
) -> None:
    ordered = tuple(sorted(requests, key=lambda request: request.at_s))
    workload = Workload(ordered, tuple(clients), stop_s, spec, seed)
    write_trace(scratch(), workload)
    assert read_trace(scratch()) == workload
    assert parse_workload(f"file:{scratch()}", seed=77) == workload


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    file = tmp_path_factory.mktemp("scratch") / "trace.jsonl"
    return lambda: file


def test_specs_survive_recording(tmp_path: Path, mooncake: Path) -> None:
    specs = ("two-class:rate=5,n=30,slo_ms=400", "closed:users=a:2,b:1,seconds=3,every=1", f"mooncake:{mooncake}")
    for spec in specs:
        workload = parse_workload(spec, 3)
        write_trace(tmp_path / "t.jsonl", workload)
        assert read_trace(tmp_path / "t.jsonl") == workload


def test_outcomes_survive_and_can_be_played(tmp_path: Path) -> None:
    outcomes = [
        Outcome(1, TraceRequest(2.5, 8, 3, user="b"), error="it failed", finished_s=3.0),
        Outcome(0, TraceRequest(0.25, 10, 2), (0.5, 0.75), 0.8, cached_tokens=4, preemptions=1),
    ]
    file = tmp_path / "outcomes-fcfs-1.jsonl"
    write_outcomes(file, outcomes)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["index"], first["token_s"], first["cached_tokens"]) == (0, [0.5, 0.75], 4)
    assert (second["index"], second["error"], second["finished_s"]) == (1, "it failed", 3.0)
    assert requests_of(f"file:{file}") == [outcomes[1].request, outcomes[0].request]


def test_a_plain_file_of_requests(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"at_s": 1, "prompt_tokens": 5, "output_tokens": 2}\n\n{"at_s":0,"prompt_tokens":1,"output_tokens":1}'
    )
    assert requests_of(f"file:{file}") == [TraceRequest(0.0, 1, 1), TraceRequest(1.0, 5, 2)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ("no request",)),
        ("nonsense", ("line 1", "JSON")),
        ("[]", ("line 1", "object")),
        ('{"at_s": 0, "prompt_tokens": 5}', ("line 1", "output_tokens")),
        ('{"at_s": 0, "prompt_tokens": "5", "output_tokens": 1}', ("prompt_tokens", "int")),
        ('{"at_s": 0, "prompt_tokens": 0, "output_tokens": 1}', ("prompt_tokens", "between")),
        ('{"at_s": -1, "prompt_tokens": 5, "output_tokens": 1}', ("at_s", "between")),
        ('{"at_s": 0, "prompt_tokens": 5, "output_tokens": 1, "slo_ms": 0}', ("slo_ms",)),
        ('{"at_s": 0, "prompt_tokens": 5, "output_tokens": 1, "blocks": [1]}', ("block_tokens",)),
        ('{"at_s": 0, "prompt_tokens": 5, "output_tokens": 1, "prio": 1}', ("prio", "priority")),
        ('{"client": 0, "at_s": 0, "prompt_tokens": 5, "output_tokens": 1}', ("client 0", "think_s")),
        ('{"format": "mullama-trace", "version": 2}', ("mullama-trace 2", "mullama-trace 1")),
        ('{"format": "mullama-trace", "version": 1, "think_s": [-1]}', ("think_s",)),
        ('{"format": "mullama-trace", "version": 1, "x": 1}', ("x",)),
        ('{"index": 0, "request": {"at_s": 0, "prompt_tokens": 5}}', ("output_tokens",)),
    ],
)
def test_damaged_recordings(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(ConfigError) as caught:
        parse_workload(f"file:{tmp_path / 't.jsonl'}")
    for word in words:
        assert word in caught.value.message
