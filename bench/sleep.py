"""How long a model takes to fall asleep and to wake, with KV in host memory or on disk, and what it holds meanwhile.

    python bench/sleep.py --rounds 5

Each line is a process of its own. Chats of 1,000 tokens are cached, then the model sleeps and wakes, and a request goes
on with one of them: the time from its arrival at the sleeping model to its first token is what a user waits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import common, models
from bench.common import progress

CHAT = 1000  # tokens
MIB = 1 << 20


def tokens_of(chat: int) -> list[int]:
    return [100 + (chat * 131 + k * 7) % 30000 for k in range(CHAT)]


def first_token_ms(engine: Any, prompt: list[int]) -> tuple[float, int]:
    """Ms to the first token, and prompt tokens that were cached."""
    from mullama.types import Request, SamplingParams

    begun = time.monotonic()
    generation = engine.submit_sync(Request("r", prompt, SamplingParams(temperature=0.0, max_tokens=1)))
    for _ in generation:
        pass
    return (time.monotonic() - begun) * 1e3, generation.finish.profile.kv_cache_hit


def measure(model: Path, level: str, n_chats: int, rounds: int, folder: str) -> dict[str, Any]:
    from mullama import Engine
    from mullama.config import ServeConfig
    from mullama.observe import process_memory as system

    config = ServeConfig(ctx_size=2048, parallel=4, kv_disk_dir=folder if level == "disk" else "")
    found: dict[str, list[float]] = {name: [] for name in ("fall", "wake", "first", "rss_awake", "rss_asleep")}
    with Engine.load(model, config=config) as engine:
        for chat in range(n_chats):
            first_token_ms(engine, tokens_of(chat))
        for i in range(rounds):
            found["rss_awake"].append(rss(system))
            begun = time.monotonic()
            engine.weights.sleep(level)
            found["fall"].append((time.monotonic() - begun) * 1e3)
            found["rss_asleep"].append(rss(system))
            begun = time.monotonic()
            found["wake"].append(engine.weights.wake())
            if n_chats:
                _, hit = first_token_ms(engine, [*tokens_of(i % n_chats), 5 + i])
                if hit < CHAT - 1:
                    raise SystemExit(f"only {hit} of {CHAT} tokens were found again")
            else:
                first_token_ms(engine, [100, 200, 300 + i])
            found["first"].append((time.monotonic() - begun) * 1e3)
    return found


def rss(system: Any) -> float:
    process = system.process_memory()
    return process.rss / MIB if process is not None else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--chats", type=int, nargs="+", default=[0, 1, 8], help="chats of 1,000 tokens that are cached")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="where to write the record; default: bench/results/")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # level: this process measures
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(models.model_file(args.model), args.one, args.chats[0], args.rounds, folder)))
        return 0
    results, rows = [], []
    for level in ("host", "disk"):
        for n_chats in args.chats:
            progress(f"{level}, {n_chats} chats")
            command = [sys.executable, __file__, "--one", level, "--chats", str(n_chats), "--model", args.model]
            done = subprocess.run([*command, "--rounds", str(args.rounds)], check=True, stdout=subprocess.PIPE)
            found = json.loads(done.stdout.splitlines()[-1])
            results.append({"level": level, "cached_tokens": n_chats * CHAT} | found)
            rows.append([level, n_chats * CHAT, *(statistics.median(values) for values in found.values())])
    header = [
        "level",
        "cached tokens",
        "fall asleep, ms",
        "wake, ms",
        "wake and first token, ms",
        "MiB awake",
        "MiB asleep",
    ]
    print(common.table(header, rows))
    common.write_record(common.record("sleep", vars(args), results), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
