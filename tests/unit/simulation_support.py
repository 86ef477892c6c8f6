"""Synthetic machines for the simulator: costs that are known, and a core that has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mullama.simulation import CostModel, Grid
from mullama.simulation.cost_model.costs import padded
from mullama.types import SamplingParams
from mullama.workload.base import TraceRequest, Workload

MS = 1_000_000

#: What the fake core charges, in ns.
ROW, ROW_CELL, MASKED = 2 * MS, 1_500, 300
PASS, CHUNK_TOKEN, CHUNK_CELL, OUTPUT = 5 * MS, 1 * MS, 200, 1 * MS
REBUILD, GREEDY, SAMPLED, SAVE, RESTORE, ADMIT = 400_000, 20_000, 50_000, 900, 500, 30_000


def costs(**changes: Any) -> CostModel:
    """A machine on which everything costs something, and nothing is a round multiple of anything."""
    model: dict[str, Any] = {
        "decode": Grid([1, 4, 8], [0, 1024], [[7e6, 8.1e6], [15e6, 19e6], [27e6, 34e6]]),
        "prefill": Grid([1, 64, 512], [0, 2048], [[7e6, 9e6], [70e6, 90e6], [520e6, 800e6]]),
        "masked_cell_ns": 3.0,
        "output_ns": 1.1e6,
        "rebuild_ns": 310_000,
        "greedy_ns": 21_000,
        "sampled_ns": 51_000,
        "step_ns": 57_000,
        "token_ns": 13_000,
        "plan_ns": 110_000,
        "admit_ns": 43_000,
        "wake_ns": 170_000,
        "deliver_ns": 90_000,
        "save_token_ns": 1_100,
        "restore_token_ns": 700,
        **changes,
    }
    return CostModel(**model)


def plain(decode_ns: float = 10 * MS, prompt_ns: float = 1 * MS, **more: Any) -> CostModel:
    """A decode costs the same for any sequences, a prompt its tokens; everything else is free unless ``more`` says."""
    return CostModel(
        decode=Grid([1], [0], [[decode_ns]]), prefill=Grid([1, 512], [0], [[prompt_ns], [512 * prompt_ns]]), **more
    )


def workload(*requests: tuple[float, int, int], **same: Any) -> Workload:
    """Requests as (at_s, prompt tokens, output tokens)."""
    return Workload(requests=tuple(TraceRequest(*one, **same) for one in requests))


@dataclass
class FakeSlot:
    prompt: list[int] = field(default_factory=list)
    params: SamplingParams = field(default_factory=SamplingParams)
    n_past: int = 0
    state: str = "free"


class FakeCore:
    """A core whose decodes cost what the constants above say; its clock shows what they took."""

    def __init__(
        self,
        n_slots: int = 4,
        n_ctx: int = 2048,
        n_batch: int = 512,
        *,
        slow: Sequence[int] = (),
        can_trim: bool = True,
    ) -> None:
        self.can_trim = can_trim  # as attention can, and recurrent models cannot
        self.n_slots, self.n_ctx, self.n_batch = n_slots, n_ctx, n_batch
        self.now = 0
        self.slots = [FakeSlot() for _ in range(n_slots)]
        self.counters = dict.fromkeys(("steps", "decode_ns", "sample_ns", "commit_ns", "graphs_reused"), 0)
        self.shape: Any = None
        self.slow = range(*slow) if slow else range(0)  # ubatches that a neighbour makes three times as slow
        self.ubatches = 0

    def clock(self) -> int:
        return self.now

    def counters_dict(self) -> dict[str, int]:
        return dict(self.counters)

    def drain_records(self) -> list[Any]:
        return []

    def open(self, slot: int, handle: int, prompt: Sequence[int], params: SamplingParams, *, reuse: int = 0) -> None:
        own = self.slots[slot]
        assert own.state in ("free", "retained")
        assert 0 <= reuse < len(prompt) <= self.n_ctx
        assert reuse <= own.n_past
        assert own.prompt[:reuse] == list(prompt)[:reuse], "what is reused is a prefix"
        if reuse < own.n_past and not self.can_trim:
            reuse = 0
        self.slots[slot] = FakeSlot(list(prompt), params, reuse, "prefill")
        self.now += ADMIT

    def slot_fill(self, slot: int) -> tuple[int, int]:
        return self.slots[slot].n_past, len(self.slots[slot].prompt)

    def run(self, decode: Iterable[int], prefill: Iterable[tuple[int, int]], max_steps: int = 0) -> bool:
        rows, chunks = list(decode), list(prefill)
        for _ in range(1 if chunks else max_steps):
            if rows:
                self._decode(rows)
            for slot, n in chunks:
                self._chunk(slot, n)
            self.counters["steps"] += 1
        return bool(chunks)

    def _decode(self, rows: list[int]) -> None:
        assert rows == list(range(len(rows))), "no gaps"
        cells = []
        for slot in rows:
            own = self.slots[slot]
            assert own.state == "decode"
            own.n_past += 1
            assert own.n_past <= self.n_ctx
            cells.append(own.n_past)
        mean = sum(cells) // len(cells)
        masked = len(rows) * (padded(max(cells)) - padded(mean))
        self._ubatch(PASS + len(rows) * ROW + sum(cells) * ROW_CELL + masked * MASKED, (len(rows), padded(max(cells))))
        for slot in rows:
            self._sample(slot)

    def _chunk(self, slot: int, n: int) -> None:
        own = self.slots[slot]
        assert own.state == "prefill"
        assert 1 <= n <= min(len(own.prompt) - own.n_past, self.n_batch)
        ns = PASS + n * CHUNK_TOKEN + n * own.n_past * CHUNK_CELL
        own.n_past += n
        final = own.n_past == len(own.prompt)
        self._ubatch(ns + final * OUTPUT, ("chunk", n, padded(own.n_past), final))
        if final:
            own.state = "decode"
            self._sample(slot)

    def _sample(self, slot: int) -> None:
        ns = GREEDY if self.slots[slot].params.temperature == 0 else SAMPLED
        self.counters["sample_ns"] += ns // 2
        self.counters["commit_ns"] += ns - ns // 2
        self.now += ns

    def _ubatch(self, ns: int, shape: Any) -> None:
        if shape == self.shape:
            self.counters["graphs_reused"] += 1
        else:
            ns += REBUILD
        self.shape = shape
        ns *= 3 if self.ubatches in self.slow else 1
        self.ubatches += 1
        self.counters["decode_ns"] += ns
        self.now += ns

    def preempt(self, slot: int, *, save: bool) -> Any:
        own = self.slots[slot]
        assert own.state in ("prefill", "decode")
        self.slots[slot] = FakeSlot() if save else FakeSlot(own.prompt, own.params, own.n_past, "retained")
        self.now += own.n_past * SAVE if save else 0
        return own

    def resume(self, slot: int, parked: Any) -> None:
        self.slots[slot] = parked
        self.now += parked.n_past * RESTORE

    def cancel_parked(self, parked: Any) -> None:
        pass
