"""Cost models: tables, files, and what a calibration makes of a machine whose costs are known."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import simulation_support as machine
from hypothesis import given
from hypothesis import strategies as st
from simulation_support import MS, FakeCore, costs

from mullama.errors import ConfigError
from mullama.kv.index.tree import PrefixTree
from mullama.simulation import CostModel, Grid, read_costs, write_costs
from mullama.simulation.cost_model.costs import padded
from mullama.simulation.cost_model.fitting import fit, line, positive_line
from mullama.simulation.cost_model.gauge import Gauge, plan_levels, row_counts

# -- tables -------------------------------------------------------------------------------------------------------

GRID = Grid([1, 4, 8], [0, 100], [[10, 20], [40, 50], [60, 100]])


@pytest.mark.parametrize(
    ("x", "y", "ns"),
    [(1, 0, 10), (8, 100, 100), (4, 50, 45), (2, 0, 20), (6, 100, 75), (6, 50, 62.5), (0, -5, 10), (1, 200, 30)],
)
def test_between_and_beyond_the_points(x: float, y: float, ns: float) -> None:
    assert GRID.at(x, y) == pytest.approx(ns)


def test_beyond_the_last_point_of_both_axes() -> None:
    # Along y at 4 and at 8 first: 60 and 140, then along x.
    assert GRID.at(16, 200) == pytest.approx(140 + 2 * 80)


def test_never_downwards_beyond_the_end() -> None:
    assert Grid([1, 2], [0], [[50], [40]]).at(9, 0) == 40
    assert Grid([1], [0], [[7]]).at(9, 9) == 7


@given(
    values=st.lists(st.lists(st.floats(0, 1e9), min_size=3, max_size=3), min_size=2, max_size=2),
    x=st.floats(0, 50),
    y=st.floats(0, 50),
)
def test_a_table_gives_no_negative_costs(values: list[list[float]], x: float, y: float) -> None:
    grid = Grid([1, 2], [0, 1, 2], values)
    assert grid.at(x, y) >= 0
    assert grid.at(2, 1) == pytest.approx(values[1][1])


@pytest.mark.parametrize(
    ("x", "y", "ns", "reason"),
    [
        ([], [0], [], "axis x needs"),
        ([1], [float("nan")], [[1]], "axis y needs"),
        ([2, 1], [0], [[1], [1]], "axis x must ascend"),
        ([1, 2], [0], [[1]], "2 rows of 1"),
        ([1], [0], [[-1]], "not below 0"),
        ([1], [0], [[float("inf")]], "finite"),
    ],
)
def test_bad_tables(x: Any, y: Any, ns: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Grid(x, y, ns)


# -- the model ------------------------------------------------------------------------------------------------------


def test_masked_cells_cost_what_another_row_needs() -> None:
    model = costs(masked_cell_ns=10.0)
    even = model.decode_ns(4, 200, 250)
    assert even == round(model.decode.at(4, 200))
    assert model.decode_ns(4, 200, 1000) == even + 4 * (1024 - 256) * 10
    assert (padded(1), padded(256), padded(257)) == (256, 256, 512)


def test_a_chunk_without_logits_is_cheaper() -> None:
    model = costs(output_ns=1e6)
    assert model.prefill_ns(64, 0) - model.prefill_ns(64, 0, final=False) == 1e6
    assert costs(output_ns=1e12).prefill_ns(64, 0, final=False) == 0


def test_what_policies_are_told() -> None:
    told = costs().costs(0, 0, 512)
    assert told.prefill_token_ns == 520e6 / 512
    assert told.decode_step_ns == 7e6
    assert told.swap_token_ns == 1800


def test_a_flat_model() -> None:
    flat = CostModel.flat(prefill_token_ns=1e6, decode_step_ns=8e6, swap_token_ns=2000)
    assert flat.decode_ns(1, 10, 10) == flat.decode_ns(8, 900, 900) == 8e6
    assert flat.prefill_ns(256, 0) == 256e6
    assert flat.prefill_ns(512, 0) == pytest.approx(512e6, rel=0.02)
    assert flat.move_ns(10) == 20_000
    assert CostModel.flat(prefill_token_ns=1e6, decode_step_ns=0).decode_ns(1, 1, 1) == 1e6


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_file_holds_the_model(tmp_path: Path) -> None:
    model = costs(about={"model": {"name": "x"}, "threads": 2, "date": "2026-01-01"})
    write_costs(tmp_path / "c.json", model)
    assert read_costs(tmp_path / "c.json") == model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, "format other 1 is not mullama-costs 1"),
        ({"version": 2}, "format mullama-costs 2 is not"),
        ({"step_ns": -1}, "step_ns must be finite and not below 0"),
        ({"nonsense": 1}, "unknown field `nonsense`"),
        ({"decode": {"x": [1], "y": [0], "ns": [[]]}}, "1 rows of 1"),
        ({"prefill": None}, "Expected `object`"),
    ],
)
def test_files_are_checked(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    file = tmp_path / "c.json"
    write_costs(file, costs())
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=reason):
        read_costs(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the cost file"):
        read_costs(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_costs(tmp_path / "text")


# -- measuring ------------------------------------------------------------------------------------------------------


def calibrated(core: FakeCore, seconds: float = 60.0) -> CostModel:
    return fit(Gauge(core, 1000, seconds=seconds, clock=core.clock).run())


def true_decode(rows: int, cells: int) -> float:
    return machine.PASS + rows * (machine.ROW + cells * machine.ROW_CELL)


def true_chunk(n: int, before: int) -> float:
    return machine.PASS + n * machine.CHUNK_TOKEN + n * before * machine.CHUNK_CELL + machine.OUTPUT


@pytest.mark.parametrize(("n_slots", "n_ctx"), [(4, 2048), (1, 512), (8, 4096), (6, 256), (16, 1024)])
def test_a_known_machine_is_recovered(n_slots: int, n_ctx: int) -> None:
    model = calibrated(FakeCore(n_slots, n_ctx))
    rng = random.Random(n_slots)
    for _ in range(200):
        rows, cells = rng.randint(1, n_slots), rng.randint(100, n_ctx)
        assert model.decode_ns(rows, cells, cells) == pytest.approx(true_decode(rows, cells), rel=0.01)
        n = rng.randint(1, min(512, n_ctx // 2))
        before = rng.randint(0, n_ctx - n)
        assert model.prefill_ns(n, before) == pytest.approx(true_chunk(n, before), rel=0.02)
    assert model.greedy_ns == pytest.approx(machine.GREEDY)
    assert model.sampled_ns == pytest.approx(machine.SAMPLED)
    assert model.rebuild_ns == pytest.approx(machine.REBUILD, rel=0.05)
    assert model.output_ns == pytest.approx(machine.OUTPUT, rel=0.05)
    assert model.admit_ns == pytest.approx(machine.ADMIT)
    assert (model.save_token_ns, model.restore_token_ns) == (machine.SAVE, machine.RESTORE)


def test_putting_a_request_into_a_slot_has_the_lookup_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up and entered as an engine's KV cache does it, so that its time counts."""
    core = FakeCore(2, 512)
    for name, ns in (("match", 5000), ("hold", 700)):
        real = getattr(PrefixTree, name)

        def slow(*args: Any, real: Any = real, ns: int = ns) -> Any:
            core.now += ns
            return real(*args)

        monkeypatch.setattr(PrefixTree, name, slow)
    assert calibrated(core).admit_ns == pytest.approx(machine.ADMIT + 5700)


def test_a_memory_that_cannot_be_cut() -> None:
    """Recurrent models compute every context from its beginning; the costs found are the same."""
    model, expected = calibrated(FakeCore(2, 512, can_trim=False)), calibrated(FakeCore(2, 512))
    for n, cells in itertools.product((1, 2), (64, 200, 450)):
        assert model.decode_ns(n, cells, cells) == pytest.approx(expected.decode_ns(n, cells, cells), rel=1e-3)
        assert model.prefill_ns(30 * n, cells) == pytest.approx(expected.prefill_ns(30 * n, cells), rel=1e-3)


def test_masked_cells_are_found() -> None:
    """Where not all slots come to the longest context, the short ones pay for the long one's cells."""
    core = FakeCore(8, 4096)
    model = calibrated(core, seconds=20.0)
    assert model.masked_cell_ns == pytest.approx(machine.MASKED, rel=0.2)
    # Sequences that the machine never saw together at this length: attention is paid row by row.
    assert model.decode_ns(8, 4000, 4000) == pytest.approx(true_decode(8, 4000), rel=0.02)


def test_a_slow_spell_is_forgotten() -> None:
    """Somebody takes the cores for a while; the second visit tells."""
    quiet, core = FakeCore(), FakeCore(slow=(60, 160))
    expected, model = calibrated(quiet), calibrated(core)
    assert core.ubatches > 300
    for rows, cells in itertools.product((1, 2, 3, 4), (32, 200, 900, 1900)):
        assert model.decode_ns(rows, cells, cells) == pytest.approx(expected.decode_ns(rows, cells, cells), rel=0.03)


def test_a_slow_model_gets_a_coarser_grid() -> None:
    fast, slow = FakeCore(8, 4096), FakeCore(8, 4096)
    calibrated(fast, 60.0), calibrated(slow, 3.0)
    assert slow.now < fast.now / 2
    assert slow.now < 15 * 1e9


def test_rows_to_measure() -> None:
    assert row_counts(1) == [1]
    assert row_counts(5) == [1, 2, 3, 4, 5]
    assert row_counts(8) == [1, 2, 3, 4, 6, 8]
    assert row_counts(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


@given(n_ctx=st.integers(1, 64).map(lambda n: 256 * n), n_slots=st.integers(1, 64), tokens=st.integers(0, 200_000))
def test_levels(n_ctx: int, n_slots: int, tokens: int) -> None:
    levels = plan_levels(n_ctx, n_slots, tokens)
    contexts, slots = [context for context, _ in levels], [n for _, n in levels]
    assert contexts == sorted(set(contexts))
    assert slots == sorted(slots, reverse=True)
    assert slots[0] == n_slots
    assert slots[-1] >= 1
    assert contexts[-1] < n_ctx
    computed = sum(n * (c - before) for n, c, before in zip(slots, contexts, [0, *contexts], strict=False))
    assert computed <= tokens + n_slots * 256 + contexts[-1]


def test_lines() -> None:
    assert line([(1, 5), (2, 7), (3, 9)]) == pytest.approx((3, 2))
    assert line([(2, 5), (2, 7)]) == (6, 0)
    assert positive_line([(1, 5), (2, 7)]) == pytest.approx((3, 2))
    assert positive_line([(1, 1), (2, 4)]) == pytest.approx((0, 9 / 5))
    assert positive_line([(1, 4), (2, 2)]) == pytest.approx((3, 0))


def test_nothing_measured() -> None:
    from mullama.simulation.cost_model.gauge import Measured

    with pytest.raises(ValueError, match="samples of decodes and of prompt chunks"):
        fit(Measured())


def test_the_fake_core_notices_a_prompt_that_does_not_fit() -> None:
    """What the gauge is held to."""
    core = FakeCore(1, 256)
    with pytest.raises(AssertionError):
        core.open(0, 1, list(range(300)), machine.FakeSlot().params)
    assert core.now < MS
