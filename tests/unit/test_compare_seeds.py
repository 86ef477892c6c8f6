"""Several seeds, sweeps and CSV: what a paper needs of `compare` and `simulate`."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from compare_support import TimedEngine, run_virtually
from simulation_support import costs
from test_compare_cli import engines, home  # noqa: F401 - fixtures
from test_compare_cli import run as run_compare
from test_simulation_cli import run as run_simulate  # noqa: F401

from mullama.compare.intervals import interval, intervals_of, ratio, t_quantile
from mullama.compare.provenance import source_of
from mullama.compare.report import make_report, to_markdown
from mullama.compare.runner import PolicySpec, Run, compare_seeds, parse_policies
from mullama.compare.sweeps import sweep
from mullama.errors import ConfigError
from mullama.scheduling import registry
from mullama.simulation import write_costs
from mullama.workload.base import Outcome, TraceRequest, Workload
from mullama.workload.metrics import Slo
from mullama.workload.prompts import Prompts
from mullama.workload.spec import parse_seeds, parse_workload

# ruff: noqa: F811 - fixtures

run_compare = run_compare
TRACE = "poisson:rate=3,n=40,prompt=uniform(20,200),out=20"


# -- intervals --------------------------------------------------------------------------------------------------------


def test_an_interval_is_student_s() -> None:
    """By hand: five values of mean 3 and variance 2.5; t of four degrees of freedom is 2.776."""
    mean, low, high = interval([1, 2, 3, 4, 5])
    half = 2.776 * math.sqrt(2.5 / 5)
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half))
    assert interval([7, 7, 7]) == (7, 7, 7)
    with pytest.raises(ValueError, match="two values"):
        interval([1.0])


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (4, 2.776), (30, 2.042), (40, 2.021), (60, 2.000), (120, 1.980)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=6e-4)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """Of 2,000 samples of five, 95 % have the true mean within; four standard deviations of that count are 40."""
    rng = random.Random(7)
    held = 0
    for _ in range(2000):
        _, low, high = interval([rng.gauss(10, 3) for _ in range(5)])
        held += low <= 10 <= high
    assert abs(held - 1900) < 40


def test_intervals_of_metrics() -> None:
    seeds = [{"a": {"p50": value}, "n": None, "one": 1 if value > 2 else None, "g": {}} for value in (1.0, 2.0, 6.0)]
    found = intervals_of(seeds)
    assert found["a"]["p50"]["mean"] == 3.0
    assert found["a"]["p50"]["low"] == 0.0, "no number of these is below 0"
    assert (found["a"]["p50"]["min"], found["a"]["p50"]["max"]) == (1.0, 6.0)
    assert found["n"] is None and found["one"] is None and found["g"] == {}


def test_ratios_are_paired() -> None:
    """A policy that always takes half of the time differs clearly, however far the seeds are apart."""
    first = [100.0, 1000.0, 5000.0, 20.0]
    found = ratio([value / 2 for value in first], first)
    assert found is not None
    assert [found[name] for name in ("ratio", "low", "high")] == pytest.approx([0.5, 0.5, 0.5])
    assert ratio([1.0, 4.0], [2.0, 2.0]) == pytest.approx({"ratio": 1.0, "low": pytest.approx(0, abs=1e-3),
                                                          "high": pytest.approx(6676, rel=0.02)})  # fmt: skip
    assert ratio([1.0, None], [1.0, 1.0]) is None
    assert ratio([0.0, 1.0], [1.0, 1.0]) is None
    assert ratio([1.0], [1.0]) is None


# -- the report -------------------------------------------------------------------------------------------------------


def a_run(policy: str, seed: int, number: int, ttft: float) -> Run:
    request = TraceRequest(0.0, 10, 3, group="")
    outcome = Outcome(0, request, token_s=(ttft, ttft + 0.1, ttft + 0.2), finished_s=ttft + 0.2)
    return Run(policy, number, [outcome], {"chunk": 8}, None, 0.0, 0, seed=seed)


PROVENANCE = {
    "version": "1", "commit": "abc", "llama_cpp": "0c1e57098", "date": "2026-01-01", "command": "x",
    "machine": {"cpu": "A CPU", "cores": 2, "system": "Linux"},
    "model": {"name": "m", "description": "llama 135M", "n_parallel": 2, "n_ctx": 256},
}  # fmt: skip


def a_report(**more: Any) -> dict[str, Any]:
    policies = [PolicySpec("fcfs", "fcfs"), PolicySpec("srpt", "srpt")]
    workloads = [Workload((TraceRequest(0.0, 10, 3),), spec="poisson:rate=1", seed=seed) for seed in (4, 5, 6)]
    runs = [
        a_run("fcfs", seed, number, ttft * number) for seed, ttft in ((4, 0.1), (5, 0.2), (6, 0.6)) for number in (1, 2)
    ]
    runs += [
        a_run("srpt", seed, number, ttft * number)
        for seed, ttft in ((4, 0.05), (5, 0.1), (6, 0.3))
        for number in (1, 2)
    ]
    return make_report(runs, policies, workloads, Slo(), rounds=2, provenance=PROVENANCE, **more)


def test_a_report_of_seeds() -> None:
    report = a_report()
    fcfs, srpt = report["policies"]
    assert (report["seeds"], report["interrupted"]) == ([4, 5, 6], False)
    assert [fcfs["seeds"][seed]["ttft_ms"]["p50"] for seed in (4, 5, 6)] == pytest.approx([150, 300, 900])
    found = fcfs["interval"]["ttft_ms"]["p50"]
    assert (found["mean"], found["min"], found["max"]) == pytest.approx((450, 150, 900))
    assert fcfs["median"]["ttft_ms"]["p50"] == pytest.approx(300)
    assert [(run["seed"], run["round"]) for run in fcfs["runs"]] == [(4, 1), (4, 2), (5, 1), (5, 2), (6, 1), (6, 2)]
    assert srpt["against_first"]["ttft_ms.p50"]["ratio"] == pytest.approx(0.5)
    text = to_markdown(report)
    assert "3 seeds (4 to 6)" in text
    assert "means of 6 of 3 x 2 runs (medians of rounds), one seed a sample, and their 95 % intervals" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| fcfs |")]
    assert row.startswith("| fcfs | 450 (0.00–")
    assert "## Against fcfs, seed by seed" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| srpt | 0.50 (0.50–0.50)")]
    json.dumps(report)


def test_a_note_names_the_seed() -> None:
    workloads = [Workload((TraceRequest(0.0, 10, 3),), spec="x", seed=seed) for seed in (4, 5)]
    runs = [dataclasses.replace(a_run("fcfs", seed, 1, 0.1), neighbours=2.0 * (seed == 5)) for seed in (4, 5)]
    report = make_report(runs, [PolicySpec("fcfs", "fcfs")], workloads, Slo(), rounds=1, provenance=PROVENANCE)
    (note,) = report["notes"]
    assert "2.0 cores busy in round 1 of seed 5;" in note


def test_one_seed_is_as_before() -> None:
    workload = Workload((TraceRequest(0.0, 10, 3),), spec="x", seed=4)
    runs = [a_run("fcfs", 4, number, 0.1 * number) for number in (1, 2)]
    report = make_report(runs, [PolicySpec("fcfs", "fcfs")], workload, Slo(), rounds=2, provenance=PROVENANCE)
    assert report["policies"][0]["interval"] is None and report["policies"][0]["seeds"] is None
    assert "medians of 2 of 2 rounds" in to_markdown(report)
    assert "Against" not in to_markdown(report)


def test_missing_seeds_are_an_interruption() -> None:
    workloads = [Workload((TraceRequest(0.0, 10, 3),), spec="x", seed=seed) for seed in (4, 5)]
    report = make_report([a_run("fcfs", 4, 1, 0.1)], [PolicySpec("fcfs", "fcfs")], workloads, Slo(), rounds=1,
                         provenance=PROVENANCE)  # fmt: skip
    assert report["interrupted"] is True
    assert "interrupted" in to_markdown(report)


def test_every_seed_is_played_in_every_round_by_every_policy() -> None:
    workloads = parse_seeds("poisson:rate=5,n=3,prompt=10,out=2", 3, 2)
    played = [(one, Prompts(range(100), one.seed)) for one in workloads]

    async def go(clock: Any) -> list[Run]:
        policies = parse_policies("fcfs,priority")
        return await compare_seeds(TimedEngine(), policies, played, rounds=2, clock=clock)  # type: ignore[arg-type]

    runs = run_virtually(go)
    assert [(run.policy, run.seed, run.round) for run in runs] == [
        ("fcfs", 3, 1), ("priority", 3, 1), ("priority", 4, 1), ("fcfs", 4, 1),
        ("fcfs", 3, 2), ("priority", 3, 2), ("priority", 4, 2), ("fcfs", 4, 2),
    ]  # fmt: skip
    assert {len(run.outcomes) for run in runs} == {3}


def test_seeds_that_change_nothing_are_refused(tmp_path: Path) -> None:
    from mullama.workload.recorded import write_trace

    write_trace(tmp_path / "t.jsonl", parse_workload(TRACE, 1))
    with pytest.raises(ConfigError, match="is the same for every seed"):
        parse_seeds(f"file:{tmp_path / 't.jsonl'}", 0, 3)
    assert len(parse_seeds(f"file:{tmp_path / 't.jsonl'}", 0, 1)) == 1
    assert [one.seed for one in parse_seeds(TRACE, 7, 3)] == [7, 8, 9]


# -- sweeps -----------------------------------------------------------------------------------------------------------


def params_of(policy: PolicySpec) -> list[str]:
    return list(registry.create(policy.spec, policy.params).params())


def labels(schedulers: str, *sweeps: str) -> list[str]:
    return [one.label for one in sweep(parse_policies(schedulers), sweeps, params_of)]


def test_a_sweep_makes_an_entry_for_each_value() -> None:
    assert labels("fcfs", "prefill_budget=64,128") == ["fcfs(prefill_budget=64)", "fcfs(prefill_budget=128)"]
    assert labels("fcfs,round_robin", "quantum_tokens=4,8") == [
        "fcfs", "round_robin(quantum_tokens=4)", "round_robin(quantum_tokens=8)",
    ]  # fmt: skip
    assert labels("fcfs,srpt", "fcfs.chunk=16,32") == ["fcfs(chunk=16)", "fcfs(chunk=32)", "srpt"]
    assert labels("fcfs(chunk=8)", "prefill_budget=64,128", "max_running=1,2") == [
        f"fcfs(chunk=8,prefill_budget={budget},max_running={running})" for budget in (64, 128) for running in (1, 2)
    ]
    assert labels("fcfs(chunk=8),fcfs", "chunk=16") == ["fcfs(chunk=8)", "fcfs(chunk=16)"], "what is said is not swept"
    (one, _) = sweep(parse_policies("fcfs(chunk=8)"), ["prefill_budget=64,128"], params_of)
    assert one.params == {"chunk": "8", "prefill_budget": "64"}
    assert labels("fcfs") == ["fcfs"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prefill_budget", "is not PARAM=VALUE,VALUE"),
        ("=1,2", "is not PARAM=VALUE,VALUE"),
        ("chunk=", "is not PARAM=VALUE,VALUE"),
        ("chunk=1,,2", "is not PARAM=VALUE,VALUE"),
        (".chunk=1", "is not PARAM=VALUE,VALUE"),
        ("nonsense=1", "no policy with a parameter 'nonsense' is compared"),
        ("srpt.chunk=1", "no 'srpt' with a parameter 'chunk' is compared"),
        ("chunk=" + ",".join(map(str, range(1, 300))), "299 entries are too many"),
    ],
)
def test_wrong_sweeps(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"--sweep: .*{reason}"):
        labels("fcfs", text)


def test_a_sweep_that_makes_an_entry_twice() -> None:
    with pytest.raises(ConfigError, match=r"--sweep: fcfs\(chunk=8\) is there twice"):
        labels("fcfs(chunk=8),fcfs", "chunk=8")


# -- through the commands ---------------------------------------------------------------------------------------------


def test_simulating_seeds_and_a_sweep(run_simulate: Any, tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.json", costs())
    argv = ("simulate", "--costs", "costs.json", "--trace", TRACE, "--schedulers", "fcfs,srpt", "--seed", "3")
    status, out, err = run_simulate(*argv, "--seeds", "4", "--sweep", "fcfs.chunk=16,64", "--csv", "m.csv", "--json",
                                    "r.json", "--out", "o", "--no-plots")  # fmt: skip
    assert status == 0, err
    assert "4 seeds (3 to 6)" in out and "## Against fcfs(chunk=16), seed by seed" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert [entry["label"] for entry in report["policies"]] == ["fcfs(chunk=16)", "fcfs(chunk=64)", "srpt"]
    assert sorted(report["policies"][0]["counters"]) == ["3", "4", "5", "6"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "m.csv").read_text())))
    assert (tmp_path / "o" / "metrics.csv").read_text() == (tmp_path / "m.csv").read_text()
    whole = [row for row in rows if row["part"] == "all"]
    assert [(row["policy"], row["seed"]) for row in whole] == [
        (label, str(seed)) for label in ("fcfs(chunk=16)", "fcfs(chunk=64)", "srpt") for seed in (3, 4, 5, 6)
    ]
    assert [row["param.chunk"] for row in whole[:8]] == ["16"] * 4 + ["64"] * 4
    for row, metrics in zip(whole, (one for entry in report["policies"] for one in entry["rounds"]), strict=True):
        assert float(row["ttft_ms.p50"]) == metrics["ttft_ms"]["p50"]
        assert int(row["requests"]) == 40
    assert {file.name for file in (tmp_path / "o").glob("*.jsonl")} == {
        *(f"trace-{seed}.jsonl" for seed in (3, 4, 5, 6)),
        *(
            f"outcomes-{name}-{seed}-1.jsonl"
            for name in ("fcfs_chunk=16", "fcfs_chunk=64", "srpt")
            for seed in (3, 4, 5, 6)
        ),
    }
    # Each seed alone gives the same numbers.
    status, out, err = run_simulate(*argv[:-1], "5", "--json", "-")
    assert json.loads(out)["policies"][1]["rounds"] == [report["policies"][2]["rounds"][2]]


def test_comparing_seeds(run_compare: Any, engines: Any, tmp_path: Path) -> None:
    trace = "poisson:n=4,prompt=uniform(10,20),out=3,users=a:300,b:100"
    argv = ("--schedulers", "fcfs,priority", "--trace", trace)
    status, out, err = run_compare(*argv, "--seeds", "2", "--seed", "5", "--rounds", "2", "--csv", "-")
    assert status == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {(row["policy"], row["seed"], row["round"]) for row in rows} == {
        (policy, seed, number) for policy in ("fcfs", "priority") for seed in "56" for number in "12"
    }
    assert {row["name"] for row in rows if row["part"] == "user"} <= {"a", "b"}
    assert "2 seeds (5 to 6)" in err, "the table is on stderr"
    assert "with --seeds, --out writes them all" in run_compare(*argv, "--seeds", "2", "--record", "t.jsonl")[2]


def test_a_user_s_policy_is_named_by_its_hash(run_simulate: Any, tmp_path: Path) -> None:
    code = "from mullama.scheduling import Fcfs\n\n\nclass Mine(Fcfs):\n    pass\n"
    (tmp_path / "mine.py").write_text(code)
    write_costs(tmp_path / "costs.json", costs(about={"computing": {"threads": 3}}))
    status, out, err = run_simulate("simulate", "--costs", "costs.json", "--trace", TRACE, "--schedulers",
                                    "fcfs,./mine.py:Mine", "--json", "r.json")  # fmt: skip
    assert status == 0, err
    digest = hashlib.sha256(code.encode()).hexdigest()
    assert f"mine.py: sha256 {digest[:16]}…" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert [entry["source"] for entry in report["policies"]] == [
        None, {"file": str(tmp_path / "mine.py"), "sha256": digest},
    ]  # fmt: skip
    assert report["computing"] == {"threads": 3}
    assert source_of(registry.create("fcfs", {})) is None
