"""Whether the memory figures add up: the share that nobody accounts for, and the estimate beside what loading takes.

    python bench/memory.py --model smollm2:135m gemma3:270m --ctx 2048 8192

Each model at each size is loaded in a process of its own and answers rounds of four prompts that share nothing, so that
KV fills up and goes to host memory. Then a random LoRA adapter is loaded (tests/adapters.py), and in the end it sleeps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mullama import Engine
from mullama.config import ServeConfig
from mullama.models.files.estimate import estimate
from mullama.observe import process_memory

PARALLEL = 4
WORDS = 80
MIB = 1 << 20


def share(engine: Engine) -> tuple[float, int, dict[str, Any]]:
    """Unaccounted bytes as a share of the process's real use, that use, and the engine's report."""
    report, process = engine.memory_report_sync(), process_memory.process_memory()
    if process is None:
        raise SystemExit("this system does not say what a process takes")
    libraries = process.file - report["weights"]["mapped_bytes"]
    total = report["resident_bytes"] + libraries + process_memory.baseline()
    return (process.rss - total) / process.rss, process.rss, report


def measure(model: str, n_ctx: int, rounds: int) -> dict[str, Any]:
    engine = Engine.load(model, config=ServeConfig(ctx_size=n_ctx, parallel=PARALLEL))
    with engine:
        first, rss, report = share(engine)
        allocated = sum(report[part]["allocated_bytes"] for part in ("weights", "kv", "compute", "output"))
        expected = estimate(engine.info.path, n_ctx=n_ctx, n_parallel=PARALLEL).total
        shares = [first]
        for turn in range(rounds):
            texts = [" ".join(f"{turn} {i} {k} word" for k in range(WORDS)) for i in range(PARALLEL)]
            streams = [engine.stream(text, max_tokens=32, ignore_eos=True) for text in texts]
            for stream in streams:
                next(stream)
            shares.append(share(engine)[0])
            for stream in streams:
                for _ in stream:
                    pass
            shares.append(share(engine)[0])
        _, rss_end, report = share(engine)
        with_adapter = share_with_adapter(engine)
        engine.weights.sleep()
        asleep, rss_asleep, _ = share(engine)
    return {
        "model": model, "n_ctx": n_ctx, "estimate": expected, "allocated": allocated, "rss": rss, "rss_end": rss_end,
        "kv_resident": report["kv"]["resident_bytes"], "kv_used": report["kv"]["used_bytes"],
        "first": first, "worst": max(shares, key=abs),
        "with_adapter": with_adapter, "asleep": asleep, "rss_asleep": rss_asleep,
    }  # fmt: skip


def share_with_adapter(engine: Engine) -> float:
    """The share with an adapter of rank 16 loaded, and used by a request."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    import adapters

    from mullama.types import LoraUse, Request, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        engine.load_adapter(adapters.build(Path(folder) / "a.gguf", Path(engine.info.path), rank=16), "a")
    for _ in engine.submit_sync(Request("r", [5, 6, 7], SamplingParams(max_tokens=8), lora=(LoraUse("a"),))):
        pass
    found = share(engine)[0]
    engine.unload_adapter("a")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2:135m", "gemma3:270m"])
    parser.add_argument("--ctx", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # this process measures
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.model[0], args.ctx[0], args.rounds)))
        return 0
    print("| model | context | estimate | allocated | off by | in memory, loaded → after | KV resident / used "
          "| unaccounted, loaded | at worst | with an adapter | asleep |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for model in args.model:
        for n_ctx in args.ctx:
            command = [sys.executable, __file__, "--one", "--rounds", str(args.rounds), "--model", model]
            done = subprocess.run([*command, "--ctx", str(n_ctx)], check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {model} | 4 × {n_ctx:,} | {row['estimate'] / MIB:.1f} MiB | {row['allocated'] / MIB:.1f} MiB "
                f"| {row['estimate'] / row['allocated'] - 1:+.2%} "
                f"| {row['rss'] / MIB:.0f} → {row['rss_end'] / MIB:.0f} MiB "
                f"| {row['kv_resident'] / MIB:.1f} / {row['kv_used'] / MIB:.1f} MiB "
                f"| {row['first']:.1%} | {row['worst']:.1%} | {row['with_adapter']:.1%} "
                f"| {row['asleep']:.1%} of {row['rss_asleep'] / MIB:.0f} MiB |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
