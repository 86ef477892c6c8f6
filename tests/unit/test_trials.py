"""The parent of trials: what is held against a way, and what is not. The child is a script that does as it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama import faults
from mullama.machine import trials
from mullama.machine.trial_child import PROVED_ROWS, PROVED_VALUES, proved_shape
from mullama.machine.trials import TIMED, TOLERANCE, WAYS, Found, Task

#: For "prove TYPE WAY" and "time TYPE", what the plan says: code that runs before the words of its end.
SCRIPT = """
import json, os, signal, sys, time
plan = json.loads(os.environ["PLAN"])
def tell(**fields): print(json.dumps(fields), flush=True)
def die(number=9): os.kill(os.getpid(), number); time.sleep(60)
exec(plan.get("first", ""))
for task in json.loads(os.environ["MULLAMA_TRIAL"]):
    kind, ways = task["type"], task["ways"]
    if task["is_timing"]:
        times, is_quiet = {}, True
        exec(plan.get(f"before time {kind}", ""))
        for way in ways:
            tell(at="start", way=way)
            exec(plan.get(f"time {kind} {way}", ""))
            times[way] = {1: 1e-3, 8: 2e-3}
        exec(plan.get(f"time {kind}", ""))
        tell(at="end", times=times, is_quiet=is_quiet)
        continue
    (way,) = ways
    exec(plan.get(f"before {kind} {way}", ""))
    tell(at="start", way=way)
    there, error = True, 0.0
    exec(plan.get(f"prove {kind} {way}", ""))
    tell(at="end", there=there, is_exact=error == 0.0, is_steady=True, error=error)
    exec(plan.get(f"after {kind} {way}", ""))
exec(plan.get("last", ""))
"""


class Children:
    """Starts the script instead of the real child, and counts how often."""

    def __init__(self) -> None:
        self.plan: dict[str, str] = {}
        self.n_started = 0
        self.arguments: list[Sequence[str]] = []

    def start(self, module: str, arguments: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        assert module == "mullama.machine.trial_child"
        self.n_started += 1
        self.arguments.append(arguments)
        return subprocess.Popen(
            [sys.executable, "-S", "-c", SCRIPT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **variables, "PLAN": json.dumps({**self.plan, "n": self.n_started})},
        )


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    made = Children()
    monkeypatch.setattr(trials.child, "start", made.start)
    return made


def task(kind: int = 8, ways: tuple[str, ...] = ("plain", "sgemm", "tiles"), **fields: Any) -> Task:
    return Task(kind, f"T{kind}", ways, 32, 34, **{"shapes": ((64, 64),), **fields})


def run(*tasks: Task, **options: Any) -> tuple[dict[tuple[int, str], Found], set[int]]:
    found, disturbed = trials.run(tasks, 2, **options)
    by = {(each.type, each.way): each for each in found}
    assert by.keys() == {(of.type, way) for of in tasks for way in of.ways}, "a verdict for each way, and for no other"
    return by, disturbed


def test_all_is_well(children: Children) -> None:
    told: list[str] = []
    found, disturbed = run(task(), task(2, ("plain",)), niceness=7, progress=told.append)
    assert disturbed == set() and children.n_started == 2, "one child for the proofs, one for the times"
    assert children.arguments == [["2", "7"]] * 2
    for each in found.values():
        assert each.may_be_used and each.is_exact and each.is_steady and each.is_lasting
        assert each.times == {"64x64": {1: 1e-3, 8: 2e-3}}
    assert told[:4] == ["T8: plain", "T8: sgemm", "T8: tiles", "T2: plain"]


def test_without_shapes_nothing_is_timed(children: Children) -> None:
    found, _ = run(task(shapes=()))
    assert children.n_started == 1 and all(each.times == {} for each in found.values())


SIGNALS = [
    signal.Signals[name]
    for name in ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS", "SIGXCPU")
    if hasattr(signal, name)
]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_way_that_crashes_is_not_used_and_the_rest_is(children: Children, number: signal.Signals) -> None:
    children.plan = {"prove 8 sgemm": f"die({int(number)})"}
    found, disturbed = run(task())
    crashed = found[8, "sgemm"]
    assert not crashed.may_be_used and crashed.is_lasting and number.name in crashed.fault and not crashed.times
    if number == signal.SIGILL:
        assert "instruction" in crashed.fault
    for way in ("plain", "tiles"):
        assert found[8, way].may_be_used and found[8, way].times
    assert disturbed == set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_who_is_killed_from_outside_is_tried_again_some_time(children: Children, number: signal.Signals) -> None:
    children.plan = {"prove 8 tiles": f"die({int(number)})"}
    found, _ = run(task())
    assert not found[8, "tiles"].may_be_used and not found[8, "tiles"].is_lasting
    assert "memory" in found[8, "tiles"].fault and found[8, "plain"].is_lasting


@pytest.mark.parametrize(("code", "word"), [("sys.exit(0)", "status 0"), ("raise MemoryError('no room')", "no room")])
def test_a_child_that_ends_early(children: Children, code: str, word: str) -> None:
    children.plan = {"prove 8 sgemm": code}
    found, _ = run(task())
    assert word in found[8, "sgemm"].fault and not found[8, "sgemm"].is_lasting and "\n" not in found[8, "sgemm"].fault
    assert found[8, "tiles"].may_be_used


def test_a_way_that_hangs_is_given_up(children: Children) -> None:
    children.plan = {"prove 8 plain": "time.sleep(600)"}
    started = time.monotonic()
    found, _ = run(task(), patience_s=2.0)
    assert time.monotonic() - started < 300
    assert found[8, "plain"].fault == "hung: stopped after 2 s" and found[8, "plain"].is_lasting
    assert found[8, "sgemm"].may_be_used and found[8, "tiles"].may_be_used


def test_a_way_that_deafens_itself_is_given_up(children: Children) -> None:
    """It closed its end, and goes on: the end of its words is not the end of its process."""
    children.plan = {"prove 8 tiles": "os.close(1); time.sleep(600)"}
    found, _ = run(task(), patience_s=2.0)
    assert found[8, "tiles"].fault.startswith("hung") and found[8, "plain"].may_be_used


def test_every_way_crashes(children: Children) -> None:
    children.plan = {f"prove 8 {way}": "die(signal.SIGILL)" for way in WAYS}
    found, disturbed = run(task(ways=WAYS))
    assert not any(each.may_be_used for each in found.values()) and disturbed == set()
    assert children.n_started == len(WAYS), "and nothing is left to time"


def test_a_child_that_cannot_even_start(children: Children) -> None:
    children.plan = {"first": "die(signal.SIGILL)"}
    found, _ = run(task(), task(2))
    assert not any(each.may_be_used for each in found.values())


def test_who_dies_between_two_ways_is_neither_of_them(children: Children) -> None:
    children.plan = {"before 2 plain": "if plan['n'] == 1: die(signal.SIGSEGV)"}
    found, _ = run(task(), task(2))
    assert all(each.may_be_used for each in found.values())
    assert children.n_started == 3, "one more for the proofs"


def test_who_dies_before_a_way_again_and_again_is_that_way(children: Children) -> None:
    children.plan = {"before 2 sgemm": "die(signal.SIGSEGV)"}
    found, _ = run(task(), task(2))
    assert [key for key, each in found.items() if not each.may_be_used] == [(2, "sgemm")]


def test_a_crash_at_its_end_after_all_was_told_does_not_count(children: Children) -> None:
    children.plan = {"last": "die(signal.SIGSEGV)"}
    found, _ = run(task())
    assert all(each.may_be_used and each.times for each in found.values())


def test_garbage_is_no_word(children: Children) -> None:
    """A library may write to stdout whatever it likes."""
    garbage = [
        "llama_init: hello",
        "{",
        "[1, 2]",
        "7",
        "null",
        '{"at": "start"}',
        '{"at": "start", "way": ["plain"]}',
        '{"at": "start", "way": "none such"}',
        '{"at": "end"}',
        '{"at": "end", "there": true, "error": "much", "is_exact": true, "is_steady": true}',
    ]
    children.plan = {
        "prove 8 sgemm": f"[print(line) for line in {garbage!r}]; print('[' * 100_000); os.write(1, b'\\xff\\xfe\\n')",
        "time 8 plain": f"[print(line) for line in {garbage!r}]",
    }
    found, disturbed = run(task())
    assert all(each.may_be_used and each.times for each in found.values()) and disturbed == set()


def test_much_is_written_to_stderr(children: Children) -> None:
    """More than a pipe holds; the end of it is told."""
    children.plan = {"prove 8 sgemm": "sys.stderr.write('x ' * 500_000 + 'the end'); sys.exit(3)"}
    found, _ = run(task())
    fault = found[8, "sgemm"].fault
    assert fault.startswith("ended its process with status 3: ") and fault.endswith("the end") and len(fault) < 300


@pytest.mark.parametrize("error", ["1e-3", "float('inf')", "float('nan')", f"{TOLERANCE} * 1.01"])
def test_who_differs_is_not_used(children: Children, error: str) -> None:
    children.plan = {"prove 8 sgemm": f"error = {error}"}
    found, _ = run(task())
    assert "wrong results" in found[8, "sgemm"].fault and found[8, "sgemm"].is_lasting
    assert found[8, "sgemm"].times == {} and found[8, "plain"].times


def test_another_order_of_sums_is_no_difference(children: Children) -> None:
    children.plan = {"prove 8 sgemm": f"error = {TOLERANCE} * 0.99"}
    found, _ = run(task())
    assert found[8, "sgemm"].may_be_used and not found[8, "sgemm"].is_exact and found[8, "sgemm"].times


def test_what_is_not_there_has_no_fault(children: Children) -> None:
    children.plan = {"prove 8 tiles": "there = False"}
    found, _ = run(task())
    assert not found[8, "tiles"].may_be_used and found[8, "tiles"].fault == "" and found[8, "tiles"].times == {}


def test_who_dies_while_it_is_timed(children: Children) -> None:
    children.plan = {"time 8 sgemm": "die(signal.SIGSEGV)"}
    found, disturbed = run(task(), task(2))
    assert "SIGSEGV" in found[8, "sgemm"].fault and not found[8, "sgemm"].may_be_used
    assert found[8, "plain"].times and found[8, "tiles"].times and disturbed == set()
    assert all(found[2, way].times for way in task().ways), "and the next type is timed"


def test_who_hangs_while_it_is_timed(children: Children) -> None:
    children.plan = {"time 8 tiles": "time.sleep(600)"}
    found, _ = run(task(), patience_s=2.0)
    assert found[8, "tiles"].fault.startswith("hung") and found[8, "plain"].times and found[8, "sgemm"].times


def test_all_die_while_they_are_timed(children: Children) -> None:
    children.plan = {f"time 8 {way}": "die(signal.SIGBUS)" for way in WAYS}
    found, disturbed = run(task())
    assert not any(each.may_be_used for each in found.values()) and disturbed == set()


def test_no_memory_for_the_weights_to_time_is_no_way_s_fault(children: Children) -> None:
    """The same for both types: the second one's start must not be taken for the first one's ways."""
    children.plan = {f"before time {kind}": "raise MemoryError" for kind in (8, 2)}
    found, disturbed = run(task(), task(2, ("plain", "repack")), task(3))
    assert disturbed == {8, 2} and all(each.may_be_used for each in found.values())
    assert all(bool(each.times) == (each.type == 3) for each in found.values())


def test_a_busy_machine(children: Children) -> None:
    children.plan = {"time 8": "is_quiet = False"}
    found, disturbed = run(task(), task(2))
    assert disturbed == {8} and all(bool(each.times) == (each.type == 2) for each in found.values())


@pytest.mark.parametrize("times", ["{7: 1.0}", "{1: 0.0}", "{1: -1.0}", "{1: float('nan')}", "{1: float('inf')}"])
def test_times_that_cannot_be_are_none(children: Children, times: str) -> None:
    children.plan = {"time 8": f"times['sgemm'] = {times}"}
    found, _ = run(task())
    assert found[8, "sgemm"].may_be_used and found[8, "sgemm"].times == {} and found[8, "plain"].times


def test_no_child_outlives_its_parent_s_interest(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while something is tried."""
    started: list[subprocess.Popen[bytes]] = []
    real = children.start

    def start(*args: Any) -> subprocess.Popen[bytes]:
        started.append(real(*args))
        return started[-1]

    def interrupt(what: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trials.child, "start", start)
    children.plan = {"prove 8 plain": "time.sleep(600)"}
    with pytest.raises(KeyboardInterrupt):
        run(task(), progress=interrupt)
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_the_tasks_reach_the_child_whole(children: Children) -> None:
    """All the types there are, with as many shapes as are tried: it must fit where it is handed over."""
    shapes = tuple((k, 131_072) for k in (131_072, 65_536, 32_768, 16_384, 8192, 4096))
    found, _ = run(*(task(kind, WAYS, shapes=shapes) for kind in range(40)))
    assert len(found) == 40 * len(WAYS) and all(each.times for each in found.values())


def test_found_survives_json() -> None:
    found = Found(8, "tiles", True, "", True, True, 1e-7, {"64x64": dict.fromkeys(TIMED, 0.001)}, False)
    assert Found.from_json(json.loads(json.dumps(found.to_json()))) == found


@given(st.integers(1, 1 << 17), st.integers(1, 1 << 40))
def test_what_is_proved_is_bounded(k: int, n: int) -> None:
    """A header may name any matrix: its trial ends. The end of the rows that fills no tile is the matrix's own."""
    rows_k, rows = proved_shape(k, n)
    assert rows_k == k and 1 <= rows <= min(n, PROVED_ROWS + 63)
    assert k * rows <= max(PROVED_VALUES, k * 64) + k * 63
    assert rows % 64 == n % 64 or rows == n


@pytest.mark.parametrize("fault", faults.TRIAL_FAULTS)
def test_faults_are_named_by_way(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setenv(faults.TRIAL_VARIABLE, f"sgemm={fault},amx=crash")
    assert faults.trial_fault("sgemm") == fault and faults.trial_fault("amx") == "crash"
    assert faults.trial_fault("plain") == ""
    monkeypatch.delenv(faults.TRIAL_VARIABLE)
    assert faults.trial_fault("sgemm") == ""


def test_a_fault_that_is_none_is_a_mistake_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.TRIAL_VARIABLE, "sgemm=explode")
    with pytest.raises(AssertionError, match="explode"):
        faults.trial_fault("sgemm")
