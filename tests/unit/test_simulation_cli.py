"""`mullama simulate`, `mullama calibrate` and bench/simulator_error.py, without a model."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulation_support import costs

from bench import simulator_error
from mullama.cli.main import main
from mullama.cli.research import calibrate
from mullama.errors import ModelLoadError
from mullama.machine.neighbours import Neighbours
from mullama.simulation import read_costs, write_costs
from mullama.workload.recorded import write_trace
from mullama.workload.spec import parse_workload

TRACE = "poisson:rate=3,n=40,prompt=uniform(20,200),out=20"
ABOUT: dict[str, Any] = {
    "model": {"name": "small", "description": "llama 135M", "n_parallel": 3},
    "machine": {"cpu": "A CPU", "cores": 2, "system": "Linux"},
    "date": "2026-01-02T03:04:05+00:00",
    "threads": 2,
    "batch_size": 256,
    "llama_cpp": "0c1e57098",
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MULLAMA_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    write_costs(tmp_path / "costs.json", costs(about=ABOUT))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        out, err = capsys.readouterr()
        return status, out, err

    return run


def simulate(run: Run, *argv: str) -> tuple[int, str, str]:
    return run("simulate", "--costs", "costs.json", "--trace", TRACE, *argv)


def test_a_simulation(run: Run, tmp_path: Path) -> None:
    status, out, err = simulate(
        run, "--schedulers", "fcfs,srpt,fcfs(chunk=16)", "--seed", "3", "--json", "r.json", "--slo-ttft-ms", "500"
    )
    assert status == 0, err
    assert "simulated, by costs of 2026-01-02" in out
    for label in ("| fcfs |", "| srpt |", "| fcfs(chunk=16) |"):
        assert label in out
    assert "simulated 120 requests in" in err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["simulated"] is True
    assert report["model"] == {"name": "small", "description": "llama 135M", "n_parallel": 3, "n_ctx": 256}
    assert report["options"]["n_batch"] == 256
    assert report["machine"]["cpu"] == "A CPU"
    (fcfs, srpt, small) = report["policies"]
    assert fcfs["median"]["output_tokens"] == 800
    assert fcfs["counters"]["steps"] > 100
    assert small["params"]["chunk"] == 16
    assert small["counters"]["plans"] > fcfs["counters"]["plans"]
    assert srpt["median"]["failed"] == 0


def test_the_same_arguments_give_the_same_numbers(run: Run, tmp_path: Path) -> None:
    first, second, third = (
        simulate(run, "--schedulers", "fair,preemptive", "--seed", seed)[1].replace(f"--seed {seed}", "")
        for seed in ("5", "5", "6")
    )
    assert first == second
    assert first.splitlines()[-1] != third.splitlines()[-1]


def test_sizes(run: Run, tmp_path: Path) -> None:
    argv = ("--schedulers", "fcfs", "--json", "r.json")
    assert simulate(run, *argv, "--parallel", "1", "--ctx-size", "1000", "--batch-size", "64")[0] == 0
    one = json.loads((tmp_path / "r.json").read_text())
    assert (one["options"]["n_slots"], one["options"]["n_ctx"], one["options"]["n_batch"]) == (1, 1024, 64)
    assert simulate(run, *argv, "--parallel", "8", "--sampled")[0] == 0
    eight = json.loads((tmp_path / "r.json").read_text())
    assert eight["options"]["sampled"] is True
    assert eight["policies"][0]["median"]["ttft_ms"]["p50"] < one["policies"][0]["median"]["ttft_ms"]["p50"]


def test_outcomes_are_written(run: Run, tmp_path: Path) -> None:
    assert simulate(run, "--schedulers", "fcfs", "--out", "out/x")[0] == 0
    lines = (tmp_path / "out" / "x" / "outcomes-fcfs-1.jsonl").read_text().splitlines()
    outcomes = [json.loads(line) for line in lines]
    assert len(outcomes) == 40
    assert all(len(outcome["token_s"]) == 20 for outcome in outcomes)
    assert (tmp_path / "out" / "x" / "trace.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (("--schedulers", "nonsense"), 2, "there is no scheduler 'nonsense'; there are fcfs"),
        (("--schedulers", "fcfs(nope=1)"), 2, "has no parameter 'nope'"),
        (("--schedulers", "fcfs", "--ctx-size", "64", "--trace", "poisson:n=3,prompt=400"), 2, "needs 464 tokens"),
        (("--schedulers", "fcfs", "--trace", "wrong:n=3"), 2, "there is no workload 'wrong'"),
        (("--schedulers", "fcfs", "--costs", "none.json"), 2, "cannot read the cost file none.json"),
        (("--schedulers", "fcfs", "--parallel", "0"), 2, "--parallel"),
        (("--schedulers", "./mine.py:Mine"), 1, "broke its contract: plan() raised"),
    ],
)
def test_errors_are_one_line(run: Run, tmp_path: Path, argv: tuple[str, ...], status: int, message: str) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def add(self, seq): pass\n"
        "    def remove(self, seq_id): pass\n"
        "    def plan(self, state): 1 / 0\n"
    )
    got, out, err = simulate(run, *argv)
    assert got == status
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_a_cost_file_that_says_nothing_of_itself(run: Run, tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.json", costs())
    status, out, err = simulate(run, "--schedulers", "fcfs", "--json", "r.json")
    assert status == 0, err
    assert "an unknown date" in out
    assert json.loads((tmp_path / "r.json").read_text())["options"]["n_slots"] == 8


# -- calibrate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been measured, and with which configuration."""
    seen: list[Any] = []

    def measure(found: Any, config: Any, seconds: float, progress: Any) -> Any:
        seen.append((found, config, seconds))
        progress("measuring", 1, 2)
        return costs(about=ABOUT)

    monkeypatch.setattr("mullama.cli.load_progress.find_model", lambda reference: reference)
    monkeypatch.setattr(calibrate, "_measure", measure)
    monkeypatch.setattr(calibrate, "LOOK_S", 0.0)
    monkeypatch.setattr(Neighbours, "busy", lambda self: 0.1)
    return seen


def test_a_calibration_says_how_far_it_measured(run: Run, measured: list[Any]) -> None:
    status, out, err = run("calibrate", "--model", "m", "--out", "c.json")
    assert status == 0, err
    assert "measured: 1 to 8 sequences with up to 1,024 tokens each, prompt chunks of up to 512 tokens" in out
    assert "extrapolated" not in out
    assert "warning" not in err


def test_a_calibration_among_neighbours_says_so(
    run: Run, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([1.2, 0.8])
    monkeypatch.setattr(Neighbours, "busy", lambda self: next(looks))
    monkeypatch.setitem(ABOUT, "threads", 1)
    monkeypatch.setitem(ABOUT["model"], "n_parallel", 16)
    status, out, err = run("calibrate", "--model", "m", "--out", "c.json")
    assert status == 0, err
    assert "other processes are keeping 1.2 cores busy: wait until they have ended, or calibrate again" in err
    assert "other processes kept 0.8 cores busy: the costs are too high for it" in err
    assert "small, 1 thread; milliseconds" in out
    assert "beyond 8 sequences of the 16 slots costs are extrapolated; raise --seconds" in out
    assert read_costs(tmp_path / "c.json").about["neighbours"] == 0.8


def test_a_calibration_is_written(run: Run, tmp_path: Path, measured: list[Any]) -> None:
    status, out, err = run(
        *("calibrate", "--model", "m", "--out", "new/c.json", "--parallel", "3", "--seconds", "7", "--threads", "2")
    )
    assert status == 0, err
    assert read_costs(tmp_path / "new" / "c.json") == costs(about={**ABOUT, "neighbours": 0.1})
    assert "new/c.json: small, 2 threads" in out
    assert "decode of 1: 7.28, 4: 16.00, 8: 28.75 sequences" in out
    assert "prompt of 512 tokens: 520.0" in out
    ((found, config, seconds),) = measured
    assert (found, config.parallel, config.threads, config.threads_fixed, seconds) == ("m", 3, 2, True, 7.0)


def test_a_calibration_that_fails_leaves_nothing(
    run: Run, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise ModelLoadError("no such model")

    monkeypatch.setattr(calibrate, "_measure", fail)
    status, _, err = run("calibrate", "--out", "c.json")
    assert (status, "no such model" in err) == (1, True)
    assert not (tmp_path / "c.json").exists()
    before = (tmp_path / "costs.json").read_bytes()
    assert run("calibrate", "--out", "costs.json")[0] == 1
    assert (tmp_path / "costs.json").read_bytes() == before, "an old calibration is kept"


def test_interrupted(run: Run, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "_measure", interrupt)
    assert run("calibrate", "--out", "c.json")[0] == 130
    assert not (tmp_path / "c.json").exists()


# -- the error against the real engine ------------------------------------------------------------------------------


def test_the_error_of_the_simulator(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A simulated run in the place of a real one: no error with its own costs, some with those of another machine."""
    assert simulate(run, "--schedulers", "fcfs,srpt", "--seed", "2", "--out", "real")[0] == 0
    report = json.loads((tmp_path / "real" / "report.json").read_text())
    report["options"] = {"batch_size": 256}  # as compare has it
    (tmp_path / "real" / "report.json").write_text(json.dumps(report))
    assert simulator_error.main(["--costs", "costs.json", "--limit", "0.1", "--json", "e.json", "real"]) == 0
    out = capsys.readouterr().out
    assert out.count("+0.0 %") == 4
    assert "| real" in out
    rows = json.loads((tmp_path / "e.json").read_text())["results"]["rows"]
    assert [row["policy"] for row in rows] == ["fcfs", "srpt"]
    assert rows[0]["tok/s"]["range"] == [rows[0]["tok/s"]["real"]] * 2
    own = costs()
    slower = type(own.decode)(own.decode.x, own.decode.y, [[3 * ns for ns in row] for row in own.decode.ns])
    write_costs(tmp_path / "slow.json", costs(about=ABOUT, decode=slower))
    assert simulator_error.main(["--costs", "slow.json", "--limit", "15", "real"]) == 1
    assert simulator_error.main(["--costs", "slow.json", "real"]) == 0
    assert simulator_error.main(["--costs", "slow.json", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


# -- stdin and stdout -------------------------------------------------------------------------------------------------


def test_a_dash_is_stdout(run: Run, tmp_path: Path) -> None:
    status, out, err = simulate(run, "--schedulers", "fcfs", "--json", "-")
    assert status == 0, err
    report = json.loads(out)
    assert [entry["label"] for entry in report["policies"]] == ["fcfs"]
    assert "| fcfs |" in err, "the table does not get in between"
    assert not (tmp_path / "-").exists()


def test_a_dash_is_stdin(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (tmp_path / "costs.json").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    status, out, err = run("simulate", "--costs", "-", "--trace", TRACE, "--schedulers", "fcfs")
    assert status == 0, err
    assert "| fcfs |" in out


def test_a_trace_comes_through_a_pipe(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trace(tmp_path / "t.jsonl", parse_workload(TRACE, 5))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "t.jsonl").read_bytes())))
    argv = ("--costs", "costs.json", "--schedulers", "fcfs", "--json", "-")
    piped = json.loads(run("simulate", "--trace", "file:-", *argv)[1])
    read = json.loads(run("simulate", "--trace", "file:t.jsonl", *argv)[1])
    assert piped["policies"] == read["policies"]


def test_a_calibration_goes_to_stdout(run: Run, tmp_path: Path, measured: list[Any]) -> None:
    status, out, err = run("calibrate", "--model", "m", "--out", "-")
    assert status == 0, err
    (tmp_path / "new.json").write_text(out)
    assert read_costs(tmp_path / "new.json").about["model"]["name"] == "small"
    assert "milliseconds" in err
    assert not (tmp_path / "-").exists()


def test_figures_are_drawn(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    status, _, err = simulate(run, "--schedulers", "fcfs,srpt", "--out", "out")
    assert status == 0, err
    assert {"ttft-cdf.svg", "itl-cdf.png"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert simulate(run, "--schedulers", "fcfs", "--out", "plain", "--no-plots")[0] == 0
    assert not list((tmp_path / "plain").glob("*.svg"))


def test_sizes_may_be_written_short(run: Run) -> None:
    argv = ("--schedulers", "fcfs", "--json", "-")
    found = json.loads(simulate(run, *argv, "--ctx-size", "2k", "--kv-tokens", "1k", "--kv-host-tokens", "1M")[1])
    assert [found["options"][name] for name in ("n_ctx", "kv_tokens", "host_tokens")] == [2048, 1024, 1 << 20]
    status, _, err = simulate(run, *argv, "--ctx-size", "2q")
    assert status == 2 and "'2q' is not a number of tokens" in err
