"""Preemption: a sequence leaves its slot and comes back as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core_support import Driver, greedy, sampled

from mullama import abi
from mullama._core import Core, Model, Parked
from mullama.types import SamplingParams

ARCHS = ["llama", "gemma3", "mamba", "lfm2"]
PROMPT = "a prompt of some length, for cells"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("params", [greedy(40), sampled(40)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("save", [True, False], ids=["swap", "recompute"])
def test_the_answer_is_the_same(
    make_core: Callable[..., Driver], models: Callable[..., Model], arch: str, params: SamplingParams, save: bool
) -> None:
    driver = make_core(models(arch))
    apart = driver.generate(PROMPT, params)
    other = driver.generate("another one", greedy(60)).tokens
    handle = driver.open(PROMPT, params, slot=1)
    driver.open("another one", greedy(60), slot=0)
    driver.prefill(10)
    for slot in (2, 0, 3):
        driver.step(4)
        at = driver.outputs[handle].slot
        parked = driver.core.preempt(at, save=save)
        assert parked.saved is save
        driver.step(3)
        if not save and driver.core.retained(at)[0]:
            driver.core.evict(at)
        if slot == 0 and driver.core.states()[0] != abi.FREE:
            driver.core.exchange(0, 2)
        driver.core.resume(slot, parked)
        driver.check_law()
        driver.prefill(10)
    driver.finish_all()
    assert driver.outputs[handle].tokens == apart.tokens
    assert driver.outputs[handle].text == apart.text
    assert driver.outputs[handle + 1].tokens == other
    facts = driver.outputs[handle].facts
    assert facts.preemptions == 3
    assert facts.preempted_ns > 0
    assert (facts.recomputed > 0) is not save
    assert (facts.prompt_tokens, facts.completion_tokens) == (apart.facts.prompt_tokens, 40)
    assert driver.used_cells() == 0


@pytest.mark.parametrize("save", [True, False])
def test_in_the_middle_of_a_prompt(core: Driver, save: bool) -> None:
    expected = core.generate(PROMPT, greedy(10)).tokens
    core.open(PROMPT, greedy(10))
    core.core.run([], [(0, 11)])
    parked = core.core.preempt(0, save=save)
    n = len(core.tokenize(PROMPT))
    assert parked.left() == (n - 11 if save else n)
    assert parked.tokens() == core.tokenize(PROMPT)
    core.core.evict(0)
    core.core.resume(2, parked)
    assert core.core.states()[2] == abi.PREFILL
    core.finish_all()
    assert core.outputs[2].tokens == expected


def test_what_was_given_up_is_found_again_as_a_prefix(core: Driver) -> None:
    core.open(PROMPT, greedy(20))
    core.prefill()
    core.step(5)
    parked = core.core.preempt(0, save=False)
    slot, n = core.match(parked.tokens())
    assert (slot, n) == (0, len(parked.tokens()) - 1)
    core.core.resume(0, parked, reuse=n)
    assert core.core.states()[0] == abi.DECODE, "all but the last token is there"
    core.finish_all()
    assert core.outputs[1].facts.recomputed == 0
    assert core.outputs[1].tokens == core.generate(PROMPT, greedy(20)).tokens


def test_the_page_accounts_for_it(core: Driver) -> None:
    core.open(PROMPT, greedy(20))
    core.prefill()
    core.step(2)
    n_bytes = core.core.state_bytes(0)
    parked = core.core.preempt(0, save=True)
    counters = core.core.counters_dict()
    assert (counters["preemptions"], counters["parked"], counters["parked_bytes"]) == (1, 1, n_bytes)
    assert parked.n_bytes == core.core.parked_bytes() == n_bytes
    row = abi.Reader(core.core.page.buffer()).row(0)
    assert row.state == abi.FREE
    assert row.handle == 0, "nobody lives there"
    core.core.resume(1, parked)
    counters = core.core.counters_dict()
    assert (counters["parked"], counters["parked_bytes"], counters["swap_bytes"]) == (0, 0, 2 * n_bytes)
    assert abi.Reader(core.core.page.buffer()).row(1).preemptions == 1
    core.finish_all()


@pytest.mark.parametrize("save", [True, False])
def test_cancelled_while_it_is_away(core: Driver, save: bool) -> None:
    core.open(PROMPT, greedy(20))
    core.prefill()
    core.step(3)
    parked = core.core.preempt(0, save=save)
    core.core.cancel_parked(parked)
    core.core.cancel_parked(parked)  # harmless
    core.collect()
    assert core.outputs[1].reason == "cancelled"
    assert core.outputs[1].facts.completion_tokens == 4
    assert core.core.parked_bytes() == 0
    with pytest.raises(RuntimeError, match="resumed or ended"):
        core.core.resume(1, parked)
    core.core.evict(0)
    assert core.used_cells() == 0


def test_wrong_calls_change_nothing(core: Driver) -> None:
    with pytest.raises(RuntimeError, match="no running sequence"):
        core.core.preempt(0, save=True)
    core.open(PROMPT, greedy(8))
    core.open("another one", greedy(8), slot=1)
    core.prefill()
    parked = core.core.preempt(0, save=False)
    with pytest.raises(RuntimeError, match="in use"):
        core.core.resume(1, parked)
    with pytest.raises(ValueError, match="reuse must leave"):
        core.core.resume(2, parked, reuse=3)
    with pytest.raises(ValueError, match="reuse must leave"):
        core.core.resume(0, parked, reuse=-1)
    core.core.resume(0, parked, reuse=3)
    core.finish_all()
    assert core.outputs[1].tokens == core.generate(PROMPT, greedy(8)).tokens


def test_a_damaged_save_is_computed_again(make_core: Callable[..., Driver], model: Model) -> None:
    """llama.cpp refuses the state of another layout: nothing wrong is ever continued."""
    driver = make_core(model)
    expected = driver.generate(PROMPT, greedy(12)).tokens
    handle = driver.open(PROMPT, greedy(12))
    driver.prefill()
    driver.step(3)
    parked = driver.core.preempt(0, save=True)
    driver.core.damage_parked(parked)
    driver.core.resume(0, parked)
    assert driver.core.states()[0] == abi.PREFILL
    driver.finish_all()
    assert driver.outputs[handle].tokens == expected
    assert driver.outputs[handle].facts.recomputed > 0


def test_dropped_without_a_word(models: Callable[..., Model]) -> None:
    """A Parked that is forgotten frees its sampler and its bytes; the core can be closed before it."""
    driver = Driver(Core(models("llama"), n_slots=2, n_ctx=512, n_batch=64))
    driver.open(PROMPT, sampled(8))
    driver.prefill()
    parked: Parked | None = driver.core.preempt(0, save=True)
    driver.close()
    assert parked is not None
    assert parked.n_bytes > 0
    parked = None


def test_run_stops_at_a_time(core: Driver) -> None:
    import time

    core.open(PROMPT, greedy(400))
    core.prefill()
    soon = time.monotonic_ns() + 5_000_000
    core.core.run([0], [], 0, soon)
    assert core.core.states()[0] == abi.DECODE
    assert time.monotonic_ns() >= soon
    generated = core.core.progress()[0][1]
    assert 1 < generated < 400
    core.core.run([0], [], 0, 1)
    assert core.core.progress()[0][1] == generated + 1, "a time that has passed: one step"
