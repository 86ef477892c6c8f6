"""What the prefix index costs: finding, holding and releasing a prompt among thousands of cached stretches, and memory.

    python -m bench.micro_index

No model and no compiled code. The index is filled as chats fill it: system prompts of various lengths, shared by
conversations of several turns, each turn a stretch for the question and one for the answer. Every timed prompt is
another one, so that holding it cuts what it must cut; KV is stood for by its size. *match* includes packing the tokens;
*all* is what the engine does for a request: pack, match, hold, and note which stretches served.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import common
from bench.common import progress
from bench.kv_trace import BOUNDLESS, Rows
from mullama.kv.eviction import registry
from mullama.kv.index.tree import PrefixTree, pack
from mullama.kv.tiers.host_tier import HostTier

VOCABULARY = 49152
WANTED_US = 300.0
SYSTEMS = 24  # system prompts
DEEP_CHATS = 5  # chats of very many short turns
SLOT = 0
TOKEN_BYTES = 23040


class Chats:
    """Conversations of at most ``n_tokens`` under a few system prompts, seeded."""

    def __init__(self, seed: int, n_tokens: int) -> None:
        self.rng = random.Random(seed)
        self.systems = [self.text(self.rng.randint(n_tokens // 80, n_tokens * 3 // 8)) for _ in range(SYSTEMS)]

    def text(self, n_tokens: int) -> list[int]:
        return self.rng.choices(range(VOCABULARY), k=n_tokens)

    def turns(self, limit: int, most: int, question: tuple[int, int], answer: tuple[int, int]) -> list[list[int]]:
        """The whole text after each question and each answer, ``most`` of them, up to ``limit`` tokens."""
        whole = self.rng.choice(self.systems)
        found: list[list[int]] = []
        while len(found) < most:
            whole = whole + self.text(self.rng.randint(*(answer if len(found) % 2 else question)))
            if len(whole) > limit:
                break
            found.append(whole)
        return found


def fill(tree: PrefixTree, chats: Chats, n_entries: int, n_tokens: int, n_prompts: int) -> dict[str, list[list[int]]]:
    """Fill the index with ``n_entries`` stretches; returns the kinds of prompt, ``n_prompts`` of ``n_tokens`` each."""
    long: list[list[int]] = []
    short: list[list[int]] = []  # of many short turns
    now_ns = 0
    while tree.n_nodes < n_entries or not long:
        is_short = len(short) < DEEP_CHATS
        if is_short:
            turns = chats.turns(n_tokens - 1, n_tokens, (8, 12), (8, 12))
        else:
            turns = chats.turns(n_tokens - 1, chats.rng.randint(2, 40), (20, 300), (50, 400))
        for text in turns:
            now_ns += 1000
            for node in tree.insert(b"", pack(text), now_ns).path():
                node.host = node.host or Rows(node.n_tokens, TOKEN_BYTES)
        if turns and len(turns[-1]) > n_tokens * 0.8:
            (short if is_short else long).append(turns[-1])

    def cut(text: list[int]) -> list[int]:
        """A prompt that has the beginning of a text, and goes on in its own way."""
        kept = text[: chats.rng.randint(len(text) * 9 // 10, len(text))]
        return kept + chats.text(n_tokens - len(kept))

    kinds: dict[str, Callable[[], list[int]]] = {
        "a chat goes on": lambda: cut(chats.rng.choice(long)),
        "a chat of 10-token turns": lambda: cut(chats.rng.choice(short)),
        "system prompt only": lambda: cut(chats.rng.choice(chats.systems)),
        "nothing cached": lambda: chats.text(n_tokens),
    }
    return {name: [make() for _ in range(n_prompts)] for name, make in kinds.items()}


def time_us(call: Callable[[list[int]], object], prompts: Sequence[list[int]]) -> list[float]:
    times = []
    for prompt in prompts:
        start = time.perf_counter_ns()
        call(prompt)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return times


def timings(tree: PrefixTree, prompts: Sequence[list[int]]) -> dict[str, float]:
    """µs of what a request costs here, whole and in parts, and what the prompts were like."""
    matches = [tree.match(b"", pack(prompt)) for prompt in prompts]
    tier = HostTier(tree, BOUNDLESS, registry.create("lru"))
    whole_us, hold_us = [], []
    for prompt in prompts:
        begin = time.perf_counter_ns()
        key = pack(prompt)
        reuse = tree.match(b"", key).n_host
        middle = time.perf_counter_ns()
        end = tree.hold(SLOT, b"", key, 1)
        held = time.perf_counter_ns()
        tier.touch([node for node in end.path() if node.start < reuse], 1)
        whole_us.append((time.perf_counter_ns() - begin) / 1e3)
        hold_us.append((held - middle) / 1e3)
        tree.release(SLOT)
    match_us = time_us(lambda prompt: tree.match(b"", pack(prompt)), prompts)
    pack_us = time_us(pack, prompts)
    return {
        "cached": sum(match.n_host for match in matches) / len(matches),
        "stretches": sum(len(match.nodes) for match in matches) / len(matches),
        "pack p50": common.percentile(pack_us, 50),
        "match p50": common.percentile(match_us, 50),
        "match p99": common.percentile(match_us, 99),
        "hold p50": common.percentile(hold_us, 50),
        "hold p99": common.percentile(hold_us, 99),
        "all p50": common.percentile(whole_us, 50),
        "all p99": common.percentile(whole_us, 99),
    }


def memory(seed: int, n_entries: int, n_tokens: int) -> dict[str, float]:
    """Bytes of a filled index by tracemalloc, KV's stand-ins included."""
    chats = Chats(seed, n_tokens)
    gc.collect()
    tracemalloc.start()
    tree = PrefixTree()
    fill(tree, chats, n_entries, n_tokens, 0)
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    tokens = sum(node.n_tokens for node in tree.nodes())
    return {
        "entries": tree.n_nodes,
        "tokens": tokens,
        "MiB": used / (1 << 20),
        "bytes an entry": used / tree.n_nodes,
        "of it tokens": 4 * tokens / tree.n_nodes,
        "share of its KV, %": 100 * used / (tokens * TOKEN_BYTES),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    progress("filling, with memory traced")
    used = memory(args.seed, args.entries, args.tokens)
    progress("filling")
    tree = PrefixTree()
    kinds = fill(tree, Chats(args.seed, args.tokens), args.entries, args.tokens, args.prompts)
    gc.collect()
    rows = {name: timings(tree, prompts) for name, prompts in kinds.items()}
    columns = list(next(iter(rows.values())))
    print(common.table([f"{args.tokens} tokens, µs", *columns], [[name, *row.values()] for name, row in rows.items()]))
    print()
    print(common.table(["index", *used], [["memory", *used.values()]]))
    common.write_record(common.record("micro_index", vars(args), {"timings": rows, "memory": used}), args.json)
    worst = max(row["all p99"] for row in rows.values())
    print(f"\nall of a request, worst 99th percentile: {worst:.0f} µs ({WANTED_US:g} wanted)")
    return int(worst > WANTED_US)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.micro_index", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--entries", type=int, default=10_000, help="cached stretches (default: 10000)")
    parser.add_argument("--tokens", type=int, default=4000, help="of a prompt (default: 4000)")
    parser.add_argument("--prompts", type=int, default=500, help="of each kind (default: 500)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", default=None, help="where to write the record; default: bench/results/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
