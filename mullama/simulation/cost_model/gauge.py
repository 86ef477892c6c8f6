"""Measures what decodes cost on a core: single tokens of one to all slots, prompt chunks, at several contexts.

Drives the core by hand, as the engine thread does, so nobody else may use it meanwhile. Contexts grow: a slot is filled
further at each level and keeps what it has, so that the longest context is computed only once. Then they shrink again:
every level is visited twice, some time apart, because a machine has slow spells of some seconds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mullama.kv.index.tree import PrefixTree, pack
from mullama.simulation.cost_model.costs import PAD
from mullama.types import SamplingParams

ENDLESS = 1 << 20
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=ENDLESS)
SAMPLED = SamplingParams(ignore_eos=True, max_tokens=ENDLESS, seed=1)
CHUNKS = (1, 4, 16, 32, 64, 128, 256, 512)  # tokens
ROUNDS = 2  # of a visit to a level
STEADY = 2  # steps of a round after the first, whose graph is new
FIRST_CONTEXT = 32
SWAPS = 5
SLOW_NS = 200e6  # a decode that is measured one at a time

Progress = Callable[[str, float, float], None]


class CoreLike(Protocol):
    """What is used of ``mullama._core.Core``."""

    n_slots: int
    n_ctx: int
    n_batch: int

    def open(
        self, slot: int, handle: int, prompt: Sequence[int], params: SamplingParams, *, reuse: int = 0
    ) -> None: ...
    def slot_fill(self, slot: int) -> tuple[int, int]: ...
    def run(self, decode: Iterable[int], prefill: Iterable[tuple[int, int]], max_steps: int = 0) -> bool: ...
    def preempt(self, slot: int, *, save: bool) -> Any: ...
    def resume(self, slot: int, parked: Any) -> None: ...
    def cancel_parked(self, parked: Any) -> None: ...
    def counters_dict(self) -> dict[str, int]: ...
    def drain_records(self) -> list[Any]: ...


@dataclass(slots=True, frozen=True)
class Sample:
    """One measured ubatch (the mean of a few equal ones). ``rebuilt``: its graph was made anew."""

    kind: str  # "decode" or "prefill"
    tokens: int  # sequences, or tokens of the chunk
    cells: float  # mean cells a sequence attends to, or tokens before the chunk
    longest: int
    ns: float
    rebuilt: bool
    final: bool = True  # a chunk that ended its prompt
    visit: int = 0  # samples of a visit were taken at about the same time


@dataclass(slots=True)
class Measured:
    """All that a core was seen to do. Times in ns."""

    samples: list[Sample] = field(default_factory=list)
    greedy_ns: list[float] = field(default_factory=list)  # a token
    sampled_ns: list[float] = field(default_factory=list)
    admit_ns: list[float] = field(default_factory=list)
    save_token_ns: list[float] = field(default_factory=list)
    restore_token_ns: list[float] = field(default_factory=list)


def row_counts(n_slots: int) -> list[int]:
    """Numbers of sequences to measure: each one of the first four, then powers of two and their middles, and all."""
    found = {n for n in (1, 2, 3, 4) if n <= n_slots} | {n_slots}
    n = 6
    while n < n_slots:
        found |= {n, n * 4 // 3} if n * 4 // 3 < n_slots else {n}
        n *= 2
    return sorted(found)


def headroom(n_slots: int) -> int:
    """Cells that the steps of a level may add; a context that leaves them free stays below the next multiple of 256."""
    return max(96, ROUNDS * (1 + STEADY) * len(row_counts(n_slots)) + 8)


def plan_levels(n_ctx: int, n_slots: int, tokens: int) -> list[tuple[int, int]]:
    """(context, slots filled to it), ascending, computing no more than about ``tokens`` in all.

    Every slot comes to the first two; then fewer and fewer, the first of them as far as ``tokens`` reach.
    """
    contexts = [FIRST_CONTEXT]
    border = PAD
    while border <= n_ctx:
        contexts.append(border - headroom(n_slots))
        border *= 2
    if border // 2 < n_ctx:
        contexts.append(n_ctx - headroom(n_slots))
    share = tokens // len(contexts)
    levels: list[tuple[int, int]] = []
    before, widest = 0, n_slots
    for context in contexts:
        slots = min(max(share // (context - before), 1), widest)
        if len(levels) < 2:
            slots = n_slots
        elif context - before > tokens:
            break
        tokens -= slots * (context - before)
        levels.append((context, slots))
        before, widest = context, slots
    return levels


class Gauge:
    """One pass over the grid. ``seconds``: about how long it may take; slower models get a coarser grid."""

    def __init__(
        self,
        core: CoreLike,
        n_vocab: int,
        *,
        seconds: float,
        clock: Callable[[], int] = time.perf_counter_ns,
        progress: Progress = lambda step, done, total: None,
    ) -> None:
        self.measured = Measured()
        self._core = core
        self._clock = clock
        self._progress = progress
        self._seconds = seconds
        rng = random.Random(1)
        self._tokens = [rng.randrange(n_vocab) for _ in range(core.n_ctx)]
        self._cells = [0] * core.n_slots  # tokens in the KV cache
        self._own = [0] * core.n_slots  # of these, leading ones that are of _tokens
        self._tree = PrefixTree()  # the prompts of the slots
        self._handle = 0
        self._visit = 0

    def run(self) -> Measured:
        core = self._core
        self._chunks(0)  # its first samples also warm up
        tokens_a_second = 1e9 / self._token_ns()
        levels = plan_levels(core.n_ctx, core.n_slots, int(self._seconds * 0.25 * tokens_a_second))
        middle = len(levels) // 2
        for number, (context, slots) in enumerate(levels):
            self._progress("measuring decodes and prompts", number, 2 * len(levels))
            self._level(context, slots)
            if number in (middle, len(levels) - 1):
                self._swap()
                # The largest chunk must fit behind it: only sizes that every context has can be used.
                self._chunks(min(context, max(core.n_ctx - core.n_batch - 2, core.n_ctx // 2)))
        for number, (context, slots) in enumerate(reversed(levels), len(levels)):
            self._progress("measuring decodes and prompts", number, 2 * len(levels))
            self._level(context, slots)
        self._sampled()
        self._chunks(0)
        return self.measured

    # -- steps ----------------------------------------------------------------------------------------------------

    def _run(self, decode: Sequence[int], prefill: Sequence[tuple[int, int]], steps: int) -> dict[str, int]:
        """What the counters moved by."""
        before = self._core.counters_dict()
        self._core.run(decode, prefill, steps)
        after = self._core.counters_dict()
        self._core.drain_records()
        for slot in decode:
            self._cells[slot] += steps
        for slot, n in prefill:
            self._cells[slot] += n
        return {name: after[name] - before[name] for name in after}

    def _open(self, slot: int, n_tokens: int, reuse: int, params: SamplingParams = GREEDY) -> None:
        prompt = self._tokens[:n_tokens]
        key = pack(prompt)
        self._handle += 1
        start = self._clock()
        self._tree.match(b"", key)  # as an engine does: look it up, open it, enter it
        self._core.open(slot, self._handle, prompt, params, reuse=reuse)
        self._tree.hold(slot, b"", key, start)
        self.measured.admit_ns.append(self._clock() - start)
        self._cells[slot], _ = self._core.slot_fill(slot)  # less where the model's memory cannot be cut
        self._own[slot] = n_tokens

    def _leave(self, slot: int) -> None:
        """The slot keeps its KV as a prefix."""
        self._core.cancel_parked(self._core.preempt(slot, save=False))
        self._core.drain_records()
        self._own[slot] = min(self._own[slot], self._cells[slot])

    def _fill(self, slot: int, context: int, params: SamplingParams = GREEDY) -> None:
        """Make the slot decode behind a prompt of ``context`` tokens."""
        self._open(slot, context, min(self._own[slot], context - 1), params)
        self._prefill(slot, context)

    def _prefill(self, slot: int, until: int) -> None:
        while self._cells[slot] < until:
            self._run([], [(slot, min(until - self._cells[slot], self._core.n_batch))], 1)

    # -- measurements ------------------------------------------------------------------------------------------------

    def _level(self, context: int, slots: int) -> None:
        """Decodes of every number of sequences; those that are not at ``context`` stay at their own."""
        for slot in range(self._core.n_slots):
            self._fill(slot, context if slot < slots else max(self._own[slot], 1))
        self._visit += 1
        for _ in range(ROUNDS):
            for rows in reversed(row_counts(self._core.n_slots)):
                self._note_decode(rows, 1)
                self._note_decode(rows, STEADY if self.measured.samples[-1].ns < SLOW_NS else 1)
        for slot in range(self._core.n_slots):
            self._leave(slot)

    def _note_decode(self, rows: int, steps: int) -> None:
        cells = [n + (steps + 1) / 2 for n in self._cells[:rows]]
        moved = self._run(range(rows), [], steps)
        ns, rebuilt = moved["decode_ns"] / steps, moved["graphs_reused"] < steps
        if steps > 1 and rebuilt:
            return  # one of the two
        self.measured.samples.append(
            Sample("decode", rows, sum(cells) / rows, int(max(cells)), ns, rebuilt, visit=self._visit)
        )
        self.measured.greedy_ns.append((moved["sample_ns"] + moved["commit_ns"]) / (rows * steps))

    def _chunks(self, context: int) -> None:
        """Prompt chunks of every size behind ``context`` tokens, in slot 0."""
        self._visit += 1
        allowed = self._seconds / 8 * 1e9
        last_ns, last_n = 0.0, 1
        for n in [n for n in CHUNKS if n <= self._core.n_batch and context + n < self._core.n_ctx]:
            if last_ns * n / last_n > allowed and n > 16:
                break
            for _ in range(3 if last_ns * n / last_n < 0.1e9 else 2 if last_ns * n / last_n < 1e9 else 1):
                last_ns, last_n = self._chunk(context, n, final=True), n
            if 4 <= n <= 64:
                self._chunk(context, n, final=False)

    def _chunk(self, context: int, n: int, *, final: bool) -> float:
        self._open(0, context + n + (not final), context)
        self._prefill(0, context)
        moved = self._run([], [(0, n)], 1)
        self._leave(0)
        ns = float(moved["decode_ns"])
        self.measured.samples.append(
            Sample("prefill", n, context, context + n, ns, moved["graphs_reused"] < 1, final, self._visit)
        )
        return ns

    def _token_ns(self) -> float:
        """A prompt token, in the largest chunk so far."""
        largest = max(self.measured.samples, key=lambda sample: sample.tokens)
        return largest.ns / largest.tokens

    def _swap(self) -> None:
        """KV of slot 0 to host memory and back."""
        self._fill(0, self._own[0])
        for _ in range(SWAPS):
            cells = self._cells[0]
            start = self._clock()
            parked = self._core.preempt(0, save=True)
            saved = self._clock()
            self._core.resume(0, parked)
            self.measured.save_token_ns.append((saved - start) / cells)
            self.measured.restore_token_ns.append((self._clock() - saved) / cells)
        self._leave(0)

    def _sampled(self) -> None:
        """Tokens chosen by the default samplers."""
        self._fill(0, FIRST_CONTEXT, SAMPLED)
        moved = self._run([0], [], 8)
        self.measured.sampled_ns.append((moved["sample_ns"] + moved["commit_ns"]) / 8)
        self._leave(0)
