"""The engine's measurements against a small engine made of arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench import offline
from mullama.types import Delta, Finish, FinishReason, Profile, Request

STEP_NS = 10_000_000
DECODE_NS = 9_800_000


class FakeGeneration:
    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.made = self.read = 0
        self.finish: Finish | None = None

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while self.read == self.made:
            if self.finish is not None:
                raise StopIteration
            self.engine.step()
        n, self.read = self.made - self.read, self.made  # merged, as the contract says
        return Delta("x" * n, n)


class FakeEngine:
    """One step gives every running sequence a token and takes 10 ms, or 20 while there is a hole among them."""

    def __init__(self) -> None:
        self.running: list[FakeGeneration] = []
        self.prompts: list[tuple[int, ...]] = []
        keys = ("heartbeat_ns", "decode_ns", "sample_ns", "steps", "ubatches", "split_ubatches", "sampled_tokens")
        self._counters = dict.fromkeys(keys, 0)

    def tokenize(self, text: str) -> list[int]:
        return [hash(piece) & 0xFFFF for piece in text.replace(".", " .").split()]

    def submit_sync(self, request: Request) -> FakeGeneration:
        generation = FakeGeneration(self, request)
        self.running.append(generation)
        self.prompts.append(tuple(request.prompt))
        return generation

    def step(self) -> None:
        alive = [g.finish is None for g in self.running]
        last = max(i for i, a in enumerate(alive) if a)
        passes = 1 if all(alive[: last + 1]) or len(self.running) < 8 else 2
        for generation in self.running:
            if generation.finish is None:
                generation.made += 1
                self._counters["sampled_tokens"] += 1
                if generation.made == generation.request.sampling.max_tokens:
                    n = len(generation.request.prompt)
                    profile = Profile(prompt_tokens=n, kv_cache_miss=n, prefill_ms=2.0 * n)
                    generation.finish = Finish(FinishReason.LENGTH, profile)
        self._counters["heartbeat_ns"] += passes * STEP_NS
        self._counters["decode_ns"] += passes * DECODE_NS
        self._counters["sample_ns"] += 100_000
        self._counters["steps"] += 1
        self._counters["ubatches"] += passes
        self._counters["split_ubatches"] += passes - 1
        if all(g.finish is not None for g in self.running):
            self.running = []

    def counters(self) -> dict[str, int]:
        return dict(self._counters)


def test_prefill_is_computed_tokens_over_the_decodes_that_held_them() -> None:
    assert offline.Offline(FakeEngine(), 1).prefill(140)["tok_s"] == pytest.approx(500)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_decode_counts_whole_steps_of_all_sequences(n: int) -> None:
    figures = offline.Offline(FakeEngine(), 1).decode(n, 128)
    assert figures["tok_s"] == pytest.approx(100 * n)
    assert figures["decode_share"] == pytest.approx(0.98)
    assert figures["step_ms"] == pytest.approx(10)
    assert figures["ubatches_per_step"] == 1


def test_a_hole_is_measured_after_the_third_sequence_ended() -> None:
    figures = offline.Offline(FakeEngine(), 1).decode(8, 128, early=offline.MARGIN)
    assert figures["tok_s"] == pytest.approx(350)  # seven tokens in 20 ms
    assert figures["ubatches_per_step"] == 2


def test_all_measurements_make_a_report() -> None:
    engine: Any = FakeEngine()
    args = offline.parse_args(["--rounds", "2", "--tokens", "128", "--prefill", "64", "--sequences", "1,8"])
    results = offline.measure(engine, args)
    assert results["hole-cost"]["ratio"] == pytest.approx(2.0)
    assert results["decode-8"]["tok_s"]["n"] == 2
    text = offline.report(results)
    assert "decode-8" in text
    assert "costs × 2" in text
    assert len(set(engine.prompts)) == len(engine.prompts)  # no prompt returned


def test_a_failed_request_is_not_a_figure() -> None:
    generation = FakeGeneration(FakeEngine(), Request("r", [1]))
    generation.finish = Finish(FinishReason.ERROR, Profile(), error=ValueError("nan"))
    with pytest.raises(RuntimeError, match="nan"):
        offline._drain(generation)


def test_too_short_a_window_is_refused() -> None:
    with pytest.raises(SystemExit):
        offline.parse_args(["--tokens", "32"])
