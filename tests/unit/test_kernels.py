"""The ways of computing that a process uses: put in charge, kept while a model uses them, named, told to children."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from kernel_support import Q4_0, Q4_K, Q8_0, Trials, right, tried, weights, wrong

from mullama.errors import ModelLoadError
from mullama.machine import kernels, remembered, trials, ways
from mullama.machine.remembered import Weights
from mullama.machine.trials import ATTENTION, TIMED, WAYS, Found, Task
from mullama.machine.way_choice import Choice

assert tried is not None  # a fixture


@pytest.fixture(autouse=True)
def placed(monkeypatch: pytest.MonkeyPatch, tried: Trials) -> list[Choice]:
    """What was put into llama.cpp's tables, of a process that computes nothing yet."""
    seen: list[Choice] = []
    monkeypatch.setattr(kernels, "_put_in_charge", lambda choice: choice.type == ATTENTION or seen.append(choice))
    monkeypatch.setattr(kernels, "_in_charge", {})
    monkeypatch.setattr(kernels, "_named", "auto")
    return seen


def prepare(root: Path, *of: Weights, in_use: Sequence[int] = (), **options: Any) -> None:
    kernels.prepare(of or (weights(),), root=root, in_use=lambda: in_use, **options)


def way(kind: int = Q8_0, m: int = 1) -> str:
    return kernels.in_charge()[kind].choice.way_for(m)


def with_sgemm(task: Task, name: str) -> Found | None:
    """Three ways are right; sgemm is the fastest."""
    shape = {"{}x{}".format(*shape): dict.fromkeys(TIMED, 0.5e-3) for shape in task.shapes[:1]}
    return Found(task.type, name, is_exact=True, is_steady=True, times=shape) if name == "sgemm" else None


def test_the_fastest_is_put_in_charge(tmp_path: Path, placed: list[Choice], tried: Trials) -> None:
    prepare(tmp_path)
    assert way() == "tiles" and [choice.type for choice in placed] == [Q8_0]
    tried.found = with_sgemm
    prepare(tmp_path, weights(Q4_K))
    assert way(Q4_K) == "sgemm" and way() == "tiles"


def test_a_model_of_no_matrices_changes_nothing(tmp_path: Path, placed: list[Choice], tried: Trials) -> None:
    kernels.prepare([], root=tmp_path)
    assert placed == [] and kernels.in_charge().keys() == {ATTENTION} and tried.tasks == []


def test_what_computes_a_loaded_model_stays(tmp_path: Path, placed: list[Choice], tried: Trials) -> None:
    """A graph may be under way: two threads of one product must not go two ways. And answers stay what they were."""
    small = weights(k=64, n=64, count=1)
    prepare(tmp_path, small)
    assert kernels.in_charge()[Q8_0].shape == ""
    n_placed = len(placed)
    tried.found = with_sgemm
    prepare(tmp_path, in_use=(Q8_0,))
    assert len(placed) == n_placed and way() == "tiles"
    prepare(tmp_path, weights(), weights(Q4_K), in_use=(Q8_0,))
    assert way() == "tiles" and way(Q4_K) == "sgemm", "a type that is new is decided all the same"
    prepare(tmp_path)  # the first one was closed
    assert way() == "sgemm" and kernels.in_charge()[Q8_0].shape == "2048x2048"


def test_times_of_a_model_before_are_better_than_none(tmp_path: Path, placed: list[Choice]) -> None:
    prepare(tmp_path)
    prepare(tmp_path, weights(k=64, n=64, count=1))
    assert kernels.in_charge()[Q8_0].shape == "2048x2048" and len(placed) == 1


def test_the_next_model_s_own_shape_decides_for_it(tmp_path: Path) -> None:
    prepare(tmp_path)
    prepare(tmp_path, weights(k=4096))
    assert kernels.in_charge()[Q8_0].shape == "4096x1024"


def test_what_is_in_use_is_asked_after_the_trials(tmp_path: Path, tried: Trials) -> None:
    """They take seconds, in which another model may have been loaded."""
    seen: list[int] = []

    def in_use() -> tuple[int, ...]:
        seen.append(len(tried.tasks))
        return ()

    kernels.prepare([weights()], root=tmp_path, in_use=in_use)
    assert seen == [1]


# -- named by the user


def test_a_named_way(tmp_path: Path, tried: Trials, caplog: pytest.LogCaptureFixture) -> None:
    tried.found = with_sgemm
    for named in ("plain", "tiles", "sgemm", "auto"):
        prepare(tmp_path, named=named)
        assert way() == ("sgemm" if named == "auto" else named)
    assert caplog.text.count("there is no such way") == 0 and len(tried.tasks) == 1


def test_a_named_way_that_fails_its_trial_is_refused(tmp_path: Path, placed: list[Choice], tried: Trials) -> None:
    """For any of the model's types, and before anything is put in charge."""
    tried.found = lambda task, name: wrong(name, kind=task.type) if (task.type, name) == (Q4_K, "tiles") else None
    with pytest.raises(
        ModelLoadError, match=r"kernels tiles cannot be used for Q4_K .*crashed \(SIGSEGV\).*auto"
    ) as info:
        prepare(tmp_path, weights(), weights(Q4_K), named="tiles")
    assert info.value.param == "kernels" and placed == [] and kernels.in_charge() == {}
    prepare(tmp_path, weights(), weights(Q4_K))
    assert way() == "tiles" and way(Q4_K) == "plain"
    prepare(tmp_path, weights(), named="tiles")
    assert way() == "tiles"


def test_a_named_way_that_this_machine_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare(tmp_path, weights(), weights(Q4_K), named="amx")
    assert way() == "plain" and way(Q4_K) == "plain"
    (record,) = [record for record in caplog.records if "no such way" in record.message]
    assert "amx" in record.message and "Q8_0, Q4_K" in record.message and "plain" in record.message


def test_two_names_beside_each_other_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path, named="plain")
    with pytest.raises(ModelLoadError, match=r"kernels tiles .* beside .* kernels plain.*Q8_0") as info:
        prepare(tmp_path, named="tiles", in_use=(Q8_0,))
    assert info.value.param == "kernels" and way() == "plain"
    prepare(tmp_path, weights(Q4_K), named="tiles", in_use=(Q8_0,))
    assert way(Q4_K) == "tiles" and way() == "plain", "types do not stand in each other's way"
    prepare(tmp_path, named="tiles")
    assert way() == "tiles"


# -- beside what runs


def test_readers_do_not_wait_for_trials(tmp_path: Path, tried: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server answers what computes while it tries for another model."""
    prepare(tmp_path)
    trying, go_on = threading.Event(), threading.Event()

    def run(*args: Any, **options: Any) -> Any:
        trying.set()
        assert go_on.wait(60)
        return tried.run(*args, **options)

    monkeypatch.setattr(trials, "run", run)
    loader = threading.Thread(target=prepare, args=(tmp_path, weights(Q4_K)))
    loader.start()
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.extend((kernels.in_charge(), ways.ways_report(tmp_path))))
    try:
        assert trying.wait(60)
        reader.start()
        reader.join(60)
        assert not reader.is_alive(), "it waits for the trial"
    finally:
        go_on.set()
        loader.join(60)
    assert seen[0].keys() == {ATTENTION, Q8_0} and kernels.in_charge().keys() == {ATTENTION, Q8_0, Q4_K}


def test_trials_beside_a_model_give_way_to_it(tmp_path: Path, tried: Trials) -> None:
    prepare(tmp_path)
    prepare(tmp_path, weights(Q4_K))
    kernels.for_child([weights(Q4_0)], root=tmp_path)
    assert tried.niceness == [0, kernels.NICE_BESIDE, kernels.NICE_BESIDE]


def test_a_child_computes_as_its_parent_found_right(
    tmp_path: Path, placed: list[Choice], tried: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried.found = lambda task, name: wrong(name, kind=task.type) if name == "tiles" else None
    variables = kernels.for_child([weights(), weights(Q4_K)], root=tmp_path)
    assert placed == [] and kernels.in_charge() == {}, "the parent itself computes nothing yet"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    kernels.adopt()
    assert [choice.type for choice in placed] == [Q8_0, Q4_K]
    assert all(set(choice.by_columns) == {"plain"} and not choice.layouts for choice in placed)


def test_a_child_of_nobody_adopts_nothing(placed: list[Choice], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MULLAMA_ADOPT_KERNELS", raising=False)
    kernels.adopt()
    assert placed == []


# -- what is told


def test_the_report_of_a_machine_that_tried_nothing(tmp_path: Path) -> None:
    assert ways.ways_report(tmp_path) == []


def test_the_report(tmp_path: Path, tried: Trials) -> None:
    tried.found = lambda task, name: (
        wrong(name, "hung: stopped after 60 s", kind=task.type) if name == "sgemm" else None
    )
    remembered.Remembered(tmp_path).find({Q4_K: [weights(Q4_K)]}, 2)
    prepare(tmp_path)
    attention, first, second = ways.ways_report(tmp_path)
    assert attention["type"] == "attention" and attention["chosen"] == {"1": "attention"}
    assert (first["type"], first["in_charge"]) == ("Q8_0", True)
    assert (second["type"], second["in_charge"]) == ("Q4_K", False)
    for of in (first, second):
        assert of["shape"] == "2048x2048" and of["chosen"] == {"1": "tiles"}
        by = {each["way"]: each for each in of["ways"]}
        assert by.keys() == {"plain", "sgemm", "tiles"}, "what is not there is not told"
        assert [by[name]["verdict"] for name in by] == [
            "hung: stopped after 60 s" if name == "sgemm" else "right" for name in by
        ]
        assert by["tiles"]["times_us"] == {str(m): 1000.0 for m in TIMED} and by["sgemm"]["times_us"] == {}
        assert by["plain"]["exact"] is True and by["plain"]["steady"] is True and by["plain"]["error"] == 0.0
    assert json.loads(json.dumps([first, second])) == [first, second]


def test_the_report_of_a_busy_machine(tmp_path: Path, tried: Trials) -> None:
    tried.busy = {Q8_0}
    prepare(tmp_path)
    of = ways.ways_report(tmp_path)[-1]
    assert of["chosen"] == {"1": "tiles"} and all(each["times_us"] == {} for each in of["ways"])


def test_how_the_matrices_of_a_model_are_computed(tmp_path: Path, tried: Trials) -> None:
    def found(task: Task, name: str) -> Found | None:
        if task.type != Q4_K or name not in ("plain", "tiled"):
            return None
        by = {m: 1e-3 * m for m in TIMED} if name == "plain" else dict.fromkeys(TIMED, 6e-3)
        return right(name, kind=Q4_K, times={"2048x2048": by})

    tried.found = found
    prepare(tmp_path, weights(), weights(Q4_K))
    loaded = {("F32", "CPU"): 64, ("Q4_K", "CPU"): 100, ("Q8_0", "CPU"): 40, ("Q8_0", "CPU_Mapped"): 2}
    of = ways.ways_of(loaded)
    assert of == {
        "Q4_K": {"columns": {"1": "tiles"}, "bytes": {"CPU": 100}},
        "Q8_0": {"columns": {"1": "tiles"}, "bytes": {"CPU": 40, "CPU_Mapped": 2}},
    }
    assert ways.words_of(of) == {"Q4_K": "tiles", "Q8_0": "tiles"}
    reference = ways.ways_of(loaded, reference=True)
    assert reference["Q4_K"] == {"columns": {"1": "plain"}, "bytes": {"CPU": 100}} and "F32" in reference


def test_ways_by_the_number_of_columns_in_words() -> None:
    of = {"Q4_K": {"columns": {"1": "plain", "4": "tiles", "32": "tiled"}, "bytes": {}}}
    assert ways.words_of(of) == {"Q4_K": "plain, from 4 columns on tiles, from 32 columns on tiled"}


def test_every_way_can_be_named() -> None:
    from mullama.config import KERNELS

    assert set(KERNELS) == {"auto", *WAYS}
