"""Every policy through random lives of an engine: arrivals, ends, cancels, KV pressure, swaps between policies."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_support import EVER, Job, TinyEngine

import mullama.scheduling
from mullama.scheduling import Costs, Plan, create
from mullama.scheduling.registry import BUILTINS

POLICIES = sorted(BUILTINS)
STEPS = 100_000  # a time slice may give one token, after a prompt of 120 has been computed again in as many steps

jobs = st.lists(
    st.builds(
        Job,
        at=st.integers(0, 60),
        prompt=st.integers(1, 80),
        output=st.integers(1, 40),
        priority=st.integers(-2, 5),
        user=st.sampled_from([None, "a", "b", "c"]),
        slo_ms=st.sampled_from([None, 1.0, 200.0, 5000.0]),
        limit=st.integers(0, 100),
        cancel_after=st.none() | st.none() | st.integers(0, 40),
    ),
    min_size=1,
    max_size=14,
)
common = {
    "prefill_budget": st.sampled_from([1, 7, 40, 512]),
    "max_running": st.sampled_from([0, 1, 3]),
    "chunk": st.sampled_from([0, 1, 16]),
}
own = {
    "fcfs": {},
    "round_robin": {"quantum_tokens": st.sampled_from([0, 1, 5]), "quantum_ms": st.sampled_from([0, 1, 75])},
    "priority": {"ageing_s": st.sampled_from([0, 0.05, 10])},
    "preemptive": {
        "ageing_s": st.sampled_from([0, 0.05, 10]),
        "min_run_ms": st.sampled_from([0, 20, 500]),
        "max_preemptions": st.integers(0, 3),
        "method": st.sampled_from(["auto", "swap", "recompute"]),
    },
    "fair": {
        "preempt_after_tokens": st.sampled_from([0, 1, 16]),
        "weight_input": st.sampled_from([0, 1]),
        "weight_output": st.sampled_from([0, 2.5]),
    },
    "srpt": {
        "predictor": st.sampled_from(["mean", "max_tokens"]),
        "preempt": st.booleans(),
        "preempt_ratio": st.sampled_from([1, 2]),
    },
    "deadline": {"default_slo_ms": st.sampled_from([0, 300]), "max_late_s": st.sampled_from([0, 0.2, 10])},
}
choices = st.sampled_from(POLICIES).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries({}, optional={**common, **own[name]}))
)
engines = st.fixed_dictionaries(
    {
        "n_slots": st.integers(1, 5),
        "max_prefill": st.sampled_from([1, 32, 512]),
        "kv_tokens": st.sampled_from([EVER, EVER, 150, 300]),
        "step_ns": st.sampled_from([100_000, 10_000_000]),
        "costs": st.sampled_from([Costs(), Costs(50_000.0, 10_000_000.0, 1000.0)]),
    }
)
swaps = st.dictionaries(st.integers(0, 100), choices, max_size=6)

Choice = tuple[str, dict[str, Any]]


def live(choice: Choice, machine: dict[str, Any], work: list[Job], turns: dict[int, Choice]) -> TinyEngine:
    engine = TinyEngine(create(*choice), **machine)

    def turn(step: int) -> None:
        if step in turns:
            engine.swap(create(*turns[step]))

    engine.run(STEPS, work, turn)
    return engine


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(choices, engines, jobs, swaps)
def test_a_whole_life(choice: Choice, machine: dict[str, Any], work: list[Job], turns: dict[int, Choice]) -> None:
    """Every plan can be carried out and keeps its promises; everybody who is not cancelled is answered in full."""
    engine = live(choice, machine, work, turns)
    assert len(engine.served) == len(work)
    for seq_id, served in engine.served.items():
        assert served.end is not None, "somebody starved"
        assert served.cancelled or served.tokens == engine.jobs[seq_id].output


@settings(max_examples=40, deadline=None)
@given(choices, engines, jobs, swaps)
def test_the_same_history_gives_the_same_plans(
    choice: Choice, machine: dict[str, Any], work: list[Job], turns: dict[int, Choice]
) -> None:
    def plans() -> list[tuple[int, list[tuple[int, int]], Plan]]:
        return [(step, list(plan.tokens.items()), plan) for step, plan in live(choice, machine, work, turns).log]

    assert plans() == plans()


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=30, deadline=None)
@given(work=jobs, machine=engines)
def test_steady_decoding_asks_nobody(name: str, work: list[Job], machine: dict[str, Any]) -> None:
    """Once all that came are decoding, plans are asked for only when one ends."""
    engine = TinyEngine(create(name), **{**machine, "n_slots": len(work), "kv_tokens": EVER})
    for job in work:
        engine.arrive(Job(0, job.prompt, job.output + 30))
    while any(view.prefill_left for view in engine.views.values()):
        engine.one_step()
    engine.one_step()
    asked, left = len(engine.log), len(engine.views)
    while engine.views:
        engine.one_step()
    assert len(engine.log) - asked <= left


# -- nobody starves --------------------------------------------------------------------------------------------


def stream(n: int, **more: Any) -> list[Job]:
    """Two requests of 6 steps each every 6 steps, on 2 slots: somebody waits all the time."""
    return [Job(at=1 + 3 * i, prompt=5, output=6, **more) for i in range(n)]


@pytest.mark.parametrize(
    ("name", "params", "bound"),
    [
        # ageing_s = 0.1 makes a difference of 5 worth 0.5 s, which is 50 steps
        ("priority", {"ageing_s": 0.1}, 80),
        ("preemptive", {"ageing_s": 0.1}, 110),
        ("deadline", {"default_slo_ms": 50, "max_late_s": 0.5}, 80),
        ("round_robin", {"quantum_tokens": 3}, 40),
        ("fair", {}, 30),
        ("fcfs", {}, 30),
    ],
)
def test_a_permanent_stream_starves_nobody(name: str, params: dict[str, Any], bound: int) -> None:
    """One request that the policy likes least, among a stream of better ones that needs all the slots."""
    engine = TinyEngine(create(name, params), n_slots=2)
    late = engine.arrive(Job(0, 5, 6, priority=5, user="late", slo_ms=0.0))
    # more than two slots can take
    flood = [*stream(200, user="flood", slo_ms=1e6), *stream(100, user="flood", slo_ms=1e6)]
    engine.run(500, flood)
    end = engine.served[late].end
    assert end is not None and end <= bound


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["priority", "preemptive"]),
    st.fixed_dictionaries(
        {"ageing_s": st.sampled_from([0.05, 0.3, 10.0]), "max_lead_s": st.sampled_from([0.0, 0.5, 2.0])}
    ),
    st.sampled_from([20, 500]),
    st.integers(1, 4),
    jobs,
)
def test_whoever_is_next_waits_for_no_more_than_what_runs(
    name: str, params: dict[str, Any], min_run_ms: int, n_slots: int, work: list[Job]
) -> None:
    """The bound: once all whose rank is lower have ended, a request ends after what may still run, and itself.

    By induction over ranks nobody waits for ever, and who has a lower rank came at most ``lag`` later: with these two
    overload (many are before me) and starvation (those behind me go on) are told apart.
    """
    more = {"min_run_ms": min_run_ms} if name == "preemptive" else {}
    policy = create(name, {**params, **more})
    engine = TinyEngine(policy, n_slots=n_slots)
    engine.run(STEPS, [dataclasses.replace(job, cancel_after=None) for job in work])
    views = {seq_id: (engine.arrivals[seq_id], job) for seq_id, job in engine.jobs.items()}
    lag = policy.lag_ns  # type: ignore[attr-defined]
    rank = {seq_id: (lag(job.priority) + at, at, seq_id) for seq_id, (at, job) in views.items()}
    longest = max(job.prompt + job.output for job in work)
    for seq_id, served in engine.served.items():
        before = [engine.served[one].end for one in rank if rank[one] < rank[seq_id]]
        assert served.end is not None and None not in before
        clear = max([served.arrival, *(end for end in before if end is not None)])
        # Those that run to their end, preempted and computed again at most once more, then the request itself.
        assert served.end - clear <= 2 * (n_slots + 1) * longest + min_run_ms // 10 + 2


def test_no_priority_counts_for_ever() -> None:
    """A client that claims the highest urgency there is, over and over, holds nobody up for longer than the lead."""
    for name in ("priority", "preemptive"):
        engine = TinyEngine(create(name, {"max_lead_s": 0.5}), n_slots=2)
        late = engine.arrive(Job(0, 5, 6, priority=1 << 30))
        flood = [Job(at=1 + 3 * i, prompt=5, output=6, priority=-(1 << 30)) for i in range(300)]
        engine.run(900, [*flood, *flood])
        end = engine.served[late].end
        assert end is not None and end <= 230, name  # 100 steps of lead, and what came meanwhile on half the slots


@pytest.mark.parametrize(("name", "params"), [("priority", {"ageing_s": 0}), ("preemptive", {"ageing_s": 0})])
def test_without_ageing_the_stream_does_starve(name: str, params: dict[str, Any]) -> None:
    """The stream above is one that a bound is needed for."""
    engine = TinyEngine(create(name, params), n_slots=2)
    engine.run(1, stream(1))
    late = engine.arrive(Job(0, 5, 6, priority=5))
    engine.run(250, [*stream(200), *stream(200)])
    assert engine.served[late].end is None


# -- sans-I/O -----------------------------------------------------------------------------------------------------

FORBIDDEN = {"time", "datetime", "threading", "asyncio", "random", "socket", "logging", "queue", "concurrent", "os"}


def test_policies_import_no_clock_thread_or_loop() -> None:
    folder = Path(mullama.scheduling.__file__ or "").parent
    files = sorted(folder.glob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in FORBIDDEN, f"{file.name} imports {name}"
                allowed = tuple(
                    f"mullama.{name}" for name in ("scheduling", "types", "errors", "files", "logs", "plugins", "home")
                )
                assert not name.startswith("mullama") or name.startswith(allowed), f"{file.name} imports {name}"
