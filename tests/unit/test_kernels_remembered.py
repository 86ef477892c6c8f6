"""What is remembered of trials: for which machine and build it holds, and what becomes of a file that is none."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import filelock
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_support import Q4_0, Q4_K, Q8_0, Trials, right, tried, weights, wrong

from mullama import faults
from mullama.machine import processor, remembered
from mullama.machine.remembered import (
    BUSY_S,
    MAX_SHAPES,
    MAX_VALUES,
    WORTH_TIMING,
    OfType,
    Remembered,
    Weights,
    timed_shape,
)
from mullama.machine.trials import WAYS
from mullama.machine.way_choice import choose

assert tried is not None  # a fixture

pytestmark = pytest.mark.usefixtures("tried")


def find(root: Path, *of: Weights) -> dict[int, OfType]:
    by_type: dict[int, list[Weights]] = {}
    for each in of or (weights(),):
        by_type.setdefault(each.type, []).append(each)
    return Remembered(root).find(by_type, 2)


def kinds(tried: Trials) -> list[int]:
    return [task.type for task in tried.tasks]


# -- once for a machine and a build


def test_it_is_tried_once(tmp_path: Path, tried: Trials) -> None:
    first = find(tmp_path)
    assert find(tmp_path) == first and kinds(tried) == [Q8_0]
    assert set(first[Q8_0].ways) == set(WAYS) and first[Q8_0].ways["tiles"].times.keys() == {"2048x2048"}


def test_a_new_type_alone_is_tried(tmp_path: Path, tried: Trials) -> None:
    find(tmp_path)
    both = find(tmp_path, weights(), weights(Q4_K))
    assert kinds(tried) == [Q8_0, Q4_K] and set(both) == {Q8_0, Q4_K}
    assert find(tmp_path, weights(Q4_K)).keys() == {Q4_K} and len(tried.tasks) == 2


def test_ways_are_proved_before_the_plain_one_is_needed_no_more(tmp_path: Path, tried: Trials) -> None:
    """The plain way first: it is what others are compared with, and what is left when all others die."""
    find(tmp_path)
    assert tried.tasks[0].ways[0] == "plain" and set(tried.tasks[0].ways) == set(WAYS)


CPU = processor.parse_cpuinfo(
    "model name: A\nvendor_id: B\ncpu family: 6\nmodel: 7\nstepping: 8\nflags: avx fma", "x86_64"
)


def key_of(monkeypatch: pytest.MonkeyPatch, build: str = "a build", fault: str = "", **changed: Any) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "processor", lambda: dataclasses.replace(CPU, **changed))
        patch.setattr(remembered, "_build", lambda: build)
        patch.setenv(faults.TRIAL_VARIABLE, fault)
        return Remembered(Path("/x")).path.name


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "C"},
        {"architecture": "aarch64"},
        {"family": 7},
        {"model": 8},
        {"stepping": None},
        {"flags": frozenset(("avx",))},
        {"flags": frozenset(("avx", "fma", "amx_tile"))},
        {"build": "another build"},
        {"fault": "tiles=crash"},
    ],
    ids=lambda changed: "-".join(
        f"{name}-{sorted(v) if isinstance(v, frozenset) else v}" for name, v in changed.items()
    ),
)
def test_it_holds_for_this_processor_and_this_build(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> None:
    assert key_of(monkeypatch) == key_of(monkeypatch), "the same machine has the same name at every start"
    assert key_of(monkeypatch, **changed) != key_of(monkeypatch)


def test_the_order_of_flags_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of(monkeypatch, flags=frozenset(("fma", "avx"))) == key_of(monkeypatch)


def test_another_machine_s_verdicts_are_not_believed(
    tmp_path: Path, tried: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    find(tmp_path)
    monkeypatch.setattr(remembered, "_build", lambda: "another build")
    find(tmp_path)
    assert len(tried.tasks) == 2
    monkeypatch.setattr(remembered, "_build", lambda: "a build")
    find(tmp_path)
    assert len(tried.tasks) == 2, "and both are kept: a home may serve several machines"


def test_a_build_is_told_by_what_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fixture's
    libraries = tmp_path / "lib"
    libraries.mkdir()
    (tmp_path / "_core").mkdir()
    spec = ModuleSpec("mullama._core", None)
    spec.submodule_search_locations = [str(tmp_path / "_core")]
    monkeypatch.setattr(remembered, "find_spec", lambda name: spec)
    seen = set()
    for name, content in (("libggml-cpu.so", "1"), ("libggml-cpu.so", "2"), ("libggml-cpu-haswell.so", "2")):
        (libraries / name).write_text(content)
        seen.add(remembered._build.__wrapped__())
    assert len(seen) == 3
    (libraries / "libllama.so").write_text("not this one")
    assert remembered._build.__wrapped__() in seen


# -- the file


def good_file(root: Path) -> dict[str, Any]:
    find(root, weights(), weights(Q4_K))
    content: dict[str, Any] = json.loads(Remembered(root).path.read_text())
    return content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"types": []}',
        b'{"types": {"8": {}}}',
        b'{"types": {"x": {"name": "Q8_0", "ways": {}, "busy_at": 0}}}',
        b'{"types": {"8": {"name": "Q8_0", "ways": {"plain": 7}, "busy_at": 0}}}',
        b'{"types": {"8": {"name": "Q8_0", "ways": [], "busy_at": 1e999}}}',
        b"[" * 200_000,
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_damaged_file_is_as_none(tmp_path: Path, tried: Trials, content: bytes) -> None:
    file = Remembered(tmp_path)
    file.folder.mkdir()
    file.path.write_bytes(content)
    assert file.read() == {}
    assert set(find(tmp_path)[Q8_0].ways) == set(WAYS) and len(tried.tasks) == 1
    assert find(tmp_path) and len(tried.tasks) == 1, "it was written anew"


def test_an_older_file_lacks_a_way(tmp_path: Path, tried: Trials) -> None:
    content = good_file(tmp_path)
    del content["types"][str(Q8_0)]["ways"]["amx"]
    Remembered(tmp_path).path.write_text(json.dumps(content))
    tried.tasks.clear()
    find(tmp_path, weights(), weights(Q4_K))
    assert kinds(tried) == [Q8_0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(("1", "8", "way")), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in value if isinstance(value, dict) else ():
        yield from places(value[key], (*path, key))


@settings(
    max_examples=150, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.data())
def test_whatever_the_file_says_there_is_a_choice(tmp_path: Path, data: st.DataObject) -> None:
    """Anything in any place of it: what is read can be chosen among, and nothing is taken that it calls wrong."""
    Remembered(tmp_path).path.unlink(missing_ok=True)
    content = good_file(tmp_path)
    *way, last = data.draw(st.sampled_from([place for place in places(content) if place]))
    inner = content
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(JSON)
    Remembered(tmp_path).path.write_text(json.dumps(content))
    for of in find(tmp_path, weights(), weights(Q4_K)).values():
        chosen = choose(of.found, "2048x2048")
        assert set(chosen.by_columns) <= {each.way for each in of.found if each.may_be_used} | {"plain"}


def test_a_folder_that_cannot_be_written_costs_a_trial_at_each_start(
    tmp_path: Path, tried: Trials, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    for _ in range(2):  # the probe of a new model, and its load
        assert find(file)[Q8_0].ways["plain"].may_be_used and kinds(tried) == [Q8_0]
    find(file, weights(Q4_K), weights())
    assert kinds(tried) == [Q8_0, Q4_K] and caplog.text.count("is not kept") == 1
    remembered._unkept.clear()  # the next start
    find(file)
    assert kinds(tried) == [Q8_0, Q4_K, Q8_0]


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, tried: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        self.write_bytes(text.encode()[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert find(tmp_path)[Q8_0].ways["plain"].may_be_used
    assert [path.suffix for path in Remembered(tmp_path).folder.iterdir()] in ([], [".lock"])
    find(tmp_path, weights(), weights(Q4_K))
    assert kinds(tried) == [Q8_0, Q4_K]
    remembered._unkept.clear()
    assert Remembered(tmp_path).read().keys() == {Q8_0, Q4_K}, "as soon as there is room, all of it is written"


# -- what is asked again


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1e9]
    monkeypatch.setattr(remembered.time, "time", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def test_a_busy_machine_is_asked_again_later(tmp_path: Path, tried: Trials, clock: Callable[[float], None]) -> None:
    tried.busy = {Q8_0}
    first = find(tmp_path, weights(), weights(Q4_K))
    assert not first[Q8_0].ways["tiles"].times and first[Q4_K].ways["tiles"].times
    clock(BUSY_S - 1)
    find(tmp_path, weights(), weights(Q4_K))
    assert kinds(tried) == [Q8_0, Q4_K], "not at every load"
    clock(2)
    tried.busy = set()
    assert find(tmp_path, weights(), weights(Q4_K))[Q8_0].ways["tiles"].times
    assert kinds(tried) == [Q8_0, Q4_K, Q8_0], "and only that type"


def test_a_clock_that_was_set_back_ends_the_wait(tmp_path: Path, tried: Trials, clock: Callable[[float], None]) -> None:
    tried.busy = {Q8_0}
    find(tmp_path)
    clock(-3600)
    find(tmp_path)
    assert len(tried.tasks) == 2


def test_a_busy_machine_forgets_no_times(tmp_path: Path, tried: Trials) -> None:
    find(tmp_path)
    tried.busy = {Q8_0}
    ways = find(tmp_path, weights(k=4096))[Q8_0].ways
    assert ways["tiles"].times.keys() == {"2048x2048"}


def test_what_the_moment_may_have_caused_is_tried_again(
    tmp_path: Path, tried: Trials, clock: Callable[[float], None]
) -> None:
    tried.found = lambda task, way: wrong("tiles", "was killed", is_lasting=False) if way == "tiles" else None
    assert not find(tmp_path)[Q8_0].ways["tiles"].may_be_used
    clock(BUSY_S - 1)
    find(tmp_path)
    assert len(tried.tasks) == 1
    clock(2)
    tried.found = lambda task, way: None
    assert find(tmp_path)[Q8_0].ways["tiles"].may_be_used and len(tried.tasks) == 2


def test_what_is_wrong_stays_wrong(tmp_path: Path, tried: Trials, clock: Callable[[float], None]) -> None:
    tried.found = lambda task, way: wrong("tiles") if way == "tiles" else None
    find(tmp_path)
    clock(1e7)
    assert find(tmp_path)[Q8_0].ways["tiles"].fault and len(tried.tasks) == 1


def test_a_type_that_nothing_is_right_for_is_not_tried_at_every_load(tmp_path: Path, tried: Trials) -> None:
    tried.found = lambda task, way: wrong(way)
    for _ in range(3):
        find(tmp_path)
    assert len(tried.tasks) == 1


# -- shapes


def test_times_of_shapes_are_gathered(tmp_path: Path, tried: Trials) -> None:
    find(tmp_path)
    ways = find(tmp_path, weights(k=4096))[Q8_0].ways
    assert ways["tiles"].times.keys() == {"2048x2048", "4096x1024"} and len(tried.tasks) == 2
    find(tmp_path)
    find(tmp_path, weights(k=4096))
    assert len(tried.tasks) == 2


def test_a_second_trial_may_take_praise_away(tmp_path: Path, tried: Trials) -> None:
    """Exact on one shape and not on another is not exact; wrong on one is wrong."""
    find(tmp_path)
    tried.found = lambda task, way: (
        right("tiles", is_exact=False, error=2e-7) if way == "tiles" else wrong("plain") if way == "plain" else None
    )
    ways = find(tmp_path, weights(k=4096))[Q8_0].ways
    assert (ways["tiles"].is_exact, ways["tiles"].is_steady, ways["tiles"].error) == (False, True, 2e-7)
    assert ways["tiles"].times and not ways["plain"].may_be_used


def test_the_shape_that_holds_most_of_the_weights_is_timed() -> None:
    assert timed_shape([weights(n=256, count=20), weights(k=4096, count=1)]) == "2048x256"
    assert timed_shape([weights(n=256, count=10), weights(k=4096, count=1)]) == "4096x1024"


def test_few_weights_are_not_timed(tmp_path: Path, tried: Trials) -> None:
    few = weights(k=64, n=64)
    assert few.bytes < WORTH_TIMING and timed_shape([few]) == "" and timed_shape([few] * 1000) != ""
    find(tmp_path, few)
    assert tried.tasks[0].shapes == () and find(tmp_path, few) and len(tried.tasks) == 1
    find(tmp_path)
    assert len(tried.tasks) == 2, "as soon as it is worth it, they are"


def test_as_many_shapes_as_that_are_proved(tmp_path: Path, tried: Trials) -> None:
    find(tmp_path, *(weights(n=64 * n) for n in range(1, 41)), weights(n=64 * 40))
    (task,) = tried.tasks
    assert (
        len(task.shapes) <= MAX_SHAPES and task.shapes[0] == (2048, 2048) and len(set(task.shapes)) == len(task.shapes)
    )


@pytest.mark.parametrize(("k", "n"), [(64, 1 << 40), (1 << 17, 1 << 40), (1 << 17, 1), (64, 64), (8960, 151_936)])
def test_a_matrix_that_is_timed_is_bounded(k: int, n: int) -> None:
    of_k, rows = weights(k=k, n=n).cut
    assert of_k == k and 1 <= rows <= n and k * rows <= max(MAX_VALUES, 64 * k)


# -- several processes

PROCESS = """
import os, sys, time
from pathlib import Path
from mullama.machine import remembered, trials
from mullama.machine.trials import WAYS, Found
root, name = Path(sys.argv[1]), sys.argv[2]
remembered._build = lambda: "a build"
def run(tasks, threads, **options):
    with (root / "tried").open("a") as file: file.write(name)
    (root / f"{name} tries").touch()
    while not (root / "go on").exists(): time.sleep(0.01)
    return [Found(task.type, way) for task in tasks for way in task.ways], set()
trials.run = run
(root / f"{name} starts").touch()
weights = [remembered.Weights(8, "Q8_0", 32, 34, 64, 64)]
print(len(remembered.Remembered(root).find({8: weights}, 2)[8].ways))
"""


def start(root: Path, name: str, until: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-P", "-c", PROCESS, str(root), name], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (root / f"{name} {until}").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    return process


def test_one_process_tries_and_the_others_wait(tmp_path: Path) -> None:
    first = start(tmp_path, "a", "tries")
    second = start(tmp_path, "b", "starts")
    (tmp_path / "go on").touch()
    assert [process.communicate(timeout=60)[0] for process in (first, second)] == [b"%d\n" % len(WAYS)] * 2
    assert (tmp_path / "tried").read_text() == "a"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_process_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    first = start(tmp_path, "a", "tries")
    first.kill()
    first.communicate(timeout=60)
    (tmp_path / "go on").touch()
    second = start(tmp_path, "b", "tries")
    assert second.communicate(timeout=60)[0] == b"%d\n" % len(WAYS)


def test_who_waits_too_long_tries_by_itself(tmp_path: Path, tried: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "LOCK_S", 0.05)
    file = Remembered(tmp_path)
    file.folder.mkdir()
    with filelock.FileLock(file.path.with_suffix(".lock")):
        assert find(tmp_path)[Q8_0].ways["plain"].may_be_used and len(tried.tasks) == 1


def test_what_another_process_found_meanwhile_is_kept(tmp_path: Path, tried: Trials) -> None:
    """It wrote of another type, between this one's look and its lock."""
    one, other = Remembered(tmp_path), Remembered(tmp_path)
    read = one.read
    looks = iter([{}])
    one.read = lambda: next(looks, None) or read()  # type: ignore[method-assign]
    other.find({Q4_0: [weights(Q4_0)]}, 2)
    one.find({Q8_0: [weights()]}, 2)
    assert Remembered(tmp_path).read().keys() == {Q4_0, Q8_0}


def test_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    find(tmp_path)
    assert {path.suffix for path in Remembered(tmp_path).folder.iterdir()} <= {".json", ".lock"}
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]
