"""Reports, recordings and plots of a comparison."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cli_support import model_info

from mullama.compare import provenance
from mullama.compare.plots import _limits, write_plots
from mullama.compare.recording import file_names, write_folder
from mullama.compare.report import make_report, to_markdown
from mullama.compare.runner import PolicySpec, Run
from mullama.errors import ConfigError
from mullama.workload.base import Client, Outcome, TraceRequest, Workload
from mullama.workload.metrics import Slo
from mullama.workload.recorded import read_trace

PROVENANCE: dict[str, Any] = {
    "version": "0.1.0", "commit": "abc1234", "llama_cpp": "0c1e57098aa", "date": "2026-01-01T00:00:00+00:00",
    "command": "mullama compare", "machine": {"cpu": "a|b", "cores": 2, "system": "Linux"},
    "model": asdict(model_info()), "options": {},
}  # fmt: skip
POLICIES = [PolicySpec("fcfs", "fcfs"), PolicySpec("srpt(predictor=oracle)", "srpt"), PolicySpec("fair", "fair")]
WORKLOAD = Workload(
    requests=tuple(TraceRequest(i * 0.1, 10, 3, user="ab"[i // 3], group=("batch", "urgent")[i % 2]) for i in range(6)),
    spec="poisson:rate=10",
    seed=4,
)


def run(policy: str, number: int, slow: float = 1.0, **fields: Any) -> Run:
    outcomes = [
        Outcome(i, r, tuple(r.at_s + slow * 0.1 * (k + 1) for k in range(3)), r.at_s + slow * 0.3)
        for i, r in enumerate(WORKLOAD.requests)
    ]
    known = {"params": {"x": 1}, "fallback": None, "late_ms": 0.5, "exhausted": 0}
    return Run(policy, number, outcomes, **{**known, **fields})


RUNS = [
    run("fcfs", 1),
    run("srpt(predictor=oracle)", 1, 2.0),
    run("fcfs", 2, 3.0),
    run("srpt(predictor=oracle)", 2, 2.0),
]


def report(runs: list[Run] = RUNS, slo: Slo = Slo(), policies: list[PolicySpec] = POLICIES[:2]) -> dict[str, Any]:  # noqa: B008
    return make_report(runs, policies, WORKLOAD, slo, rounds=2, provenance=PROVENANCE)


def test_medians_of_rounds() -> None:
    found = report()
    fcfs, srpt = found["policies"]
    assert [one["ttft_ms"]["p50"] for one in fcfs["rounds"]] == pytest.approx([100, 300])
    assert fcfs["median"]["ttft_ms"]["p50"] == pytest.approx(200)
    assert srpt["median"]["groups"]["urgent"]["itl_ms"]["p99"] == pytest.approx(200)
    assert (fcfs["scheduler"], fcfs["params"], fcfs["late_ms"]) == ("fcfs", {"x": 1}, 0.5)
    assert found["workload"]["spec"] == "poisson:rate=10"
    assert found["workload"]["output_tokens"] == 18
    assert (found["interrupted"], found["notes"], found["rounds"]) == (False, [], 2)
    json.dumps(found)


def test_markdown_has_the_numbers_and_where_they_come_from() -> None:
    text = to_markdown(report(slo=Slo(ttft_ms=250)))
    for word in (
        "poisson:rate=10",
        "seed 4",
        "abc1234",
        "0c1e57098",
        "2 cores",
        "2 of 2 rounds",
        "TTFT at most 250 ms",
    ):
        assert word in text
    lines = [line for line in text.splitlines() if line.startswith("| fcfs |")]
    assert lines[0].startswith("| fcfs | 200 |")
    (head,) = [line for line in text.splitlines() if line.startswith("| policy |")]
    assert [cell.strip() for cell in head.split("|")][-6:-1] == ["goodput/s", "good", "fairness", "preempted", "failed"]
    assert "## By class" in text
    assert "| urgent | srpt(predictor=oracle) |" in text
    assert "## By user" in text


def test_users_that_are_the_classes_are_shown_once() -> None:
    found = report()
    for entry in found["policies"]:
        entry["median"]["users"] = entry["median"]["groups"]
    text = to_markdown(found)
    assert "## By class" in text
    assert "## By user" not in text


def test_a_column_without_numbers_is_left_out() -> None:
    text = to_markdown(report())
    assert "goodput" not in text
    assert "fairness" in text


def test_notes_say_what_must_be_known() -> None:
    failed = Outcome(0, WORKLOAD.requests[0], error="no | room", finished_s=1.0)
    odd = run("fcfs", 1, fallback="plan() raised", late_ms=99.0, exhausted=2)
    odd.outcomes[0] = failed
    found = report([odd], policies=POLICIES)
    assert found["interrupted"] is True
    assert [entry["label"] for entry in found["policies"]] == ["fcfs"]
    text = to_markdown(found)
    for words in (
        "fcfs took over in round 1: plan() raised",
        "99 ms late",
        "2 clients ran out",
        "no \\| room",
        "interrupted",
    ):
        assert words in text


def test_the_folder_can_be_read_and_played_again(tmp_path: Path) -> None:
    workload = Workload(WORKLOAD.requests, (Client(WORKLOAD.requests[:2], 0.5),), 9.0, "closed:x", 1)
    write_folder(tmp_path / "new" / "out", report(), RUNS, workload)
    folder = tmp_path / "new" / "out"
    assert read_trace(folder / "trace.jsonl") == workload
    assert len((folder / "outcomes-fcfs-2.jsonl").read_text().splitlines()) == 6
    first = (folder / "outcomes-srpt_predictor=oracle-1.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["token_s"] == pytest.approx((0.2, 0.4, 0.6))
    assert json.loads((folder / "report.json").read_text()) == report()
    assert (folder / "report.md").read_text() == to_markdown(report())


def test_file_names_are_plain_and_different() -> None:
    names = file_names(["fcfs", "./mine.py:My", "a(b=1)", "a[b=1]", "../..", "fcfs"])
    assert names["fcfs"] == "fcfs"
    assert names["./mine.py:My"] == "mine.py_My"
    assert len(set(names.values())) == 5
    assert all("/" not in name and name for name in names.values())


def test_plots_are_files_of_their_kind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = write_plots(tmp_path, RUNS)
    assert sorted(file.name for file in files) == sorted(
        f"{name}.{kind}"
        for name in ("ttft-cdf", "itl-cdf", "ttft-over-time", "ttft-percentiles")
        for kind in ("png", "svg")
    )
    for file in files:
        data = file.read_bytes()
        if file.suffix == ".png":
            assert data.startswith(b"\x89PNG\r\n\x1a\n")
            assert data.endswith(b"IEND\xaeB`\x82")
        else:
            root = ET.fromstring(data)
            assert root.tag.endswith("}svg")
            assert len(root.findall(".//{http://www.w3.org/2000/svg}path")) > 5
    before = {file.name: file.read_bytes() for file in files}
    assert {file.name: file.read_bytes() for file in write_plots(tmp_path, RUNS)} == before


def test_plots_of_failures_only(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    failed = [Outcome(0, TraceRequest(0, 1, 1), error="x")]
    files = write_plots(tmp_path, [Run("fcfs", 1, failed, {}, None, 0.0, 0)])
    assert all(file.stat().st_size > 1000 for file in files)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"mullama\[plots\]"):
        write_plots(tmp_path, RUNS)


def test_the_commit_is_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() is None
    (tmp_path / ".git").mkdir()  # not a repository
    assert provenance.commit() is None


def test_neighbours_are_named() -> None:
    loud = run("fcfs", 1, neighbours=1.25)
    assert "other processes kept 1.2 cores busy in round 1" in str(report([loud, *RUNS[1:]])["notes"])
    quiet = report([run("fcfs", 1, neighbours=0.2), *RUNS[1:]])
    assert "other processes" not in str(quiet["notes"])
    assert quiet["policies"][0]["neighbours"][0] == 0.2


@pytest.mark.parametrize(
    ("samples", "limits"),
    [
        ([[200.0, 400.0], [800.0]], (200 / 1.15, 800 * 1.15)),  # nothing below the first sample
        ([[]], (1.0, 10.0)),
        ([[5.0]], (5 / 1.15, 7.5)),
        ([[0.0] + [30.0] * 199], (30 / 1.15, 45.0)),  # one gap of 0 does not stretch the axis
    ],
)
def test_curves_fill_their_axis(samples: list[list[float]], limits: tuple[float, float]) -> None:
    assert _limits(samples) == pytest.approx(limits)
