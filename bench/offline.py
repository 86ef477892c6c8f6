"""The engine without HTTP: prefill and decode rates, the share of time inside llama_decode, the cost of a hole.

    python bench/offline.py --model FILE

Every rate comes from the engine's own counters (abi.h), read twice: ``heartbeat_ns`` moves when a step ends, so the
difference of two readings is the wall time of whole steps and ``decode_ns`` over it is exact.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import common, models
from bench.common import progress
from bench.prompts import PromptMaker

DECODE_PROMPT = 16  # tokens: decoding is measured at short contexts, as llama-bench does
MARGIN = 8  # tokens kept clear of the measured window at both ends


@dataclass(frozen=True)
class Window:
    """What the engine did between two readings of its counters."""

    wall_s: float
    decode_s: float
    sample_s: float
    steps: int
    ubatches: int
    split_ubatches: int
    tokens: int

    @classmethod
    def between(cls, before: dict[str, int], after: dict[str, int]) -> Window:
        delta = {key: after[key] - before[key] for key in before}
        return cls(
            wall_s=delta["heartbeat_ns"] / 1e9,
            decode_s=delta["decode_ns"] / 1e9,
            sample_s=delta["sample_ns"] / 1e9,
            steps=delta["steps"],
            ubatches=delta["ubatches"],
            split_ubatches=delta["split_ubatches"],
            tokens=delta["sampled_tokens"],
        )

    def figures(self) -> dict[str, float]:
        nan = float("nan")
        return {
            "tok_s": self.tokens / self.wall_s if self.wall_s else nan,
            "decode_share": self.decode_s / self.wall_s if self.wall_s else nan,
            "sample_share": self.sample_s / self.wall_s if self.wall_s else nan,
            "step_ms": self.wall_s * 1e3 / self.steps if self.steps else nan,
            "ubatches_per_step": self.ubatches / self.steps if self.steps else nan,
            "split_ubatches": float(self.split_ubatches),
        }


class Offline:
    """The measurements, each returning a flat dict of figures."""

    def __init__(self, engine: Any, seed: int) -> None:
        self.engine = engine
        self._prompts = PromptMaker(seed, lambda text: len(engine.tokenize(text)))
        self._n_requests = 0

    def _submit(self, n_prompt: int, max_tokens: int) -> Any:
        from mullama.types import Request, SamplingParams

        self._n_requests += 1
        tokens = self.engine.tokenize(self._prompts.make(n_prompt))
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return self.engine.submit_sync(Request(f"bench-{self._n_requests}", tokens, sampling))

    def prefill(self, n_prompt: int) -> dict[str, float]:
        """One prompt on an idle engine; computed tokens over the wall time of its decodes."""
        generation = self._submit(n_prompt, 1)
        _drain(generation)
        profile = generation.finish.profile
        return {"tok_s": profile.kv_cache_miss / (profile.prefill_ms / 1e3), "queue_ms": profile.queue_ms}

    def decode(self, n_sequences: int, n_tokens: int, *, early: int | None = None) -> dict[str, float]:
        """``n_sequences`` decode side by side; figures of the steps in which all of them did.

        ``early``: the third sequence (index 2) stops after so many tokens, and the figures are of the time after.
        """
        limits = [n_tokens] * n_sequences
        if early is not None:
            limits[2] = early
        running = [self._submit(DECODE_PROMPT, limit) for limit in limits]
        for generation in running:
            next(iter(generation))  # all have left their prefill
        if early is not None:
            _drain(running[2])
        lead = running[-1]  # the last to start is the last to end, so the others may end a few tokens earlier
        _read(lead, MARGIN)
        before = self.engine.counters()
        first_done = n_tokens - MARGIN - 4 * n_sequences - (early or 0)
        _read(lead, max(first_done, MARGIN))
        after = self.engine.counters()
        for generation in running:
            _drain(generation)
        return Window.between(before, after).figures()


def _read(generation: Any, n_tokens: int) -> None:
    """Read deltas until at least ``n_tokens`` more tokens came or it ended."""
    got = 0
    while got < n_tokens:
        delta = next(generation, None)
        if delta is None:
            return
        got += delta.n_tokens


def _drain(generation: Any) -> None:
    for _ in generation:
        pass
    finish = generation.finish
    if finish is None or finish.error is not None:
        raise RuntimeError(f"a request failed: {finish and finish.error}")


def measure(engine: Any, args: argparse.Namespace) -> dict[str, Any]:
    bench = Offline(engine, args.seed)
    progress("warm-up")
    bench.decode(min(2, args.parallel), 64)
    results: dict[str, Any] = {}

    def repeat(name: str, *makers: tuple[str, Any]) -> None:
        """Repeat several measurements interleaved, so that a slow spell meets all of them."""
        rows: dict[str, list[dict[str, float]]] = {label: [] for label, _ in makers}
        for i in range(args.rounds):
            for label, make in makers:
                rows[label].append(make())
                progress(f"{name} {label} {i + 1}/{args.rounds}: {common.number(rows[label][-1]['tok_s'])} t/s")
        for label, row in rows.items():
            results[f"{name}{label}"] = common.median_by_key(row)

    for n_prompt in args.prefill:
        repeat("prefill-", (str(n_prompt), lambda n=n_prompt: bench.prefill(n)))
    for n in args.sequences:
        if n <= args.parallel:
            repeat("decode-", (str(n), lambda n=n: bench.decode(n, args.tokens)))
    if args.parallel >= 8:
        repeat(
            "hole-",
            ("seven-with-hole", lambda: bench.decode(8, args.tokens, early=MARGIN)),
            ("seven-from-start", lambda: bench.decode(7, args.tokens)),
        )
        results["hole-cost"] = {
            "ratio": common.ratio(
                results["hole-seven-from-start"]["tok_s"]["median"], results["hole-seven-with-hole"]["tok_s"]["median"]
            )
        }
    return results


def load_engine(args: argparse.Namespace) -> Any:
    from mullama import Engine
    from mullama.config import ServeConfig

    path = models.model_file(args.model)
    progress(f"loading {path}")
    config = ServeConfig(ctx_size=args.ctx, parallel=args.parallel, threads=args.threads)
    return Engine.load(str(path), name="bench", config=config)


def report(results: dict[str, Any]) -> str:
    def cell(name: str, key: str) -> Any:
        return results[name].get(key, {}).get("median")

    keys = ("tok_s", "decode_share", "sample_share", "step_ms", "ubatches_per_step", "split_ubatches")
    rows = [[name, *(cell(name, key) for key in keys)] for name in results if name != "hole-cost"]
    text = common.table(
        ["measurement", "t/s", "in llama_decode", "sampling", "step ms", "ubatches/step", "split"], rows
    )
    if "hole-cost" in results:
        text += f"\n\nA hole in the running sequences costs × {common.number(results['hole-cost']['ratio'])}"
    return text


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.offline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=models.DEFAULT_MODEL, help="GGUF file or a reference in mullama's store")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens a sequence may use")
    parser.add_argument("--parallel", type=int, default=8, help="sequences that run at once")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    parser.add_argument("--prefill", type=_numbers, default=[512], help="prompt lengths, such as 140,512")
    parser.add_argument("--sequences", type=_numbers, default=[1, 2, 4, 8], help="sequences side by side")
    parser.add_argument("--tokens", type=int, default=256, help="tokens each sequence generates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the prompts; never repeat one by chance")
    parser.add_argument("--json", default=None, help="where to write the record; default: bench/results/")
    args = parser.parse_args(argv)
    if args.tokens < 128:
        parser.error("--tokens must be at least 128, or the measured window is too short")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        engine = load_engine(args)
    except models.NoModel as error:
        print(error, file=sys.stderr)
        return 1
    try:
        results = measure(engine, args)
    except KeyboardInterrupt:
        return 130
    finally:
        engine.close()
    print(report(results))
    common.write_record(common.record("offline", vars(args), results), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
