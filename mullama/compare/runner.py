"""Policies in turn on one engine: interleaved rounds of the identical workload, each from the same state.

Rounds are interleaved, and every round begins with another policy, so that a machine that slows down or warms up does
so for all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mullama.compare.play import Progress, play
from mullama.engine.client import EngineClient
from mullama.errors import ConfigError
from mullama.types import ModelInfo
from mullama.workload.base import Outcome, TraceRequest, Workload
from mullama.workload.grammar import split
from mullama.workload.prompts import Prompts

WORDS = 1 << 15  # ordinary tokens that prompts are made of, at most
_WARM_UP = (32, 8)  # tokens of prompt and of output


@dataclass(slots=True, frozen=True)
class PolicySpec:
    """A policy to compare. ``label`` names it in reports; ``params`` are texts, which the policy itself checks."""

    label: str
    spec: str  # what the engine is told: a name, or FILE.py:CLASS
    params: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Run:
    """One round of one policy, complete."""

    policy: str  # its label
    round: int  # from 1
    outcomes: list[Outcome]
    params: dict[str, Any]  # in force, defaults included
    fallback: str | None  # why fcfs took over
    late_ms: float
    exhausted: int
    neighbours: float = 0.0  # cores that other processes kept busy meanwhile
    seed: int = 0  # of its workload


def parse_policies(schedulers: str, args: Sequence[str] = ()) -> list[PolicySpec]:
    """``fcfs,srpt,fcfs(prefill_budget=64)``, and ``POLICY.PARAM=VALUE`` for all entries of that policy.

    Raises ConfigError.
    """
    entries: list[tuple[str, str, dict[str, str]]] = []
    for text in split(schedulers):
        spec, params = text, {}
        if text.endswith(")") and "(" in text:
            spec, _, inner = text[:-1].partition("(")
            params = dict(_param(part, text) for part in split(inner))
        if not spec:
            raise ConfigError(
                "--schedulers: an empty name; it takes names with commas between them", param="schedulers"
            )
        entries.append((text, spec, params))
    for arg in args:
        name, equals, value = arg.partition("=")
        spec, dot, param = name.rpartition(".")
        if not equals or not dot:
            raise ConfigError(f"--scheduler-arg: '{arg}' is not POLICY.PARAM=VALUE", param="scheduler_arg")
        owners = [params for _, owner, params in entries if owner == spec]
        if not owners:
            known = ", ".join(dict.fromkeys(owner for _, owner, _ in entries))
            raise ConfigError(f"--scheduler-arg: '{spec}' is not compared; there are {known}", param="scheduler_arg")
        for params in owners:
            params.setdefault(param, value)  # what is said of one entry holds over what is said of all
    labels = [label for label, _, _ in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--schedulers: {label} is there twice", param="schedulers")
    return [PolicySpec(*entry) for entry in entries]


def _param(text: str, where: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--schedulers: {where}: '{text}' is not PARAM=VALUE", param="schedulers")
    return name.strip(), value.strip()


def check_fit(workload: Workload, info: ModelInfo) -> None:
    """Raise ConfigError when a request could never run."""
    index, tokens = workload.longest()
    if tokens > info.n_ctx:
        raise ConfigError(
            f"request {index} of the workload needs {tokens} tokens, one may use {info.n_ctx}: raise --ctx-size "
            "or shorten the requests (length_scale, max_prompt and max_out of a trace; max of a distribution)",
            param="ctx_size",
        )


def ordinary_tokens(engine: EngineClient) -> list[int]:
    """Token ids that stand for words: letters only, so neither control tokens nor parts of characters."""
    words: list[int] = []
    for token in range(engine.info.n_vocab):
        if engine.detokenize([token]).strip().isalpha():
            words.append(token)
            if len(words) == WORDS:
                break
    return words


async def compare(
    engine: EngineClient,
    policies: Sequence[PolicySpec],
    workload: Workload,
    prompts: Prompts,
    *,
    rounds: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str, float, float], None] = lambda step, done, total: None,
    busy: Callable[[], float] = lambda: 0.0,
) -> list[Run]:
    """``compare_seeds`` of one workload."""
    played = [(workload, prompts)]
    return await compare_seeds(engine, policies, played, rounds=rounds, clock=clock, progress=progress, busy=busy)


async def compare_seeds(
    engine: EngineClient,
    policies: Sequence[PolicySpec],
    workloads: Sequence[tuple[Workload, Prompts]],
    *,
    rounds: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str, float, float], None] = lambda step, done, total: None,
    busy: Callable[[], float] = lambda: 0.0,
) -> list[Run]:
    """Play each workload ``rounds`` times with each policy. Cancelled, it returns the runs that were complete.

    ``busy``: cores that other processes kept busy since it was asked last.

    Raises InvalidRequest for an unknown policy or parameter before anything is played, ConfigError when a request does
    not fit the engine, and EngineDead.
    """
    for workload, _ in workloads:
        check_fit(workload, engine.info)
    runs: list[Run] = []
    try:
        for policy in policies:
            await engine.planning.aset_policy(policy.spec, policy.params)
        turns = [(number, one) for number in range(rounds) for one in workloads]
        for turn, (number, (workload, prompts)) in enumerate(turns):
            first = turn % len(policies)
            for policy in (*policies[first:], *policies[:first]):
                seed = f"seed {workload.seed}, " if len(workloads) > 1 else ""
                tell = _stepper(progress, f"{policy.label}, {seed}round {number + 1} of {rounds}")
                runs.append(await _run(engine, policy, number + 1, workload, prompts, clock, tell, busy))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
    return runs


def _stepper(progress: Callable[[str, float, float], None], step: str) -> Progress:
    return lambda done, total: progress(step, done, total)


async def _run(
    engine: EngineClient,
    policy: PolicySpec,
    number: int,
    workload: Workload,
    prompts: Prompts,
    clock: Callable[[], float],
    progress: Progress,
    busy: Callable[[], float],
) -> Run:
    """One run from the state that all begin with: nothing running, nothing retained, the machine warm."""
    answer = await engine.planning.aset_policy(policy.spec, policy.params)
    await play(engine, _warm_up(engine.info, workload), prompts, clock=clock)
    await engine.kv.adrop(tiers=("device", "host"))
    busy()
    played = await play(engine, workload, prompts, clock=clock, progress=progress)
    fallback = engine.planning.snapshot().get("fallback")
    return Run(
        policy=policy.label,
        round=number,
        outcomes=played.outcomes,
        params=dict(answer.get("params") or {}),
        fallback=str(fallback["reason"]) if fallback else None,
        late_ms=played.late_s * 1e3,
        exhausted=played.exhausted,
        neighbours=busy(),
        seed=workload.seed,
    )


def _warm_up(info: ModelInfo, workload: Workload) -> Workload:
    """One short request a slot. Indices are those of the workload, whose prompts it drops again."""
    prompt, out = _WARM_UP
    request = TraceRequest(0.0, min(prompt, info.n_ctx - 2), min(out, max(info.n_ctx - prompt, 1)))
    return Workload(requests=(request,) * info.n_parallel)
