"""Ways of computing in a real server: one that fails its trial is not used, and one that is named is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .support import ServerProcess, run_mullama

PROMPT = list(range(40, 60))


def told(running: ServerProcess) -> tuple[set[str], dict[str, str], str]:
    """The ways that the server says are taken, those that a profile says were, and an answer."""
    answer = running.complete(PROMPT, max_tokens=32, ignore_eos=True)
    ways = {way for of in running.scheduler()["kernels"].values() for way in of["columns"].values()}
    return ways, answer["profile"]["kernels"], answer["choices"][0]["text"]


def test_a_server_starts_without_the_ways_that_fail(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """All but the plain one crash or compute garbage; the answers are those of the reference computations."""
    args = ["--model", f"tiny={tiny_model()}", "--threads", "1"]
    fault = "tiles=crash,sgemm=differ,tiled=crash,repack=differ,amx=crash"
    home = str(tmp_path / "home")
    with ServerProcess(tmp_path / "a", args, MULLAMA_HOME=home, MULLAMA_TRIAL_FAULT=fault) as running:
        ways, profile, answer = told(running)
        assert ways == {"plain"} and set(profile.values()) == {"plain"}
        machine = running.get("/internal/machine").raise_for_status().json()
    doctor = json.loads(run_mullama("doctor", "--json", MULLAMA_HOME=home, MULLAMA_TRIAL_FAULT=fault).stdout)
    for report, is_running in ((machine, True), (doctor, False)):
        (of,) = [of for of in report["ways"] if of["type"] == "Q8_0"]
        verdicts = {each["way"]: each["verdict"] for each in of["ways"]}
        assert of["in_charge"] is is_running and of["chosen"] == {"1": "plain"} and verdicts["plain"] == "right"
        assert "SIGILL" in verdicts["tiles"] and "wrong results" in verdicts["sgemm"]
    deterministic = [*args, "--deterministic"]
    with ServerProcess(tmp_path / "b", deterministic, MULLAMA_HOME=home, MULLAMA_TRIAL_FAULT=fault) as running:
        assert told(running)[2] == answer
    for way, reason in (("tiles", "SIGILL"), ("sgemm", "wrong results")):
        done = run_mullama(
            "serve", "--port", "0", *args, "--kernels", way, MULLAMA_HOME=home, MULLAMA_TRIAL_FAULT=fault, timeout=90
        )
        stderr = done.stderr.decode()
        assert done.returncode in (1, 2) and done.stdout == b"" and "Traceback" not in stderr
        assert f"kernels {way} cannot be used" in stderr and reason in stderr
    assert len(list((tmp_path / "home" / "kernels").glob("*.json"))) == 1, "and nothing was tried twice"


@pytest.mark.parametrize("way", ["plain", "amx"])
def test_a_named_way(start: Callable[..., ServerProcess], tiny_model: Callable[..., Path], way: str) -> None:
    running = start("--model", f"tiny={tiny_model()}", "--kernels", way, model=False)
    ways, profile, _ = told(running)
    assert ways <= {way, "plain"} and set(profile.values()) <= {way, "plain"}
    if way == "amx" and ways == {"plain"}:
        assert "there is no such way" in running.stderr, "and it is said"
