"""Comparing: the order of runs, equal conditions, what is refused, and what is kept when it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cli_support import model_info
from compare_support import TimedEngine, run_virtually

from mullama.compare.runner import PolicySpec, Run, check_fit, compare, ordinary_tokens, parse_policies
from mullama.errors import ConfigError, InvalidRequest
from mullama.types import Request
from mullama.workload.base import TraceRequest, Workload
from mullama.workload.metrics import measure
from mullama.workload.prompts import Prompts
from mullama.workload.spec import parse_workload

WORKLOAD = Workload(requests=tuple(TraceRequest(i * 0.5, 20 + i, 4) for i in range(4)))


def compared(engine: TimedEngine, names: str, workload: Workload = WORKLOAD, **options: Any) -> list[Run]:
    async def main(clock: Callable[[], float]) -> list[Run]:
        prompts = Prompts(ordinary_tokens(engine))
        return await compare(engine, parse_policies(names), workload, prompts, clock=clock, **options)

    return run_virtually(main)


def test_rounds_are_interleaved_and_begin_with_another_policy() -> None:
    steps: list[str] = []
    runs = compared(
        TimedEngine(), "fcfs,priority", rounds=3, progress=lambda step, done, total: steps.append(f"{step} {done:g}")
    )
    order = [(run.policy, run.round) for run in runs]
    assert order == [("fcfs", 1), ("priority", 1), ("priority", 2), ("fcfs", 2), ("fcfs", 3), ("priority", 3)]
    assert steps[3] == "fcfs, round 1 of 3 4"
    assert len(steps) == 24


def test_every_run_begins_from_the_same_state() -> None:
    engine = TimedEngine(parallel=2)
    compared(engine, "fcfs,priority(budget=9)")
    marks = [entry for entry in engine.log if not isinstance(entry, Request)]
    assert marks == [
        ("scheduler", "fcfs", {}),  # both are tried before anything is played
        ("scheduler", "priority", {"budget": "9"}),
        ("scheduler", "fcfs", {}),
        "drop",
        ("scheduler", "priority", {"budget": "9"}),
        "drop",
    ]
    first, second = (i for i, entry in enumerate(engine.log) if entry == "drop")
    warm_up = engine.log[3:first]
    assert len(warm_up) == 2  # one a slot
    assert [r.prompt for r in engine.log[first + 1 : first + 5]] == [r.prompt for r in engine.log[second + 1 :]]


def test_runs_carry_what_happened() -> None:
    runs = compared(TimedEngine(), "fcfs,broken")
    assert [run.fallback for run in runs] == [None, "it raised"]
    assert [run.params for run in runs] == [{"budget": 512}] * 2
    assert [len(run.outcomes) for run in runs] == [4, 4]


def test_priorities_make_a_difference_that_shows() -> None:
    spec = "closed:clients=6,seconds=30,prompt=20,out=10,every=uniform(0.5,1),urgent_prompt=5,urgent_out=1"
    runs = compared(TimedEngine(parallel=2, step_s=0.02), "fcfs,priority", parse_workload(spec))
    fcfs, priority = (measure(run.outcomes, stop_s=30.0) for run in runs)
    assert fcfs.groups["urgent"].requests == priority.groups["urgent"].requests
    fast, slow = priority.groups["urgent"].ttft_ms.p50, fcfs.groups["urgent"].ttft_ms.p50
    assert fast is not None
    assert slow is not None
    assert fast < 0.5 * slow
    assert priority.groups["batch"].tokens_per_s > 0.9 * fcfs.groups["batch"].tokens_per_s


def test_an_unknown_policy_is_refused_before_anything_is_played() -> None:
    engine = TimedEngine()
    with pytest.raises(InvalidRequest, match="no policy 'nosuch'; there are fcfs"):
        compared(engine, "fcfs,nosuch")
    assert engine.generations == []


def test_requests_that_can_never_run_are_refused() -> None:
    engine = TimedEngine(ctx=25)
    with pytest.raises(ConfigError, match=r"request 3 .* needs 27 tokens, one may use 25.*--ctx-size"):
        compared(engine, "fcfs")
    assert engine.log == []
    check_fit(WORKLOAD, replace(model_info(), n_ctx=27))


def test_cancelled_it_keeps_what_was_complete() -> None:
    engine = TimedEngine()

    async def main(clock: Callable[[], float]) -> list[Run]:
        prompts = Prompts(ordinary_tokens(engine))
        task = asyncio.create_task(compare(engine, parse_policies("fcfs,priority"), WORKLOAD, prompts, clock=clock))
        while sum(entry == "drop" for entry in engine.log) < 2:
            await asyncio.sleep(0.1)
        task.cancel()
        return await task

    (run,) = run_virtually(main)
    assert run.policy == "fcfs"
    assert len(run.outcomes) == 4
    assert engine.generations[-1].is_cancelled


def test_prompts_are_made_of_words() -> None:
    engine = TimedEngine()
    tokens = ordinary_tokens(engine)
    assert tokens == list(range(1, 400, 2))
    assert "word" in engine.detokenize(tokens[:1])


# -- the names on the command line -------------------------------------------------------------------------


def test_policies_and_their_parameters() -> None:
    args = ["fcfs.prefill_budget=256", "./mine.py:Policy.gain=1.5", "fcfs.other=a=b"]
    assert parse_policies("fcfs, fcfs(prefill_budget=64), ./mine.py:Policy", args) == [
        PolicySpec("fcfs", "fcfs", {"prefill_budget": "256", "other": "a=b"}),
        PolicySpec("fcfs(prefill_budget=64)", "fcfs", {"prefill_budget": "64", "other": "a=b"}),
        PolicySpec("./mine.py:Policy", "./mine.py:Policy", {"gain": "1.5"}),
    ]


@pytest.mark.parametrize(
    ("schedulers", "args", "words"),
    [
        ("", (), "empty name"),
        ("fcfs,,srpt", (), "empty name"),
        ("fcfs,fcfs", (), "fcfs is there twice"),
        ("fcfs(64)", (), "'64' is not PARAM=VALUE"),
        ("fcfs", ("budget=3",), "'budget=3' is not POLICY.PARAM=VALUE"),
        ("fcfs", ("fcfs.budget",), "'fcfs.budget' is not POLICY.PARAM=VALUE"),
        ("fcfs,fair", ("srpt.x=1",), "'srpt' is not compared; there are fcfs, fair"),
    ],
)
def test_wrong_names(schedulers: str, args: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policies(schedulers, args)
    assert words in caught.value.message
