"""Slots: reuse of retained prefixes, exchange, eviction, cancelling; no cell is ever left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core_support import Driver, greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama import abi
from mullama._core import Cells, Core, Model
from mullama.errors import InvalidRequest
from mullama.types import SamplingParams

ARCHS = ["llama", "gemma3", "mamba", "lfm2"]
PROMPT = "a prompt of some length, for cells"


def cells(driver: Driver) -> list[int]:
    used: list[int] = driver.core.cells()["used"]
    return used


# -- exchange


@pytest.mark.parametrize("arch", ARCHS)
def test_exchange_leaves_the_continuation_identical(
    make_core: Callable[..., Driver], models: Callable[..., Model], arch: str
) -> None:
    driver = make_core(models(arch))
    prompts = [PROMPT, "another one", "x"]
    apart = [driver.generate(prompt, greedy(40)).tokens for prompt in prompts]
    handles = [driver.open(prompt, greedy(40), slot=slot) for slot, prompt in enumerate(prompts)]
    driver.prefill(10)
    for a, b in [(0, 3), (3, 1), (2, 0), (1, 2), (0, 1)]:
        driver.step(3)
        driver.core.exchange(a, b)
        driver.check_law()
    driver.finish_all()
    assert [driver.outputs[handle].tokens for handle in handles] == apart
    assert driver.used_cells() == 0


def test_exchange_accounts_for_itself(core: Driver) -> None:
    core.open(PROMPT, greedy(40))
    core.prefill()
    n = Cells(core.core).token_bytes * core.core.slot_fill(0)[0]
    assert core.core.exchange(0, 2) == n > 0
    assert core.core.staging_bytes() == 0, "rows go from slot to slot where one of them is empty"
    assert core.core.exchange(1, 3) == 0, "nothing to move"
    assert core.core.exchange(2, 2) == 0
    counters = core.core.counters_dict()
    assert (counters["kv_moves"], counters["kv_move_bytes"]) == (2, n)
    rows = abi.Reader(core.core.page.buffer()).rows()
    assert (rows[2].handle, rows[2].moves, rows[2].slot) == (1, 1, 2)
    assert rows[0].state == abi.FREE
    core.finish_all()
    assert core.outputs[1].facts.moves == 1


def test_exchange_of_a_half_computed_prompt(core: Driver) -> None:
    expected = core.generate(PROMPT, greedy(10)).tokens
    core.open(PROMPT, greedy(10))
    core.core.run([], [(0, 11)])
    core.core.exchange(0, 1)
    core.finish_all()
    assert core.outputs[2].tokens == expected


def test_exchange_of_a_running_with_a_retained(core: Driver) -> None:
    first = core.generate(PROMPT, greedy(10), slot=0, retain=True)
    expected = core.generate("something else", greedy(20), slot=1).tokens
    handle = core.open("something else", greedy(20), slot=1)
    core.prefill()
    core.core.exchange(0, 1)
    assert core.core.states()[:2] == [abi.DECODE, abi.RETAINED]
    core.finish_all()
    assert core.outputs[handle].tokens == expected
    whole = first.prompt + first.tokens
    assert core.core.retained(1)[0] == len(whole) - 1, "the retained prefix moved along"
    assert core.core.slot_info(1)[3] == whole[:-1]


@pytest.mark.parametrize(("a", "b"), [(-1, 0), (0, 4), (4, 0), (99, 99)])
def test_slots_out_of_range(core: Driver, a: int, b: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        core.core.exchange(a, b)
    calls: list[Callable[[int], object]] = [
        core.core.retained, core.core.slot_info, core.core.cancel, core.core.close_slot, core.core.evict,
        core.core.cell_runs, core.core.state_bytes, core.core.inject_nan, core.core.gap_cost_ns,
        lambda slot: core.core.open(slot, 1, [65], greedy(1)), lambda slot: core.core.run([slot], []),
        lambda slot: core.core.run([], [(slot, 1)]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="out of range"):
            call(a if not 0 <= a < 4 else b)


def test_a_gap_costs_something_with_fixed_threads(core: Driver) -> None:
    core.open(PROMPT, greedy(40))
    core.prefill()
    core.step(3)
    assert core.core.gap_cost_ns(0) > 0


# -- reuse


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n_out", [1, 2, 20])
def test_a_conversation_continues_in_place(
    make_core: Callable[..., Driver], models: Callable[..., Model], arch: str, n_out: int
) -> None:
    """All that was computed is reused, for every kind of memory, and nothing changes in the text."""
    driver = make_core(models(arch), n_slots=2)
    first = driver.generate(PROMPT, greedy(n_out), retain=True)
    turn = first.prompt + first.tokens + driver.tokenize(" and now?")
    slot, n = driver.match(turn)
    assert (slot, n) == (0, len(first.prompt) + n_out - 1), "the last token was sampled, not computed"
    second = driver.generate(turn, greedy(16), reuse=n)
    fresh = driver.generate(turn, greedy(16), slot=1)
    assert second.tokens == fresh.tokens
    assert (second.facts.kv_cache_hit, second.facts.kv_cache_miss) == (n, len(turn) - n)
    assert (fresh.facts.kv_cache_hit, fresh.facts.kv_cache_miss) == (0, len(turn))
    assert driver.core.counters_dict()["prefill_tokens"] == len(first.prompt) + 2 * len(turn) - n


@pytest.mark.parametrize("shared", [1, 5, 20, 30])
def test_a_shared_beginning_is_reused(core: Driver, shared: int) -> None:
    first = core.generate(PROMPT, greedy(10), retain=True)
    prompt = first.prompt[:shared] + core.tokenize("### different")
    assert core.match(prompt) == (0, shared)
    second = core.generate(prompt, greedy(12), reuse=shared)
    assert second.facts.kv_cache_hit == shared
    assert second.tokens == core.generate(prompt, greedy(12), slot=1).tokens
    assert cells(core) == [0, 0, 0, 0]


def test_the_same_prompt_again_leaves_one_token_to_compute(core: Driver) -> None:
    first = core.generate(PROMPT, greedy(10), retain=True)
    slot, n = core.match(first.prompt)
    assert (slot, n) == (0, len(first.prompt) - 1)
    again = core.generate(PROMPT, greedy(10), reuse=n)
    assert again.tokens == first.tokens
    assert again.facts.kv_cache_miss == 1


def test_the_best_of_several_prefixes(core: Driver) -> None:
    core.generate("AB", greedy(1), slot=0, retain=True)
    core.generate("ABCDEF", greedy(1), slot=2, retain=True)
    core.generate("ABCD", greedy(1), slot=3, retain=True)
    assert core.match(b"ABCDEFGH") == (2, 6)
    assert core.match(b"ABCX") == (2, 3)
    assert core.match(b"A") == (-1, 0), "one token has to be computed"
    assert core.match(b"ZZZ") == (-1, 0)
    assert core.match([]) == (-1, 0)


def test_running_sequences_are_not_matched(core: Driver) -> None:
    core.open(PROMPT, greedy(40))
    core.prefill()
    assert core.match(core.tokenize(PROMPT + " more")) == (-1, 0)
    core.finish_all()


@pytest.mark.parametrize("arch", ["mamba", "lfm2"])
def test_a_recurrent_state_serves_only_whole(
    make_core: Callable[..., Driver], models: Callable[..., Model], arch: str
) -> None:
    driver = make_core(models(arch))
    first = driver.generate(PROMPT, greedy(6), retain=True)
    assert driver.match(first.prompt + driver.tokenize("### other")) == (-1, 0)
    assert driver.match(first.prompt) == (-1, 0)
    # Opening it with less all the same must not give a wrong text.
    prompt = first.prompt[:10] + driver.tokenize("###")
    forced = driver.generate(prompt, greedy(12), reuse=10)
    assert forced.facts.kv_cache_hit == 0
    assert forced.tokens == driver.generate(prompt, greedy(12), slot=1).tokens


def test_a_sliding_window_serves_only_what_it_still_holds(
    make_core: Callable[..., Driver], models: Callable[..., Model]
) -> None:
    """Chunks of 32: from 64 tokens on, flash attention sums in another order and near ties fall differently."""
    driver = make_core(models("gemma3"), n_slots=2, n_ctx=1024)
    first = driver.generate("A" * 20 + "B" * 20, greedy(700))
    whole = first.prompt + first.tokens[:-1]
    served = []
    for n in range(5, len(whole), 31):
        driver.generate("A" * 20 + "B" * 20, greedy(700), retain=True)
        prompt = whole[:n] + driver.tokenize("### other")
        fresh = driver.generate(prompt, greedy(12), slot=1, chunk=32)
        _slot, reuse = driver.match(prompt)
        assert reuse == 0 or reuse >= n
        if reuse:
            served.append(n)
            again = driver.generate(prompt, greedy(12), slot=0, reuse=reuse, chunk=32)
            assert again.tokens == fresh.tokens, f"{n} tokens reused"
        driver.core.evict(0)
    assert served, "close to the end the window is whole"
    assert min(served) > len(whole) - 400, "far from it, it is not"


@pytest.mark.parametrize("reuse", [-1, 36, 100])
def test_reuse_that_makes_no_sense(core: Driver, reuse: int) -> None:
    core.generate(PROMPT, greedy(3), retain=True)
    n = len(core.tokenize(PROMPT))
    with pytest.raises(ValueError, match="reuse must leave one token"):
        core.open(PROMPT, greedy(3), reuse=reuse if reuse != 36 else n)
    with pytest.raises(ValueError, match="not a prefix"):
        core.open("ZZZZ", greedy(3), reuse=2)
    assert core.core.states()[0] == abi.RETAINED, "the slot is as it was"
    core.check_law()


def test_a_stop_string_or_the_end_do_not_spoil_the_prefix(core: Driver) -> None:
    first = core.generate(PROMPT, greedy(30))
    stop = first.text[8:10]
    short = core.generate(PROMPT, greedy(30, stop=(stop,)), retain=True)
    assert short.reason == "stop"
    turn = short.prompt + short.tokens + core.tokenize(" go on")
    _slot, n = core.match(turn)
    assert n == len(short.prompt) + len(short.tokens) - 1
    assert core.generate(turn, greedy(10), reuse=n).tokens == core.generate(turn, greedy(10), slot=1).tokens


# -- ends


def test_retained_and_evicted(core: Driver) -> None:
    output = core.generate(PROMPT, greedy(10), retain=True)
    kept = len(output.prompt) + 9
    assert core.core.retained(0) == (kept, core.core.counters_dict()["steps"])
    assert cells(core) == [kept, 0, 0, 0]
    counters = core.core.counters_dict()
    assert (counters["retained"], counters["cells_used"]) == (1, kept)
    assert core.core.evict(0) == kept
    assert core.core.evict(0) == 0
    assert cells(core) == [0, 0, 0, 0]
    counters = core.core.counters_dict()
    assert (counters["retained"], counters["kv_evict_tokens"], counters["cells_used"]) == (0, kept, 0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("moment", ["opened", "half a prompt", "prompt done", "decoding", "done"])
def test_cancel_frees_the_cells_in_every_state(
    make_core: Callable[..., Driver], models: Callable[..., Model], arch: str, moment: str
) -> None:
    driver = make_core(models(arch))
    other = driver.open("the neighbour", greedy(60), slot=0)
    handle = driver.open(PROMPT, greedy(12), slot=1)
    if moment == "half a prompt":
        driver.core.run([], [(1, 5)])
    elif moment != "opened":
        driver.prefill()
        driver.step({"prompt done": 0, "decoding": 4, "done": 40}[moment])
    driver.core.cancel(1)
    driver.core.cancel(1)
    driver.collect()
    assert driver.core.states()[1] == abi.FREE
    assert driver.outputs[handle].reason == ("length" if moment == "done" else "cancelled")
    assert cells(driver)[1] == 0 and driver.core.cells()["window"][1] == 0
    driver.check_law()
    driver.finish_all()
    assert driver.outputs[other].tokens == driver.generate("the neighbour", greedy(60)).tokens
    assert driver.used_cells() == 0
    counters = driver.core.counters_dict()
    assert counters["cancelled"] == (moment != "done")


def test_cancel_of_nothing_and_of_a_prefix(core: Driver) -> None:
    core.core.cancel(0)
    core.generate(PROMPT, greedy(3), retain=True)
    core.core.cancel(0)
    assert core.core.states()[0] == abi.RETAINED, "evict is the word for that"


def test_the_finish_record_of_a_cancelled_request(core: Driver) -> None:
    handle = core.open(PROMPT, greedy(30))
    core.prefill()
    core.step(4)
    core.core.cancel(0)
    core.collect()
    row = core.outputs[handle].facts
    assert row.completion_tokens == 5 == sum(n for _, n in core.outputs[handle].deltas)
    assert row.finished_ns >= row.last_token_ns


def test_a_slot_in_use_is_not_opened_again(core: Driver) -> None:
    core.open(PROMPT, greedy(3))
    with pytest.raises(RuntimeError, match="in use"):
        core.open("x", greedy(3))
    with pytest.raises(RuntimeError, match="no finished request"):
        core.core.close_slot(0)
    with pytest.raises(RuntimeError, match="no finished request"):
        core.core.close_slot(1)
    core.finish_all()


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([], greedy(1)),
        ([65] * 513, greedy(1)),
        ([-1], greedy(1)),
        ([1 << 20], greedy(1)),
        ([65], greedy(1, temperature=-1.0)),
        ([65], greedy(1, logit_bias=((1 << 20, 1.0),))),
        ([65], greedy(1, logit_bias=((1, float("nan")),))),
    ],
)
def test_what_cannot_be_opened_leaves_the_slot_as_it_was(
    core: Driver, prompt: list[int], params: SamplingParams
) -> None:
    first = core.generate(PROMPT, greedy(3), retain=True)
    before = core.core.slot_info(0)
    with pytest.raises(InvalidRequest):
        core.core.open(0, 9, prompt, params)
    assert core.core.slot_info(0) == before
    assert core.core.counters_dict()["opened"] == 1
    again = core.generate(PROMPT, greedy(3), reuse=len(first.prompt) - 1)
    assert again.tokens == first.tokens


@pytest.mark.parametrize(
    ("decode", "prefill"),
    [
        ([0], []),  # in PREFILL
        ([2], []),  # free
        ([1, 1], []),
        ([], [(1, 1)]),  # in DECODE
        ([], [(0, 0)]),
        ([], [(0, -1)]),
        ([], [(0, 1000)]),
        ([], [(0, 1), (0, 1)]),
        ([], [(2, 1)]),
        ([1], [(0, 5), (1, 1)]),
    ],
)
def test_bad_plans_are_refused_and_change_nothing(
    core: Driver, decode: list[int], prefill: list[tuple[int, int]]
) -> None:
    one = core.open("slot nought, still to be computed", greedy(10), slot=0)
    two = core.open("in slot one", greedy(10), slot=1)
    core.core.run([], [(1, len(core.outputs[two].prompt))])
    before = [core.core.slot_info(slot) for slot in range(4)], core.core.counters_dict()["ubatches"]
    with pytest.raises(ValueError, match="cannot"):
        core.core.run(decode, prefill)
    assert ([core.core.slot_info(slot) for slot in range(4)], core.core.counters_dict()["ubatches"]) == before
    core.finish_all()
    assert [core.outputs[h].reason for h in (one, two)] == ["length", "length"]
    assert core.generate("in slot one", greedy(10)).tokens == core.outputs[two].tokens


def test_more_than_a_batch_is_refused(make_core: Callable[..., Driver], model: Model) -> None:
    driver = make_core(model, n_batch=32)
    driver.open("A" * 60, greedy(1))
    with pytest.raises(ValueError, match="cannot prefill 33"):
        driver.core.run([], [(0, 33)])
    driver.finish_all(chunk=32)


def test_cells_are_told_as_runs(core: Driver) -> None:
    core.open("ABCDE", greedy(10), slot=2)
    core.prefill()
    size = core.core.cells()["size"]
    assert core.core.cell_runs(2) == [(0, 5, 2), (5, size - 5, -1)]
    assert core.core.cell_runs(1) == [(0, size, -1)]
    assert core.core.cell_runs(2, 1) == [] and core.core.cell_runs(2, -1) == []
    core.finish_all()


actions = st.lists(
    st.tuples(st.sampled_from(["open", "step", "cancel", "close", "drop", "exchange", "evict"]), st.integers(0, 3),
              st.integers(0, 3)),
    max_size=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(actions)
def test_any_sequence_of_operations_keeps_the_law(
    models: Callable[..., Model], plan: list[tuple[str, int, int]]
) -> None:
    """A random user of the slots: texts stay what they are alone, the bookkeeping agrees with llama.cpp throughout."""
    driver = Driver(Core(models("llama"), n_slots=4, n_ctx=256, n_batch=64))
    prompts = ["ABC", "ABCDEFG", "ABX", "QRS tuv wxyz"]
    try:
        expected = [driver.generate(prompt, greedy(9)).tokens for prompt in prompts]
        owners: dict[int, int] = {}
        for what, a, b in plan:
            state = driver.core.states()[a]
            if what == "open" and state in (abi.FREE, abi.RETAINED):
                tokens = driver.tokenize(prompts[b])
                slot, n = driver.match(tokens)
                owners[driver.open(tokens, greedy(9), slot=a, reuse=n if slot == a else 0)] = b
            elif what == "step":
                driver.prefill(5)
                driver.step(a)
            elif what == "cancel":
                driver.core.cancel(a)
            elif what in ("close", "drop") and state == abi.DONE:
                driver.core.close_slot(a, retain=what == "close")
            elif what == "exchange":
                driver.core.exchange(a, b)
            elif what == "evict":
                driver.core.evict(a)
            driver.check_law()
            driver.collect()
        driver.finish_all()
        for handle, number in owners.items():
            output = driver.outputs[handle]
            assert output.done
            assert output.tokens == expected[number][: len(output.tokens)]
            assert output.reason == "cancelled" or len(output.tokens) == 9
        for slot in range(4):
            driver.core.evict(slot)
        assert driver.used_cells() == 0
    finally:
        driver.close()
