"""Contexts that go on beyond their end, and computations that do not depend on what is computed beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core_support import Driver, greedy

from mullama import abi
from mullama._core import Cells, Model
from mullama.engine.engine import Engine
from mullama.errors import InvalidRequest
from mullama.types import Request

Make = Callable[..., Driver]
Models = Callable[..., Model]
PROMPT = [65 + (7 * i) % 50 for i in range(200)]


def test_a_full_context_drops_the_older_half_and_goes_on(make_core: Make, models: Models) -> None:
    driver = make_core(models(), n_ctx=256)
    core = driver.core
    handle = driver.open(PROMPT, greedy(300), shift_keep=4)
    driver.prefill()
    seen = 0
    while core.states()[0] == abi.DECODE:
        core.run([0], [], 1)
        assert core.slot_fill(0)[0] <= 256
        assert core.audit() == []
        if core.shifted(0) > seen:
            seen = core.shifted(0)
            assert core.slot_info(0)[3][:4] == PROMPT[:4], "the first tokens stay"
        driver.read_records(core.drain_records())
    row = driver.outputs[handle].facts
    assert (row.completion_tokens, row.shifted) == (300, seen)
    assert seen >= 200 + 300 - 1 - 256
    assert row.cells == 200 + 299 - seen
    assert core.close_slot(0) == 0, "its KV is that of no prompt: it is not retained"


def test_without_the_wish_the_end_of_the_context_is_the_end(make_core: Make, models: Models) -> None:
    driver = make_core(models(), n_ctx=256)
    output = driver.generate(PROMPT, greedy(300))
    assert output.reason == "length"
    assert output.facts.completion_tokens == 256 - 200
    assert output.facts.shifted == 0


@pytest.mark.parametrize("arch", ["gemma3", "mamba", "lfm2"])
def test_models_that_cannot_shift_say_so(make_core: Make, models: Models, arch: str) -> None:
    driver = make_core(models(arch), n_ctx=256)
    assert not driver.core.can_shift
    with pytest.raises(InvalidRequest, match="cannot be shifted"):
        driver.open(PROMPT, greedy(4), shift_keep=4)
    assert driver.core.states()[0] == abi.FREE


def test_neighbours_notice_nothing_of_a_shift(make_core: Make, models: Models) -> None:
    driver = make_core(models(), n_ctx=256)
    alone = driver.generate(PROMPT[:30], greedy(200), slot=1).tokens
    driver.open(PROMPT, greedy(120), slot=0, shift_keep=4)
    driver.open(PROMPT[:30], greedy(200), slot=1)
    driver.finish_all()
    assert driver.outputs[2].facts.shifted > 0
    assert driver.outputs[3].tokens == alone


def test_the_engine_shares_nothing_of_a_shifted_sequence(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(ctx_size=256, parallel=2)
    assert engine.info.can_shift
    generation = engine.submit_sync(Request("a", PROMPT, greedy(150), context_shift=True))
    for _ in generation:
        pass
    assert generation.finish is not None
    assert generation.finish.profile.context_shifted > 0
    assert generation.finish.profile.completion_tokens == 150
    again = engine.submit_sync(Request("b", PROMPT, greedy(4)))
    for _ in again:
        pass
    assert again.finish is not None
    assert again.finish.profile.kv_cache_hit == 0
    assert engine.kv.audit() == []


def test_reference_computations_do_not_depend_on_chunks_neighbours_and_copies(make_core: Make, models: Models) -> None:
    driver = make_core(models(), n_ctx=1024, n_slots=4, reference=True)
    prompts = [[65 + (k * i) % 50 for i in range(600 + 10 * k)] for k in (3, 7, 11)]
    alone = [driver.generate(prompt, greedy(24), chunk=64).tokens for prompt in prompts]
    assert [driver.generate(prompt, greedy(24), chunk=7).tokens for prompt in prompts] == alone
    handles = [driver.open(prompt, greedy(24), slot=slot) for slot, prompt in enumerate(prompts)]
    driver.finish_all(chunk=50, retain=True)
    assert [driver.outputs[handle].tokens for handle in handles] == alone
    assert Cells(driver.core).copy(1, 3, 500)
    assert driver.generate(prompts[1], greedy(24), slot=3, reuse=500).tokens == alone[1]
