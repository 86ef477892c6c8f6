"""Driving a Core by hand: what the engine thread does, without a thread."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mullama import abi
from mullama._core import TEXT, Cells, Core
from mullama.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def greedy(max_tokens: int = 24, **more: Any) -> SamplingParams:
    """Greedy and never ending before ``max_tokens``, unless ``more`` says otherwise."""
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **more})


def sampled(max_tokens: int = 24, **more: Any) -> SamplingParams:
    """Sampled with a seed from the whole vocabulary."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "ignore_eos": True}
    return SamplingParams(**{**plain, "max_tokens": max_tokens, **more})


@dataclass
class Output:
    """What one request's records said."""

    prompt: list[int]
    slot: int
    deltas: list[tuple[str, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    stop_index: int = -1
    error: int = 0
    row: abi.Row | None = None

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.deltas)

    @property
    def done(self) -> bool:
        return self.row is not None

    @property
    def facts(self) -> abi.Row:
        assert self.row is not None, "the request has not ended"
        return self.row


class Driver:
    """A Core, its requests by handle, and the loop that the engine runs around it."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.outputs: dict[int, Output] = {}
        self.closed = False
        self._handles = itertools.count(1)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.core.close()

    def tokenize(self, text: str) -> list[int]:
        return self.core.model.tokenize(text)

    def open(
        self, prompt: str | Sequence[int], params: SamplingParams = GREEDY, *, slot: int = 0, **options: Any
    ) -> int:
        """Open a request; returns its handle."""
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        handle = next(self._handles)
        self.core.open(slot, handle, tokens, params, **options)
        self.outputs[handle] = Output(tokens, slot)
        return handle

    def match(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The retained slot that saves most of ``prompt``, and the tokens it saves; (-1, 0) when none does."""
        best, cells = (-1, 0), Cells(self.core)
        for slot in self.slots_in(abi.RETAINED):
            _, _, n_past, tokens, _ = self.core.slot_info(slot)
            pairs = zip(tokens[:n_past], list(prompt)[:-1], strict=False)  # one token is left to compute
            n = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if n > best[1] and cells.can_cut(slot, n):
                best = slot, n
        return best

    def slots_in(self, state: int) -> list[int]:
        return [slot for slot, now in enumerate(self.core.states()) if now == state]

    def prefill(self, chunk: int = 64) -> None:
        """Compute all prompts, in chunks."""
        while waiting := self.slots_in(abi.PREFILL):
            plan = []
            for slot in waiting:
                _, _, n_past, tokens, _ = self.core.slot_info(slot)
                plan.append((slot, min(chunk, len(tokens) - n_past)))
            self.core.run([], plan)
            self.check_law()
            self.collect()

    def step(self, n: int = 1) -> None:
        """``n`` decode steps of everything that decodes."""
        for _ in range(n):
            if decoding := self.slots_in(abi.DECODE):
                self.core.run(decoding, [], 1)
                self.check_law()
                self.collect()

    def finish_all(self, *, chunk: int = 64, retain: bool = False) -> None:
        """Run everything to its end and close the slots."""
        self.prefill(chunk)
        while decoding := self.slots_in(abi.DECODE):
            self.core.run(decoding, [])
            self.check_law()
            self.collect()
        for slot in self.slots_in(abi.DONE):
            self.core.close_slot(slot, retain=retain)
        self.collect()

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams = GREEDY, *, slot: int = 0, chunk: int = 64,
        retain: bool = False, **options: Any,
    ) -> Output:  # fmt: skip
        """One request from start to end, alone."""
        handle = self.open(prompt, params, slot=slot, **options)
        self.finish_all(chunk=chunk, retain=retain)
        return self.outputs[handle]

    def collect(self) -> None:
        """Read the ring and note the tokens of open slots."""
        for slot in range(self.core.n_slots):
            _, handle, _, tokens, _ = self.core.slot_info(slot)
            if handle in self.outputs:
                self.outputs[handle].tokens = tokens[len(self.outputs[handle].prompt) :]
                self.outputs[handle].slot = slot
        self.read_records(self.core.drain_records())

    def read_records(self, records: Iterable[tuple[Any, ...]]) -> None:
        for record in records:
            output = self.outputs[record[1]]
            assert not output.done, "a record came after the finish record"
            if record[0] == TEXT:
                output.deltas.append((record[2], record[3]))
            else:
                _, _, reason, output.stop_index, output.error, row = record
                output.reason = abi.FINISH_REASONS[reason]
                output.row = abi.Row.from_buffer_copy(row)

    def check_law(self) -> None:
        """The law of the KV bookkeeping (see _core/core/slots.h), and llama.cpp's own count."""
        for slot in range(self.core.n_slots):
            state, _, n_past, tokens, _ = self.core.slot_info(slot)
            if state == abi.DECODE:
                assert len(tokens) > n_past  # by more than one where a grammar forces tokens
            elif state == abi.RETAINED:
                assert len(tokens) == n_past > 0
            elif state == abi.FREE:
                assert n_past == 0 and tokens == []
            else:
                assert n_past <= len(tokens)
        assert self.core.audit() == []

    def used_cells(self) -> int:
        """Cells that hold something, by llama.cpp's own count; recurrent states count as one each."""
        truth = self.core.cells()
        return sum(truth["used"]) + sum(truth["window"]) + sum(owner >= 0 for owner in truth["recurrent"])
