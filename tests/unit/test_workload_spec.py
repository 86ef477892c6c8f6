"""Workload specs: what they give, that the seed decides, and that junk is refused by name."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest
from compare_support import requests_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.errors import ConfigError, MullamaError
from mullama.workload.grammar import SHAPES, split
from mullama.workload.spec import KINDS, parse_workload

# -- what a spec gives ---------------------------------------------------------------------------------------


def test_poisson_has_its_rate_and_lengths() -> None:
    trace = requests_of("poisson:rate=4,n=4000,prompt=lognormal(median=120,sigma=0.6,max=800),out=uniform(16,64)", 7)
    assert len(trace) == 4000
    arrivals = [request.at_s for request in trace]
    assert arrivals == sorted(arrivals)
    assert 4000 / arrivals[-1] == pytest.approx(4, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(1, rel=0.08)
    prompts = [request.prompt_tokens for request in trace]
    assert statistics.median(prompts) == pytest.approx(120, rel=0.05)
    assert max(prompts) == 800
    outs = [request.output_tokens for request in trace]
    assert (min(outs), max(outs)) == (16, 64)
    assert statistics.fmean(outs) == pytest.approx(40, rel=0.03)


def test_bursty_keeps_the_rate_and_has_the_asked_variation() -> None:
    arrivals = [request.at_s for request in requests_of("bursty:rate=5,cv=2.5,n=20000", 1)]
    gaps = [b - a for a, b in itertools.pairwise([0.0, *arrivals])]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.08)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(2.5, rel=0.1)


def test_a_distribution_takes_positions_names_and_defaults() -> None:
    same = [
        requests_of(f"poisson:rate=1,n=50,prompt={text}", 3)
        for text in ("lognormal(128,0.6)", "lognormal(sigma=0.6, median=128)", "lognormal", "lognormal()")
    ]
    assert all(trace == same[0] for trace in same)
    mean = statistics.fmean(r.prompt_tokens for r in requests_of("poisson:n=5000,prompt=exponential(90)", 3))
    assert mean == pytest.approx(90, rel=0.05)
    assert {request.prompt_tokens for request in requests_of("poisson:n=20,prompt=0", 0)} == {1}  # never empty


def test_the_seed_decides_everything() -> None:
    spec = "two-class:rate=3,n=50,prompt=lognormal,every=uniform(0.4,1)"
    assert parse_workload(spec, 5) == parse_workload(spec, 5)
    assert parse_workload(spec, 5).requests != parse_workload(spec, 6).requests


def test_lengths_leave_the_arrivals_alone() -> None:
    short, long = (requests_of(f"poisson:rate=2,n=40,prompt={prompt}", 5) for prompt in ("10", "lognormal"))
    assert [r.at_s for r in short] == [r.at_s for r in long]


def test_a_tenant_is_the_same_alone() -> None:
    both = requests_of("poisson:users=flood:10,quiet:1,seconds=60,prompt=lognormal", 2)
    alone = requests_of("poisson:users=quiet:1,seconds=60,prompt=lognormal", 2)
    assert [request for request in both if request.user == "quiet"] == alone
    flood = sum(request.user == "flood" for request in both)
    assert flood == pytest.approx(600, rel=0.15)
    assert len(alone) == pytest.approx(60, rel=0.4)


def test_two_classes() -> None:
    trace = requests_of("two-class:rate=2,n=60,prompt=200,out=64,urgent_prompt=20,urgent_out=8,urgent_slo_ms=500", 1)
    batch = [request for request in trace if request.group == "batch"]
    urgent = [request for request in trace if request.group == "urgent"]
    assert len(batch) == 60
    assert {(r.priority, r.user, r.prompt_tokens, r.slo_ms) for r in batch} == {(10, "batch", 200, None)}
    assert {(r.priority, r.user, r.prompt_tokens, r.slo_ms) for r in urgent} == {(0, "urgent", 20, 500.0)}
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(urgent)]
    assert min(gaps) >= 0.4
    assert max(gaps) <= 1.0
    assert urgent[-1].at_s < batch[-1].at_s <= urgent[-1].at_s + 1.0
    assert trace == sorted(trace, key=lambda request: request.at_s)


def test_closed_loop_clients() -> None:
    workload = parse_workload("closed:clients=12,seconds=60,prompt=80,out=64,every=uniform(0.4,1),think_s=0.5", 1)
    assert len(workload.clients) == 12
    assert workload.stop_s == 60
    assert {client.think_s for client in workload.clients} == {0.5}
    assert {(r.priority, r.group, r.at_s) for c in workload.clients for r in c.requests} == {(10, "batch", 0.0)}
    assert len(workload.requests) == pytest.approx(60 / 0.7, rel=0.1)
    assert {(r.priority, r.group) for r in workload.requests} == {(0, "urgent")}
    firsts = workload.first_indices()
    everything = workload.all_requests()
    assert firsts[0] == len(workload.requests)
    assert everything[firsts[5]] is workload.clients[5].requests[0]


def test_closed_loop_deals_requests_and_users() -> None:
    workload = parse_workload("closed:users=a:2,b:1,n=7")
    assert [len(client.requests) for client in workload.clients] == [3, 2, 2]
    assert [client.requests[0].user for client in workload.clients] == ["a", "a", "b"]
    assert workload.stop_s is None
    assert workload.requests == ()


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gauss:rate=2", ("gauss", "poisson", "bursty", "two-class", "closed", "azure", "mooncake", "file")),
        ("poisson:rates=2", ("rates", "rate", "prompt")),
        ("poisson:rate=fast", ("rate", "fast", "number")),
        ("poisson:rate=0", ("rate", "range")),
        ("poisson:rate=nan", ("rate",)),
        ("poisson:n=1.5", ("n", "whole")),
        ("poisson:rate=1,rate=2", ("rate", "twice")),
        ("poisson:5", ("5", "NAME=VALUE")),
        ("poisson:rate=2,5", ("rate", "2,5")),
        ("poisson:prompt=normal(3,4)", ("prompt", "normal", "uniform", "lognormal")),
        ("poisson:prompt=uniform(3)", ("prompt", "low, high")),
        ("poisson:prompt=uniform(9,3)", ("prompt", "low", "high")),
        ("poisson:prompt=uniform(1,2,3)", ("uniform", "too many")),
        ("poisson:prompt=lognormal(mean=3)", ("lognormal", "mean", "median")),
        ("poisson:prompt=lognormal(3,median=4)", ("median", "twice")),
        ("poisson:prompt=lognormal(0)", ("median", "range")),
        ("poisson:prompt=lognormal(3,99)", ("sigma", "range")),
        ("poisson:out=", ("out",)),
        ("poisson:users=a", ("users", "NAME:NUMBER")),
        ("poisson:users=a:1,a:2", ("users", "twice")),
        ("poisson:users=a:1,rate=2", ("users", "rate")),
        ("poisson:seconds=0.001,rate=0.001", ("seconds", "no request")),
        ("closed:users=a:1.5", ("users", "whole")),
        ("closed:clients=2,every=1", ("seconds",)),
        ("closed:clients=2,users=a:1", ("clients", "users")),
        ("azure", ("azure:PATH",)),
        ("azure:", ("azure:PATH",)),
        ("azure:/nowhere.csv", ("/nowhere.csv",)),
        ("file:/nowhere.jsonl", ("/nowhere.jsonl",)),
        ("file:a\0b", ("null",)),
    ],
)
def test_errors_name_what_is_wrong(spec: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_workload(spec)
    for word in words:
        assert word in caught.value.message


WORDS = st.sampled_from(
    [
        *KINDS,
        *SHAPES,
        "rate",
        "n",
        "seconds",
        "prompt",
        "out",
        "users",
        "every",
        "cv",
        "clients",
        "priority",
        "a",
        "min",
    ]
)
PIECES = st.one_of(
    WORDS,
    st.sampled_from([":", "=", ",", "(", ")", " ", "-", "."]),
    st.integers(-3, 50).map(str),
    st.floats(allow_nan=True, allow_infinity=True, width=16).map(str),
    st.text(max_size=3),
)


@settings(deadline=None)
@given(st.sampled_from(list(KINDS)), st.lists(PIECES, max_size=14).map("".join))
def test_junk_is_a_workload_or_an_error_of_ours(kind: str, rest: str) -> None:
    try:
        workload = parse_workload(f"{kind}:n=5,{rest}")
    except MullamaError as error:
        assert error.message
    else:
        assert workload.all_requests()
        assert all(r.prompt_tokens >= 1 and r.output_tokens >= 1 for r in workload.all_requests())
        assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(workload.requests))


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_workload_or_an_error_of_ours(spec: str) -> None:
    try:
        parse_workload(spec)
    except MullamaError as error:
        assert error.message


@settings(deadline=None)
@given(st.lists(st.text("abc()=", max_size=5), min_size=1))
def test_split_loses_nothing(parts: list[str]) -> None:
    text = ",".join(parts)
    assert ",".join(split(text)) == text


def test_a_path_may_hold_commas(tmp_path: Path) -> None:
    file = tmp_path / "a,b=c.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n")
    (request,) = requests_of(f"azure:{file},n=3,max_out=10")
    assert (request.prompt_tokens, request.output_tokens) == (374, 10)
