"""The governor on simulated machines: no clock, no threads, no luck."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama._core import Governor
from mullama._core.testing.gate import busy_ticks

MS = 1_000_000
LOOK = 100 * MS

Cost = Callable[[int, int], float]  # (tokens, threads) -> ms


def quiet(n_tokens: int, threads: int) -> float:
    """Two threads are somewhat faster than one."""
    return (4 + 4 * n_tokens) / (1.0 if threads == 1 else 1.6)


def beside_a_busy_loop(n_tokens: int, threads: int) -> float:
    return quiet(n_tokens, 1) * (1.0 if threads == 1 else 2.0)


def beside_another_engine(n_tokens: int, threads: int) -> float:
    """Every barrier waits for a scheduler slice."""
    return quiet(n_tokens, 1) * (1.05 if threads == 1 else 100.0)


@dataclass
class Machine:
    """A clock, a neighbour, and the loop around the governor as the core has it."""

    governor: Governor
    cost: Cost = quiet
    neighbours: float = 0.0
    now: float = 1000.0 * MS
    next_look: float = 0.0
    used: list[int] = field(default_factory=list)  # threads of each finished decode
    wasted: float = 0.0  # ns in decodes that were given up

    def warm_up(self) -> None:
        """One token at each end of the thread range, as a Core does it at the start."""
        for threads in (1, self.governor.n_max):
            for _ in range(2):
                ns = int(self.cost(1, threads) * MS)
                self.now += ns
                self.governor.record(1, threads, ns, int(self.now))

    def decode(self, n_tokens: int = 1) -> float:
        """One decode that has to succeed; returns the ns it took, given-up attempts included."""
        start = self.now
        retry = False
        while True:
            threads = 1 if retry else self.governor.threads_for()
            assert 1 <= threads <= self.governor.n_max
            allowance = 0 if retry else self.governor.allowance(n_tokens)
            ns = int(self.cost(n_tokens, threads) * MS)
            if allowance and ns > allowance:
                self.now += allowance
                self.wasted += allowance
                self.governor.record(n_tokens, threads, allowance, int(self.now), aborted=True)
                retry = True
                continue
            self.now += ns
            self.governor.record(n_tokens, threads, ns, int(self.now))
            self.used.append(threads)
            break
        if self.now >= self.next_look:
            self.next_look = self.now + LOOK
            self.governor.look(self.neighbours, int(self.now))
        return self.now - start

    def run(self, seconds: float, n_tokens: int = 1) -> list[int]:
        """Decode for so long; the thread counts used."""
        first, end = len(self.used), self.now + seconds * 1e9
        while self.now < end:
            self.decode(n_tokens)
        return self.used[first:]


@pytest.fixture
def machine() -> Machine:
    machine = Machine(Governor(2))
    machine.warm_up()
    return machine


def share(used: list[int], threads: int) -> float:
    return used.count(threads) / len(used)


def test_a_quiet_machine_uses_all_threads(machine: Machine) -> None:
    assert share(machine.run(10), 2) > 0.98
    assert machine.governor.changes == 0
    assert machine.wasted == 0


def test_a_machine_where_more_threads_are_slower_uses_one(machine: Machine) -> None:
    """Not a neighbour, just a bad machine: nobody's load says so, only the times do."""
    machine.cost = beside_a_busy_loop
    used = machine.run(10)
    assert share(used[len(used) // 2 :], 1) > 0.9


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_beside_a_busy_loop(machine: Machine, n_tokens: int) -> None:
    machine.run(2, n_tokens)
    machine.cost, machine.neighbours = beside_a_busy_loop, 1.0
    machine.run(1, n_tokens)
    used = machine.run(10, n_tokens)
    assert share(used, 1) > 0.95
    # And comes back when the loop ends.
    machine.cost, machine.neighbours = quiet, 0.0
    machine.run(2, n_tokens)
    assert share(machine.run(5, n_tokens), 2) > 0.98


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_beside_another_engine(machine: Machine, n_tokens: int) -> None:
    """One decode a hundred times too long is one too many: it is given up, and the next ones use one thread."""
    machine.run(2, n_tokens)
    machine.cost, machine.neighbours = beside_another_engine, 2.0
    took = sum(machine.decode(n_tokens) for _ in range(10))
    assert took < 25 * quiet(n_tokens, 1) * MS + 100 * MS
    assert set(machine.used[-8:]) == {1}
    wasted = machine.wasted
    start = machine.now
    used = machine.run(20, n_tokens)
    assert share(used, 1) == 1.0, "nothing on two threads ever finishes"
    assert (machine.wasted - wasted) / (machine.now - start) < 0.1, "trying again costs little"
    machine.cost, machine.neighbours = quiet, 0.0
    machine.run(2, n_tokens)
    assert share(machine.run(5, n_tokens), 2) > 0.98


def test_when_nobody_tells_the_load_the_times_alone_do(machine: Machine) -> None:
    """Systems without /proc/stat."""
    machine.neighbours = -1.0
    assert share(machine.run(5), 2) > 0.95
    machine.cost = beside_another_engine
    start, wasted = machine.now, machine.wasted
    used = machine.run(10)
    assert share(used, 1) > 0.95
    assert (machine.wasted - wasted) / (machine.now - start) < 0.25
    machine.cost = quiet
    machine.run(2)
    assert share(machine.run(5), 2) > 0.95


@pytest.mark.parametrize("load", [0.1, 0.3, 0.45])
def test_a_client_on_the_same_machine_makes_nothing_flap(machine: Machine, load: float) -> None:
    machine.neighbours = load
    used = machine.run(20)
    assert share(used, 2) > 0.98
    assert machine.governor.changes <= 1


def test_load_that_comes_and_goes_does_not_make_it_slower_than_one_thread(machine: Machine) -> None:
    one_thread = 0.0
    for round_number in range(40):
        busy = round_number % 2 == 1
        machine.cost = beside_a_busy_loop if busy else quiet
        machine.neighbours = 1.0 if busy else 0.0
        start, n = machine.now, len(machine.used)
        machine.run(0.3)
        one_thread += (len(machine.used) - n) * quiet(1, 1) * MS
        assert machine.now > start
    elapsed = machine.now - 1000 * MS
    assert elapsed < 1.2 * one_thread


def test_a_growing_context_is_no_neighbour(machine: Machine) -> None:
    """Each decode is a little slower than the last, on any number of threads: the count stays."""
    for step in range(5000):
        machine.cost = lambda n, t, step=step: quiet(n, t) * (1 + step / 500)
        machine.decode()
    assert share(machine.used[-1000:], 2) > 0.95


def test_a_sudden_longer_context_is_no_neighbour(machine: Machine) -> None:
    machine.run(2)
    machine.cost = lambda n, t: 3.5 * quiet(n, t)
    machine.run(3)
    assert share(machine.run(5), 2) > 0.95


@pytest.mark.parametrize("n_tokens", [16, 64, 512])
def test_prompts_have_their_own_costs(machine: Machine, n_tokens: int) -> None:
    for _ in range(50):
        machine.decode(n_tokens)
        for _ in range(10):
            machine.decode(1)
    assert share(machine.used[-200:], 2) > 0.95
    assert machine.wasted == 0


def test_fixed_never_changes() -> None:
    for n in (1, 2, 4):
        machine = Machine(Governor(n, True), beside_another_engine, neighbours=4.0)
        machine.warm_up()
        for _ in range(300):
            machine.decode()
        assert set(machine.used) == {n}
        assert machine.governor.fixed and machine.governor.changes == 0


def test_one_core_has_no_choice() -> None:
    governor = Governor(1)
    assert governor.fixed
    assert governor.threads_for() == 1 and governor.allowance(1) == 0


@pytest.mark.parametrize(("asked", "got"), [(0, 1), (-5, 1), (1, 1), (64, 64), (65, 64), (512, 64)])
def test_the_range_of_threads(asked: int, got: int) -> None:
    assert Governor(asked).n_max == got


def test_many_cores_beside_one_busy_loop_give_up_one() -> None:
    def cost(n_tokens: int, threads: int) -> float:
        crowded = threads > 7
        return 20.0 / threads * (10 if crowded else 1)

    machine = Machine(Governor(8), lambda n, t: 20.0 / t)
    machine.warm_up()
    machine.run(2)
    machine.cost, machine.neighbours = cost, 1.0
    machine.run(3)
    used = machine.run(5)
    assert sum(used) / len(used) > 4, "most of the machine is still used"
    assert share(used, 8) < 0.05


def test_a_bad_report_is_refused() -> None:
    governor = Governor(2)
    for n_tokens, threads in ((1, 0), (1, 3), (0, 1), (-1, 1)):
        with pytest.raises(ValueError, match="threads must be"):
            governor.record(n_tokens, threads, 1000, 1000)


def test_the_snapshot_says_what_it_knows(machine: Machine) -> None:
    machine.neighbours = 0.25
    machine.run(1)
    for _ in range(3):
        machine.decode(100)
    snapshot = machine.governor.snapshot()
    assert snapshot["threads"] == snapshot["threads_max"] == 2
    assert snapshot["neighbour_cores"] == 0.25
    assert snapshot["fixed"] is False and snapshot["on_trial"] is False
    assert snapshot["cost_ns"][2]["1"] == pytest.approx(quiet(1, 2) * MS, rel=0.01)
    assert snapshot["cost_ns"][2]["<=128"] == pytest.approx(quiet(100, 2) * MS / 100, rel=0.05)
    assert Governor(2).snapshot()["neighbour_cores"] is None


events = st.lists(
    st.one_of(
        st.tuples(st.just("decode"), st.integers(1, 600), st.integers(0, 10_000 * MS), st.booleans()),
        st.tuples(st.just("look"), st.just(0), st.floats(-1, 70), st.just(False)),
    ),
    max_size=120,
)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.booleans(), events)
def test_whatever_happens_the_choice_is_in_range(
    n_max: int, fixed: bool, history: list[tuple[str, int, float, bool]]
) -> None:
    governor = Governor(n_max, fixed)
    now = 0
    for kind, n_tokens, value, aborted in history:
        now += 50 * MS
        threads = governor.threads_for()
        assert 1 <= threads <= n_max
        assert fixed is False or threads == n_max
        assert governor.allowance(max(n_tokens, 1)) >= 0
        if kind == "look":
            governor.look(value, now)
        else:
            may_abort = governor.allowance(n_tokens) > 0
            governor.record(n_tokens, threads, int(value), now, aborted=aborted and may_abort)
    snapshot = governor.snapshot()
    assert 1 <= snapshot["threads"] <= n_max


# -- whose cores, and whose neighbours


def test_neighbours_have_room_where_there_are_more_cores_than_threads() -> None:
    """Two threads of four cores, by --threads or by a quota: a neighbour on a third core takes nothing away."""
    machine = Machine(Governor(2, n_cores=4), neighbours=2.0)
    machine.warm_up()
    assert share(machine.run(5), 2) == 1.0
    assert machine.governor.changes == 0
    machine.neighbours, machine.cost = 3.0, beside_a_busy_loop
    machine.run(1)
    assert share(machine.run(5), 1) > 0.95


def test_cores_that_are_taken_away_count() -> None:
    """The affinity of a process can change while it runs."""
    machine = Machine(Governor(4, n_cores=4), lambda n, t: 20.0 / min(t, machine.governor.n_cores) + t)
    machine.warm_up()
    machine.run(2)
    assert machine.governor.threads == 4
    machine.governor.n_cores = 1
    machine.run(2)
    assert machine.governor.threads == 1


STAT = """cpu  600 70 60 9000 5 4 3 2 0 0
cpu0 100 10 20 1000 1 2 1 1 0 0
cpu1 500 60 40 8000 4 2 2 1 0 0
intr 12345 0 0
ctxt 99
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_other_processes_on_other_cores_are_no_neighbours(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text(STAT)
    before = os.sched_getaffinity(0)
    expected = {0: 100 + 20 + 2 + 1 + 1, 1: 500 + 40 + 2 + 2 + 1}  # not what runs at a low priority
    try:
        for core in before & {0, 1}:
            os.sched_setaffinity(0, {core})
            assert busy_ticks(stat) == expected[core]
        os.sched_setaffinity(0, before)
        if before == {0, 1}:
            assert busy_ticks(stat) == sum(expected.values())
    finally:
        os.sched_setaffinity(0, before)


def test_a_container_that_is_shown_other_numbers_of_cores(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  600 70 60 9000\ncpu7000 600 70 60 9000\n")
    assert busy_ticks(stat) == 660
    stat.write_text("nothing of it\n")
    assert busy_ticks(stat) is None
    assert busy_ticks(tmp_path / "none") is None
