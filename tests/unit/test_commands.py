"""What other threads ask of the engine thread: in order, answered once, and refused when nobody is there to do it."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from mullama.engine.commands import Commands
from mullama.errors import EngineDead, ShuttingDown


class FakeCore:
    n_interrupts = 0

    def interrupt(self) -> None:
        self.n_interrupts += 1


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def commands(core: FakeCore) -> Commands:
    return Commands(cast(Any, core), "tiny")


def test_they_are_done_in_order_and_interrupt_the_core(commands: Commands, core: FakeCore) -> None:
    done: list[int] = []
    futures = [commands.call(lambda n=n: done.append(n)) for n in range(3)]  # type: ignore[misc]
    assert (len(commands), core.n_interrupts, done) == (3, 3, [])
    commands.take()
    assert done == [0, 1, 2] and len(commands) == 0
    assert all(future.done() for future in futures)


def test_an_answer_is_what_was_returned_or_raised(commands: Commands) -> None:
    def fails() -> None:
        raise ValueError("no")

    def leaves() -> None:
        raise SystemExit("out")

    good, bad, ended = commands.call(lambda: 7), commands.call(fails), commands.call(leaves)
    commands.take()
    assert good.result() == 7
    with pytest.raises(ValueError, match="no"):
        bad.result()
    with pytest.raises(RuntimeError, match="told to end by SystemExit"):
        ended.result()  # not SystemExit: it would end whoever waits


def test_what_nobody_waits_for_any_more_is_not_done(commands: Commands) -> None:
    done: list[int] = []
    assert commands.call(lambda: done.append(1)).cancel()
    commands.take()
    assert done == []


@pytest.mark.parametrize(
    ("state", "words"), [("closed", "'tiny' was closed: load it again"), ("failure", "the engine of 'tiny' stopped")]
)
def test_nothing_is_asked_of_an_engine_that_has_ended(commands: Commands, state: str, words: str) -> None:
    setattr(commands, state, "it broke" if state == "failure" else True)
    with pytest.raises(EngineDead, match=words):
        commands.call(lambda: None)
    commands.post_quietly(lambda: None)
    assert len(commands) == 0


def test_new_work_is_refused_while_it_drains_and_questions_are_answered(commands: Commands) -> None:
    commands.check_alive()
    commands.draining = True
    with pytest.raises(ShuttingDown) as raised:
        commands.check_alive()
    assert raised.value.retry_after == 5
    answer = commands.call(lambda: 1)
    commands.take()
    assert answer.result() == 1


def test_a_child_has_no_engine_thread(commands: Commands) -> None:
    commands._pid = -1  # as in a child of the process that made it
    for asks in (commands.check_alive, lambda: commands.call(lambda: None)):
        with pytest.raises(EngineDead, match="was loaded by process -1"):
            asks()
    commands.post_quietly(lambda: None)
    assert len(commands) == 0


def test_what_is_not_answered_when_the_thread_ends_fails(commands: Commands) -> None:
    done, open_ = commands.call(lambda: 1), commands.call(lambda: 2)
    commands._queue.pop()
    commands.take()
    commands.end()
    assert done.result() == 1
    with pytest.raises(EngineDead, match="'tiny' is not running"):
        open_.result()


def test_a_waiting_engine_is_woken(commands: Commands) -> None:
    woken = threading.Event()

    def waits() -> None:
        with commands.lock:
            commands.wait(20)
        woken.set()

    thread = threading.Thread(target=waits)
    thread.start()
    commands.post_quietly(lambda: None)  # before or while it waits
    thread.join(20)
    assert woken.is_set() and len(commands) == 1
