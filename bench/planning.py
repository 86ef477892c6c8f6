"""What planning costs the engine: a built-in policy, and the same policy as a user's, in pure Python on a thread.

    python bench/planning.py --model smollm2:135m

Eight closed-loop clients keep the engine busy; the share is the counter ``plan_ns`` over ``busy_ns`` (abi.h).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file; last on the path, so that the installed mullama is measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import common, models
from bench.common import progress
from bench.prompts import PromptMaker

#: fcfs in the words of a user: no class of mullama's but the plan.
USER_POLICY = """
from mullama.scheduling import Plan

class Mine:
    name = "mine"

    def __init__(self):
        self.seqs = {}

    def add(self, seq):
        self.seqs[seq.id] = seq

    def remove(self, seq_id):
        del self.seqs[seq_id]

    def plan(self, state):
        tokens = {seq.id: 1 for seq in self.seqs.values() if seq.state == "decode"}
        budget, free = state.max_prefill, state.free_slots
        for seq in self.seqs.values():
            if seq.state == "waiting" and free > 0:
                free -= 1
            elif seq.state != "prefill":
                continue
            n = min(seq.prefill_left, budget)
            if n == 0:
                break
            tokens[seq.id] = n
            budget -= n
        return Plan(tokens)
"""


def load(engine: Any, prompts: PromptMaker, *, clients: int, requests: int, n_prompt: int, n_out: int) -> None:
    """``clients`` threads, each sending its next request when the last is answered."""
    from mullama.types import Request, SamplingParams

    work = [engine.tokenize(prompts.make(n_prompt)) for _ in range(clients * requests)]
    sampling = SamplingParams(temperature=0.0, max_tokens=n_out, ignore_eos=True)

    def client(index: int) -> None:
        for i in range(requests):
            name = f"c{index}-{i}"
            for _ in engine.submit_sync(Request(name, work[index * requests + i], sampling)):
                pass

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(engine: Any, prompts: PromptMaker, spec: str, args: argparse.Namespace) -> dict[str, float]:
    engine.planning.set_policy(spec)
    load(engine, prompts, clients=args.clients, requests=1, n_prompt=16, n_out=4)  # the policy is warm
    before = engine.counters()
    load(engine, prompts, clients=args.clients, requests=args.requests, n_prompt=args.prompt, n_out=args.tokens)
    after = engine.counters()
    delta = {key: after[key] - before[key] for key in after}
    snapshot = engine.planning.snapshot()
    if snapshot["fallback"] is not None:
        raise SystemExit(f"{spec} was replaced: {snapshot['fallback']['reason']}")
    return {
        "plan_share": delta["plan_ns"] / delta["busy_ns"],
        "plan_us": delta["plan_ns"] / delta["plans"] / 1e3,
        "plans_per_step": delta["plans"] / delta["steps"],
        "tok_s": delta["sampled_tokens"] / (delta["heartbeat_ns"] / 1e9),
        "gil_share": delta["gil_wait_ns"] / delta["busy_ns"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from mullama import Engine
    from mullama.config import ServeConfig

    try:
        path = models.model_file(args.model)
    except models.NoModel as error:
        print(error, file=sys.stderr)
        return 1
    rounds: dict[str, list[dict[str, float]]] = {}
    config = ServeConfig(ctx_size=2048, parallel=args.clients)
    with tempfile.TemporaryDirectory() as folder, Engine.load(str(path), name="bench", config=config) as engine:
        mine = Path(folder) / "mine.py"
        mine.write_text(USER_POLICY, encoding="utf-8")
        prompts = PromptMaker(args.seed, lambda text: len(engine.tokenize(text)))
        for number in range(args.rounds):
            for name, spec in (("fcfs, built in", "fcfs"), ("a user's, on its thread", f"{mine}:Mine")):
                progress(f"round {number + 1}: {name}")
                rounds.setdefault(name, []).append(measure(engine, prompts, spec, args))
    results = {name: common.median_by_key(rows) for name, rows in rounds.items()}
    keys = list(rounds["fcfs, built in"][0])
    print(
        common.table(
            ["policy", *keys], [[name, *(row[key]["median"] for key in keys)] for name, row in results.items()]
        )
    )
    common.write_record(common.record("planning", vars(args), results), args.json)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.planning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=models.DEFAULT_MODEL, help="GGUF file or a reference in mullama's store")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=3, help="of each client, in each round")
    parser.add_argument("--prompt", type=int, default=140, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the prompts; never repeat one by chance")
    parser.add_argument("--json", default=None, help="where to write the record; default: bench/results/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
