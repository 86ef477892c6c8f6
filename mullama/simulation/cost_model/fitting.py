"""From measured ubatches to a cost model: medians at the points of a grid, and the few scalars by least squares.

Of several visits to a point those count that are about as fast as the fastest: a slow spell of the machine makes all
samples of a visit slower, and nothing makes them faster.

Where not every slot was filled to a context, the rest of the column is what the most sequences that were there paid
for it, times the number of sequences: attention is computed row by row, the weights are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from mullama.simulation.cost_model.costs import CostModel, padded
from mullama.simulation.cost_model.gauge import Measured, Sample
from mullama.simulation.cost_model.grid import Grid

SPELL = 1.1  # times the fastest visit: slower ones were disturbed

Point = tuple[float, float]  # cells, ns


def fit(measured: Measured, about: dict[str, Any] | None = None) -> CostModel:
    """The cost model without the engine's overheads (see overhead.py).

    Raises ValueError without samples of each kind.
    """
    decodes = [sample for sample in measured.samples if sample.kind == "decode"]
    chunks = [sample for sample in measured.samples if sample.kind == "prefill"]
    if not decodes or not chunks:
        raise ValueError("samples of decodes and of prompt chunks are needed")
    rebuild_ns = _rebuild(measured.samples)
    output_ns = _output(chunks, rebuild_ns)
    decode = _decode_grid(decodes)
    return CostModel(
        about=about or {},
        decode=decode,
        prefill=_prefill_grid(chunks, rebuild_ns),
        masked_cell_ns=_masked(decodes, decode),
        output_ns=output_ns,
        rebuild_ns=rebuild_ns,
        greedy_ns=_median(measured.greedy_ns),
        sampled_ns=_median(measured.sampled_ns),
        admit_ns=_median(measured.admit_ns),
        save_token_ns=_median(measured.save_token_ns),
        restore_token_ns=_median(measured.restore_token_ns),
    )


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of the least-squares line a + b·x; b is 0 when all x are the same."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    b = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return mean_y - b * mean_x, b


def positive_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The same with neither a nor b below 0, for x above 0."""
    a, b = line(points)
    if a < 0:
        return 0.0, max(sum(x * y for x, y in points) / sum(x * x for x, _ in points), 0.0)
    if b < 0:
        return max(sum(y for _, y in points) / len(points), 0.0), 0.0
    return a, b


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return max(float(median(found)), 0.0) if found else 0.0


def _is_even(sample: Sample) -> bool:
    """Whether all its sequences were about as long."""
    return sample.longest - sample.cells < 64


def _rebuild(samples: Iterable[Sample]) -> float:
    """What a new graph costs: the same ubatch with one, less the same without."""
    groups: dict[Any, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for sample in samples:
        # Decodes of a level are within a few cells of one another, levels are not.
        place = padded(sample.longest) if sample.kind == "decode" else int(sample.cells)
        groups[sample.kind, sample.tokens, place, sample.final, sample.visit][sample.rebuilt].append(sample.ns)
    # A long chunk varies by more than a graph costs.
    found = [
        median(new) - median(old)
        for (kind, tokens, *_), (old, new) in groups.items()
        if old and new and (kind == "decode" or tokens <= 16)
    ]
    return _median(found)


def _output(chunks: Iterable[Sample], rebuild_ns: float) -> float:
    """What the logits of a prompt's last token cost."""
    groups: dict[tuple[int, int], tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for sample in chunks:
        groups[sample.tokens, sample.visit][sample.final].append(sample.ns - sample.rebuilt * rebuild_ns)
    return _median(median(final) - median(other) for other, final in groups.values() if final and other)


def _decode_grid(decodes: Iterable[Sample]) -> Grid:
    by_rows: dict[int, dict[int, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in decodes:
        if not sample.rebuilt and _is_even(sample):
            by_rows[sample.tokens][_level(sample)].append(sample)
    curves = {rows: _curve(levels.values()) for rows, levels in sorted(by_rows.items())}
    axis = sorted({round(cells) for cells, _ in max(curves.values(), key=len)})
    table = {
        rows: [_value(curve, cells) for cells in axis if cells <= curve[-1][0] + 64] for rows, curve in curves.items()
    }
    for j in range(len(axis)):
        known = [rows for rows, row in table.items() if len(row) > j]
        widest = max(known)
        for rows, row in table.items():
            if len(row) == j:
                row.append(row[j - 1] + (table[widest][j] - table[widest][j - 1]) * rows / widest)
    return Grid(
        [float(rows) for rows in table], [float(cells) for cells in axis], [_not_below_zero(r) for r in table.values()]
    )


def _level(sample: Sample) -> int:
    """Samples of one level are within a few dozen cells."""
    return padded(sample.longest) if sample.longest > 128 else 0


def _curve(levels: Iterable[list[Sample]]) -> list[Point]:
    return sorted((median(s.cells for s in level), _quiet((s.visit, s.ns) for s in level)) for level in levels)


def _quiet(samples: Iterable[tuple[int, float]]) -> float:
    """The medians of the visits, without those in a slow spell, averaged; samples are (visit, ns)."""
    visits: dict[int, list[float]] = defaultdict(list)
    for visit, ns in samples:
        visits[visit].append(ns)
    medians = [median(values) for values in visits.values()]
    return fmean(ns for ns in medians if ns <= SPELL * min(medians))


def _value(curve: Sequence[Point], cells: float) -> float:
    """On the lines between the points of a curve, and beyond them."""
    if len(curve) == 1:
        return curve[0][1]
    i = next((i for i in range(1, len(curve) - 1) if cells < curve[i][0]), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return y0 + (y1 - y0) * (cells - x0) / (x1 - x0)


def _not_below_zero(row: Iterable[float]) -> list[float]:
    return [max(round(value, 1), 0.0) for value in row]


def _masked(decodes: Iterable[Sample], grid: Grid) -> float:
    """What a row pays for a cell that only a longer row needs; 0 without uneven samples."""
    pairs = [
        (masked, sample.ns - grid.at(sample.tokens, sample.cells))
        for sample in decodes
        if not sample.rebuilt and not _is_even(sample)
        for masked in [sample.tokens * (padded(sample.longest) - padded(int(sample.cells)))]
    ]
    weight = sum(masked * masked for masked, _ in pairs)
    return max(sum(masked * rest for masked, rest in pairs) / weight, 0.0) if weight else 0.0


def _prefill_grid(chunks: Iterable[Sample], rebuild_ns: float) -> Grid:
    """Chunks that ended their prompt, without the cost of a new graph. Sizes that every context has."""
    found: dict[int, dict[float, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for sample in chunks:
        if sample.final:
            ns = max(sample.ns - sample.rebuilt * rebuild_ns, 0.0)
            found[sample.tokens][sample.cells].append((sample.visit, ns))
    contexts = sorted({cells for by_cells in found.values() for cells in by_cells})
    sizes = sorted(found)
    if len(complete := [n for n in sizes if all(cells in found[n] for cells in contexts)]) < 2:
        contexts = contexts[:1]
        complete = [n for n in sizes if contexts[0] in found[n]]
    table = [[round(_quiet(found[n][cells]), 1) for cells in contexts] for n in complete]
    return Grid([float(n) for n in complete], [float(cells) for cells in contexts], table)
