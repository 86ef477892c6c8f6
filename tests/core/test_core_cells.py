"""KV in and out of slots: rows, checkpoints, copies; bit by bit, on every kind of memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from core_support import Driver, greedy
from tiny import WINDOW

from mullama import abi
from mullama._core import Cells, Model
from mullama._core.kv.cells import CHUNK_TOKENS

Make = Callable[..., Driver]
Models = Callable[..., Model]
KINDS = ("llama", "gemma3", "mamba", "lfm2")
PROMPT = [65 + (7 * i) % 50 for i in range(150)]


def retained(driver: Driver, prompt: Sequence[int] = PROMPT, slot: int = 0) -> list[int]:
    """A slot that retains the prompt and what greedy decoding made of it; its tokens."""
    driver.generate(prompt, greedy(8), slot=slot, retain=True)
    return driver.core.slot_info(slot)[3]


def state_of(driver: Driver, slot: int) -> bytes:
    cells = Cells(driver.core)
    return b"".join(cells.save(slot, 0, driver.core.slot_fill(slot)[0])) + cells.checkpoint(slot)


LAYOUTS: dict[str, dict[str, Any]] = {
    "flash": {},
    "transposed": {"flash_attn": "off"},
    "bf16": {"type_k": "bf16", "type_v": "bf16"},
    "unified": {"unified_cells": 2048},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_come_back_bit_by_bit(make_core: Make, models: Models, options: dict[str, Any]) -> None:
    driver = make_core(models(), **options)
    cells = Cells(driver.core)
    tokens = retained(driver)
    chunks = cells.save(0, 0, len(tokens))
    assert [len(chunk) // cells.token_bytes for chunk in chunks] == [64, 64, len(tokens) - 128]
    assert cells.extend(2, tokens, chunks)
    assert driver.core.slot_info(2)[:4] == (abi.RETAINED, 0, len(tokens), tokens)
    assert cells.save(2, 0, len(tokens)) == chunks
    # in pieces that meet anywhere
    for cut in (1, 63, 64, 100):
        driver.core.evict(3)
        assert cells.extend(3, tokens[:cut], cells.save(0, 0, cut))
        assert cells.extend(3, tokens[cut:], cells.save(0, cut, len(tokens)))
        assert cells.save(3, 0, len(tokens)) == chunks
    driver.check_law()


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("way", ["copy", "extend"])
def test_a_restored_sequence_goes_on_as_the_original(make_core: Make, models: Models, arch: str, way: str) -> None:
    driver = make_core(models(arch))
    cells = Cells(driver.core)
    tokens = retained(driver)
    longer = [*tokens, 70, 71, 72]
    expected = driver.generate(longer, greedy(16), slot=3).tokens
    if way == "copy":
        assert cells.copy(0, 2, len(tokens))
    else:
        assert cells.extend(2, tokens, cells.save(0, 0, len(tokens)), checkpoint=cells.checkpoint(0) or None)
    # llama.cpp writes the sequence's number into a checkpoint: compare in the same slot
    original = state_of(driver, 0)
    driver.core.evict(0)
    assert cells.copy(2, 0, len(tokens))
    assert state_of(driver, 0) == original
    found = driver.generate(longer, greedy(16), slot=2, reuse=len(tokens))
    assert found.facts.kv_cache_hit == len(tokens)
    assert found.tokens == expected
    # and the original was left alone
    assert driver.generate(longer, greedy(16), slot=0, reuse=len(tokens)).tokens == expected


def test_a_running_sequence_can_be_copied_from(make_core: Make, models: Models) -> None:
    driver = make_core(models())
    cells = Cells(driver.core)
    expected = driver.generate([*PROMPT[:100], 80], greedy(12), slot=3).tokens
    whole = driver.generate(PROMPT, greedy(40), slot=2).tokens
    driver.open(PROMPT, greedy(40), slot=0)
    driver.core.run([], [(0, 64)])
    driver.core.run([], [(0, 64)])  # in the middle of its prompt
    assert cells.copy(0, 1, 100)
    driver.finish_all()
    assert driver.outputs[3].tokens == whole
    assert driver.generate([*PROMPT[:100], 80], greedy(12), slot=1, reuse=100).tokens == expected


def test_unified_slots_share_cells(make_core: Make, models: Models) -> None:
    driver = make_core(models(), unified_cells=1024)
    cells = Cells(driver.core)
    tokens = retained(driver)
    before = driver.core.cells()["total_used"]
    assert cells.copy(0, 1, 120)
    assert driver.core.cells()["total_used"] == before == len(tokens)
    assert driver.core.evict(0) == len(tokens)
    assert driver.core.cells()["total_used"] == 120
    assert driver.core.audit() == []


def test_unified_slots_decode_in_one_ubatch_whatever_is_between_them(make_core: Make, models: Models) -> None:
    driver = make_core(models(), unified_cells=1024)
    for slot in (0, 3):
        driver.open(PROMPT[:20], greedy(12), slot=slot)
    driver.prefill()
    before = driver.core.counters_dict()
    driver.step(4)
    after = driver.core.counters_dict()
    assert after["ubatches"] - before["ubatches"] == 4
    assert after["split_ubatches"] == before["split_ubatches"]
    driver.finish_all()
    assert driver.outputs[1].tokens == driver.outputs[2].tokens


def test_a_window_can_be_cut_only_while_it_is_whole(make_core: Make, models: Models) -> None:
    driver = make_core(models("gemma3"))
    cells = Cells(driver.core)
    n = len(retained(driver, (PROMPT * 3)[:400]))
    assert cells.needs_checkpoint
    oldest = n - driver.core.cells()["window"][0]
    assert oldest > 0, "the window's cells were used again"
    assert cells.can_cut(0, n) and cells.can_cut(0, oldest + WINDOW + 1)
    assert not cells.can_cut(0, oldest + WINDOW)
    assert cells.trim(0, oldest + WINDOW) == 0  # given up rather than wrong
    driver.check_law()


@pytest.mark.parametrize("arch", ["mamba", "lfm2"])
def test_recurrent_state_cannot_be_cut(make_core: Make, models: Models, arch: str) -> None:
    driver = make_core(models(arch))
    cells = Cells(driver.core)
    n = len(retained(driver))
    assert cells.can_cut(0, n) and not cells.can_cut(0, n - 1)


def test_random_walks_keep_the_law(make_core: Make, models: Models) -> None:
    driver = make_core(models(), n_slots=6)
    cells = Cells(driver.core)
    rng = random.Random(5)
    retained(driver)
    truth = b"".join(cells.save(0, 0, 150))
    for _ in range(60):
        src, dst = rng.sample(range(6), 2)
        n_src = driver.core.retained(src)[0]
        if n_src == 0 or driver.core.retained(dst)[0]:
            if (
                dst != 0
                and driver.core.retained(dst)[0]
                and any(driver.core.retained(i)[0] > 100 for i in range(6) if i != dst)
            ):
                driver.core.evict(dst)
            continue
        n = rng.randint(1, min(n_src, 150))
        assert cells.copy(src, dst, n)
        assert b"".join(cells.save(dst, 0, n)) == truth[: n * cells.token_bytes]
        driver.check_law()


def test_what_is_wrong_is_refused_and_changes_nothing(make_core: Make, models: Models) -> None:
    driver = make_core(models())
    cells = Cells(driver.core)
    tokens = retained(driver)
    rows = cells.save(0, 0, 100)
    for wrong in (lambda: cells.save(0, 0, len(tokens) + 1), lambda: cells.save(0, 5, 5), lambda: cells.save(9, 0, 1),
                  lambda: cells.extend(1, tokens[:99], rows), lambda: cells.extend(1, [], []),
                  lambda: cells.extend(1, [-1], [rows[0][: cells.token_bytes]]),
                  lambda: cells.extend(0, tokens * 9, rows), lambda: cells.copy(0, 1, len(tokens) + 1),
                  lambda: cells.trim(1, 0), lambda: cells.copy(1, 2, 1)):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()
    driver.open(PROMPT[:10], greedy(4), slot=1)
    for in_use in (
        lambda: cells.extend(1, tokens[:100], rows),
        lambda: cells.copy(0, 1, 10),
        lambda: cells.copy(0, 0, 10),
    ):
        with pytest.raises(RuntimeError):
            in_use()
    driver.finish_all()
    assert driver.core.slot_info(0)[3] == tokens
    driver.check_law()


def test_a_damaged_checkpoint_is_given_up(make_core: Make, models: Models) -> None:
    driver = make_core(models("gemma3"))
    cells = Cells(driver.core)
    tokens = retained(driver)
    rows, checkpoint = cells.save(0, 0, len(tokens)), cells.checkpoint(0)
    assert not cells.extend(1, tokens, rows, checkpoint=checkpoint[: len(checkpoint) // 2])
    assert driver.core.states()[1] == abi.FREE
    driver.check_law()


def test_transfers_are_counted(make_core: Make, models: Models) -> None:
    driver = make_core(models())
    cells = Cells(driver.core)
    tokens = retained(driver)
    rows = cells.save(0, 0, len(tokens))
    cells.extend(1, tokens, rows)
    cells.copy(0, 2, 64)
    counters = driver.core.counters_dict()
    assert counters["kv_store_bytes"] == counters["kv_restore_bytes"] == len(tokens) * cells.token_bytes
    assert counters["kv_copy_bytes"] == CHUNK_TOKENS * cells.token_bytes
    assert all(cost > 0 for cost in driver.core.kv_costs().values())


def test_layers_say_where_keys_and_values_lie(make_core: Make, models: Models) -> None:
    cells = Cells(make_core(models()).core)
    layers = cells.layers()
    assert [layer["layer"] for layer in layers] == [0, 1]
    end = 0
    for layer in layers:
        for part in (layer["k"], layer["v"]):
            assert part[0] == end
            end += part[1]
    assert end == cells.token_bytes


@pytest.mark.parametrize("options", [{}, {"flash_attn": "off"}, {"unified_cells": 1024}], ids=str)
def test_what_is_not_finite_does_not_reach_the_next_sequence(
    models: Models, make_core: Make, options: dict[str, Any]
) -> None:
    """Attention in tiles, and without flash attention, computes hidden cells as well, and 0 times NaN is NaN."""
    driver = make_core(models("llama"), n_ctx=256, n_batch=128, **options)
    prompt = [65 + i % 26 for i in range(100)]
    plain = driver.generate(prompt, greedy(8), slot=0).text
    driver.core.evict(0)
    cells = Cells(driver.core)
    n_values = cells.token_bytes // 2
    assert cells.extend(0, list(range(200)), [np.full(200 * n_values, np.nan, np.float16).tobytes()])
    poisoned = driver.generate([*range(200), 65], greedy(4), slot=0, reuse=200)
    assert poisoned.reason == "error"
    again = driver.generate(prompt, greedy(8), slot=0)
    assert (again.reason, again.text) == ("length", plain)
