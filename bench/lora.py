"""What LoRA adapters cost: tokens a second of eight sequences on one set of adapters, on several, and on none.

    python bench/lora.py --rounds 5

The adapters are random, of rank 8 on the four matrices of attention (tests/adapters.py); the sets take turns in each
round, so that a noisy machine is noisy for all. Prompts are short and shared by nobody.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from bench import common, models
from bench.common import progress

N_ADAPTERS, RANK, PARALLEL = 8, 8, 8
TARGETS = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")

#: Which adapter each sequence has; -1: none.
CASES = {
    "8 without": [-1] * 8,
    "8 on one": [0] * 8,
    "4 without, 4 on one": [-1] * 4 + [0] * 4,
    "8 on two": [0] * 4 + [1] * 4,
    "8 on two, mixed": [i % 2 for i in range(8)],
    "8 on four": [i // 2 for i in range(8)],
    "8 on eight": list(range(8)),
    "1 without": [-1],
    "1 on one": [0],
}


def rate(engine: Any, adapters: Sequence[int], max_tokens: int) -> float:
    """Tokens a second of sequences that begin together, each with its adapter."""
    from mullama.types import LoraUse, Request, SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    generations = [
        engine.submit_sync(
            Request(
                f"r{i}",
                engine.tokenize(f"The {i}th history of the world is"),
                sampling,
                lora=() if which < 0 else (LoraUse(f"a{which}"),),
                cache_salt=str(time.monotonic_ns()),
            )
        )
        for i, which in enumerate(adapters)
    ]
    threads = [threading.Thread(target=lambda one=one: [None for _ in one]) for one in generations]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(adapters) * max_tokens / (time.monotonic() - begun)


def measure(model: Path, rounds: int, max_tokens: int, folder: Path) -> dict[str, Any]:
    import adapters

    from mullama import Engine
    from mullama.config import ServeConfig

    found: dict[str, list[float]] = {name: [] for name in CASES}
    loads = []
    with Engine.load(model, config=ServeConfig(ctx_size=1024, parallel=PARALLEL, kv_host_bytes=0)) as engine:
        for n in range(N_ADAPTERS):
            file = adapters.build(folder / f"{n}.gguf", model, rank=RANK, seed=n, size=0.1, targets=TARGETS)
            begun = time.monotonic()
            size = engine.load_adapter(file, f"a{n}")["size_bytes"]
            loads.append((time.monotonic() - begun) * 1e3)
        rate(engine, CASES["8 on eight"], max_tokens)
        for i in range(rounds):
            for name, which in CASES.items():
                found[name].append(rate(engine, which, max_tokens))
            progress(f"round {i + 1} of {rounds}")
    return {"tok_s": found, "load_ms": loads, "adapter_bytes": size}


def report(result: dict[str, Any]) -> str:
    rates = result["tok_s"]
    rows = []
    for name, values in rates.items():
        base = rates["1 without" if name.startswith("1") else "8 without"]
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        rows.append([name, statistics.median(values), statistics.median(ratios), min(ratios), max(ratios)])
    header = ["sequences", "tokens a second", "of those without", "least", "most"]
    return (
        f"{common.table(header, rows)}\n(adapters of {result['adapter_bytes'] / 1e6:.1f} MB; loading one, checked in a "
        f"process of its own, {statistics.median(result['load_ms']):.0f} ms)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--json", metavar="FILE", help="where to write the record; default: bench/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(models.model_file(args.model), args.rounds, args.max_tokens, Path(folder))
    print(report(result))
    common.write_record(common.record("lora", vars(args), result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
