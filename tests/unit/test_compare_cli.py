"""`mullama compare` through ``main``, on an engine without a model."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from compare_support import TimedEngine
from models_support import make_gguf

from mullama.cli.main import main

TRACE = "poisson:n=6,prompt=uniform(10,20),out=3,users=a:300,b:100"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MULLAMA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MULLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(make_gguf())


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> list[TimedEngine]:
    module = types.ModuleType("mullama.engine.engine")
    module.Engine = TimedEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mullama.engine.engine", module)
    monkeypatch.setattr(TimedEngine, "loaded", [])
    return TimedEngine.loaded


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        status = main(["compare", "--model", "./m.gguf", *argv])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_comparison(run: Run, tmp_path: Path, engines: list[TimedEngine]) -> None:
    pytest.importorskip("matplotlib")
    status, out, err = run(
        *("--schedulers", "fcfs,priority", "--trace", TRACE, "--rounds", "2", "--seed", "3", "--out", "results/x"),
        *("--scheduler-arg", "priority.ageing_s=5", "--slo-ttft-ms", "10000", "--parallel", "3", "--json", "r.json"),
    )
    assert status == 0, err
    assert "| fcfs |" in out
    assert "| priority |" in out
    assert "100 %" in out  # all good
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == json.loads((tmp_path / "results" / "x" / "report.json").read_text())
    assert (report["workload"]["seed"], report["rounds"], report["slo"]["ttft_ms"]) == (3, 2, 10000)
    assert report["policies"][1]["params"] == {"budget": 512, "ageing_s": "5"}
    assert report["model"]["name"] == "fake"
    assert report["options"]["parallel"] == 3
    assert {"version", "commit", "llama_cpp", "machine", "command", "date"} <= report.keys()
    names = {file.name for file in (tmp_path / "results" / "x").iterdir()}
    assert {"report.md", "trace.jsonl", "outcomes-fcfs-1.jsonl", "outcomes-priority-2.jsonl", "ttft-cdf.svg"} <= names
    (engine,) = engines
    assert engine.closed == 1
    assert engine.config.ctx_size == 256  # made to fit
    assert engine.config.parallel == 3


def test_a_recorded_trace_is_played_again(run: Run, tmp_path: Path, engines: list[TimedEngine]) -> None:
    assert run("--schedulers", "fcfs", "--trace", TRACE, "--seed", "9", "--record", "t.jsonl")[0] == 0
    status, out, _ = run("--schedulers", "fcfs", "--trace", "file:t.jsonl", "--seed", "9")
    assert status == 0
    assert f"`{TRACE}`, seed 9" in out
    first, second = ([(g.request.prompt, g.request.user) for g in engine.generations] for engine in engines)
    assert first == second


def test_wrong_usage_is_found_before_the_model_is_loaded(run: Run, engines: list[TimedEngine]) -> None:
    for argv, words in (
        (("--schedulers", "fcfs", "--trace", "gauss:n=3"), "there is no workload 'gauss'"),
        (("--schedulers", "fcfs,fcfs", "--trace", TRACE), "fcfs is there twice"),
        (("--schedulers", "fcfs", "--trace", TRACE, "--scheduler-arg", "x=1"), "POLICY.PARAM=VALUE"),
        (("--schedulers", "fcfs,nosuch", "--trace", TRACE), "there is no scheduler 'nosuch'"),
        (("--schedulers", "fcfs(nosuch=1)", "--trace", TRACE), "fcfs has no parameter 'nosuch'"),
        (("--schedulers", "fcfs", "--trace", TRACE, "--rounds", "0"), "--rounds"),
        (("--schedulers", "fcfs", "--trace", TRACE, "--slo-ttft-ms", "0"), "--slo-ttft-ms"),
        (("--schedulers", "fcfs"), "--trace"),
    ):
        status, out, err = run(*argv)
        assert (status, out) == (2, "")
        assert words in err
    assert engines == []


def test_plots_are_asked_for_before_the_model_is_loaded(
    run: Run, engines: list[TimedEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run("--schedulers", "fcfs", "--trace", TRACE, "--out", "o")
    assert status == 2
    assert "mullama[plots]" in err
    assert engines == []
    assert run("--schedulers", "fcfs", "--trace", TRACE, "--out", "o", "--no-plots")[0] == 0
    assert sorted(file.suffix for file in (tmp_path / "o").iterdir()) == [".csv", ".json", ".jsonl", ".jsonl", ".md"]


def test_too_small_a_context(run: Run, engines: list[TimedEngine]) -> None:
    status, _, err = run("--schedulers", "fcfs", "--trace", TRACE, "--ctx-size", "12")
    assert status == 2
    assert "raise --ctx-size" in err
    assert engines[0].closed == 1


def test_ctrl_c_keeps_what_was_measured(
    run: Run, engines: list[TimedEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load = TimedEngine.load.__func__  # type: ignore[attr-defined]

    def interrupted(cls, path, **options):  # type: ignore[no-untyped-def]
        engine = load(cls, path, **options)

        def on_submit(request: object) -> None:
            if sum(entry == "drop" for entry in engine.log) == 2:
                os.kill(os.getpid(), signal.SIGINT)

        engine.on_submit = on_submit
        return engine

    monkeypatch.setattr(TimedEngine, "load", classmethod(interrupted))
    status, out, _ = run("--schedulers", "fcfs,priority", "--trace", TRACE, "--out", "o", "--no-plots")
    assert status == 130
    assert "| fcfs |" in out
    assert "interrupted" in out
    assert "priority |" not in out.split("## By")[0]
    assert json.loads((tmp_path / "o" / "report.json").read_text())["interrupted"] is True
    assert engines[0].closed == 1


def test_a_dash_is_stdout(run: Run, tmp_path: Path) -> None:
    status, out, err = run("--schedulers", "fcfs", "--trace", TRACE, "--json", "-")
    assert status == 0, err
    assert json.loads(out)["policies"][0]["label"] == "fcfs"
    assert "| fcfs |" in err
    status, out, err = run("--schedulers", "fcfs", "--trace", TRACE, "--record", "-")
    assert status == 0, err
    assert json.loads(out.splitlines()[0])["spec"] == TRACE and len(out.splitlines()) == 7
    assert not (tmp_path / "-").exists()
    status, _, err = run("--schedulers", "fcfs", "--trace", TRACE, "--record", "-", "--json", "-")
    assert status == 2 and "only one can be written to stdout" in err
