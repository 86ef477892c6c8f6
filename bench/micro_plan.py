"""What asking a policy costs: ``plan()`` of every built-in at 64 sequences, in µs.

    python -m bench.micro_plan

No model and no compiled code. Each row is one situation that an engine meets: who runs, who waits, how many slots are
free. The figure is the median of many calls on one core; the worst situation of each policy decides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from mullama.scheduling import EngineState, Scheduler, SeqView, create
from mullama.scheduling.registry import BUILTINS
from mullama.types import SeqState

N = 64
WANTED_US = 50.0
PARAMS: dict[str, dict[str, object]] = {"srpt": {"preempt": True}}  # the costlier way

Situation = Callable[[int], tuple[SeqState, int, int]]  # number of the sequence -> state, prompt left, generated


def running(slots: int, prompts: int = 0, preempted: int = 0) -> Situation:
    """``slots`` sequences run, the last ``prompts`` of them on their prompt; of the rest ``preempted`` have run."""

    def situation(i: int) -> tuple[SeqState, int, int]:
        if i < slots - prompts:
            return SeqState.DECODE, 0, 1 + 3 * i
        if i < slots:
            return SeqState.PREFILL, 100, 0
        if i < slots + preempted:
            return SeqState.PREEMPTED, 0, 5
        return SeqState.WAITING, 100, 0

    return situation


#: name: who runs and waits, free slots
SITUATIONS: dict[str, tuple[Situation, int]] = {
    "64 decode": (running(64), 0),
    "8 decode, 56 wait, full": (running(8), 0),
    "7 decode, 57 wait, 1 free": (running(7), 1),
    "4 decode, 4 prompts, 56 wait": (running(8, prompts=4), 0),
    "6 decode, 4 preempted, 54 wait, 2 free": (running(6, preempted=4), 2),
    "32 decode, 32 wait, full": (running(32), 0),
    "24 decode, 8 prompts, 32 wait, full": (running(32, prompts=8), 0),
    "60 decode, 4 wait, 4 free": (running(60), 4),
    "64 wait, 64 free": (running(0), 64),
}


def filled(name: str, situation: Situation) -> Scheduler:
    """A policy with 64 sequences: many users, priorities and deadlines in turn; the later ones are the more urgent."""
    policy = create(name, PARAMS.get(name))
    for i in range(N):
        state, left, generated = situation(i)
        seq = SeqView(
            id=i + 1,
            state=state,
            prompt_tokens=100,
            prefill_left=left,
            max_tokens=100 + 37 * i % 200,
            arrival_ns=1_000_000 * i,
            generated=generated,
            priority=(N - i) // 8,
            user=f"user {i % 7}",
            slo_ms=100.0 * (i % 5) or None,
            cells=generated,
            state_ns=1_000_000 * i,
        )
        policy.add(seq)
    return policy


def cost_us(policy: Scheduler, free_slots: int, calls: int) -> float:
    """Median time of one call."""
    plan = policy.plan
    times = []
    for step in range(calls):
        now = EngineState(10**9 + step, step, free_slots, max_prefill=512, n_slots=N)
        start = time.perf_counter_ns()
        plan(now)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2000, help="calls a figure (default: 2000)")
    calls = parser.parse_args().calls
    width = max(map(len, SITUATIONS))
    print(f"{'plan() in µs, 64 sequences':<{width}}", *(f"{name:>11}" for name in BUILTINS))
    worst = dict.fromkeys(BUILTINS, 0.0)
    for label, (situation, free_slots) in SITUATIONS.items():
        row = {name: cost_us(filled(name, situation), free_slots, calls) for name in BUILTINS}
        worst = {name: max(worst[name], us) for name, us in row.items()}
        print(f"{label:<{width}}", *(f"{us:>11.1f}" for us in row.values()))
    print(f"{'worst':<{width}}", *(f"{us:>11.1f}" for us in worst.values()))
    slow = [name for name, us in worst.items() if us > WANTED_US]
    print(f"above {WANTED_US:g} µs: {', '.join(slow)}" if slow else f"all within {WANTED_US:g} µs")
    return bool(slow)


if __name__ == "__main__":
    raise SystemExit(main())
