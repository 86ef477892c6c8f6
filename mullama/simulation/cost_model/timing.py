"""Wall time of simulated steps: which ubatches a step is made of, and what each costs.

A step's tokens are seen at its end: the engine wakes its readers once a step.
"""

from __future__ import annotations

from mullama.simulation.cost_model.costs import BUCKET, PAD, CostModel, padded
from mullama.simulation.records import Counters, SimSequence

Shape = tuple[int, int, int, bool]  # first slot, tokens, padded cells, a prompt chunk with logits


class StepCosts:
    """Knows the shape of the last ubatch, since the next one's graph may be the same."""

    def __init__(self, costs: CostModel, counters: Counters, *, sampled: bool) -> None:
        self._costs = costs
        self._counters = counters
        self._shape: Shape | None = None
        self._step_ns = round(costs.step_ns)
        self._rebuild_ns = round(costs.rebuild_ns)
        self._token_ns = round((costs.sampled_ns if sampled else costs.greedy_ns) + costs.token_ns)
        self._known: dict[tuple[int, int, int], int] = {}  # rows, bucket, padded cells: ns of a decode

    def groups(self, decode: list[SimSequence]) -> list[list[SimSequence]]:
        """Those whose slots follow one another share a ubatch."""
        found: list[list[SimSequence]] = []
        last = -2
        for seq in sorted(decode, key=_slot):
            if seq.slot == last + 1:
                found[-1].append(seq)
            else:
                found.append([seq])
            last = seq.slot
        return found

    def decode(self, groups: list[list[SimSequence]]) -> tuple[int, int]:
        """A step of single tokens: its ns, and how many steps in a row cost just as much if nothing else happens."""
        before = self._shape
        ns = self._step_ns
        steps = 1 << 62
        for group in groups:
            cost, border = self._decode_ubatch(group)
            ns += cost
            if border < steps:
                steps = border
        return max(ns, 1), steps if self._shape == before else 1

    def _decode_ubatch(self, group: list[SimSequence]) -> tuple[int, int]:
        rows = len(group)
        total = longest = 0
        for seq in group:
            cells = seq.view.cells + 1
            total += cells
            if cells > longest:
                longest = cells
        mean = total // rows
        pad = padded(longest)
        # One cell more a row and step: the mean goes up by exactly 1.
        border = min(BUCKET - mean % BUCKET, pad - longest + 1)
        ns = self._decode_cost(rows, mean // BUCKET, pad) + rows * self._token_ns
        return ns + self._begin((group[0].slot, rows, pad, False)), border

    def _decode_cost(self, rows: int, bucket: int, pad: int) -> int:
        key = (rows, bucket, pad)
        cost = self._known.get(key)
        if cost is None:
            cells = min(bucket * BUCKET + BUCKET // 2, pad)
            cost = self._known[key] = self._costs.decode_ns(rows, cells, pad)
        return cost

    def _begin(self, shape: Shape) -> int:
        """Ns for a graph of this shape, if the last one was another."""
        self._counters.ubatches += 1
        if shape == self._shape:
            return 0
        self._shape = shape
        self._counters.rebuilds += 1
        return self._rebuild_ns

    def mixed(self, decode: list[SimSequence], prefill: list[tuple[SimSequence, int]]) -> int:
        """Ns of a step with prompt chunks; the decodes come first."""
        ns = self._step_ns
        for group in self.groups(decode):
            ns += self._decode_ubatch(group)[0]
        for seq, n in prefill:
            cells = seq.view.cells
            final = n == seq.view.prefill_left
            ns += self._costs.prefill_ns(n, cells, final=final)
            ns += self._begin((seq.slot, -n, padded(cells + n), final))
            if final:
                ns += self._token_ns
        return ns

    def gap_ns(self, steps: int) -> float:
        """What a gap in the decoding slots costs for so many steps: half a pass over the weights each."""
        return 0.5 * self._decode_cost(1, 0, PAD) * min(steps, 64)


def _slot(seq: SimSequence) -> int:
    return seq.slot
