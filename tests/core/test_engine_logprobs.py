"""Log-probabilities through the engine: with and without what is cached, under preemption, for any reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_support import greedy, sampled

from mullama._core import Model
from mullama._core.testing.gate import logits_of
from mullama.engine.engine import Engine
from mullama.types import Delta, Finish, Preempt, Request, SamplingParams, TokenScore

NEAR = 1e-4
PROMPT = list(b"the same prompt again and again, for the cache to know it " * 4)


def run(
    engine: Engine, params: SamplingParams, prompt: list[int] = PROMPT
) -> tuple[list[Delta], list[TokenScore], Finish]:
    generation = engine.submit_sync(Request("r", prompt, params))
    deltas = list(generation)
    assert generation.finish is not None
    return deltas, generation.prompt_logprobs, generation.finish


def expected(model: Model, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Log-probabilities behind each token, of llama.cpp called directly with the weights that the engine has."""
    rows = np.frombuffer(logits_of(model, tokens, 16), np.float32).reshape(len(tokens), -1).astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def test_a_prompt_is_scored_as_if_nothing_was_cached(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    _, cold, _ = run(engine, greedy(2, prompt_logprobs=1))
    run(engine, greedy(2))
    run(engine, greedy(2), [*PROMPT[:100], 65])
    _, warm, finish = run(engine, greedy(2, prompt_logprobs=1))
    assert finish.profile.kv_cache_hit == 0
    assert run(engine, greedy(2))[2].profile.kv_cache_hit == len(PROMPT) - 1, "what it computed is cached"
    rows = expected(engine.model, PROMPT)
    assert [one.token for one in cold] == [one.token for one in warm] == PROMPT[1:]
    for i, (one, other) in enumerate(zip(cold, warm, strict=True)):
        assert one.logprob == pytest.approx(rows[i][one.token], abs=NEAR)
        assert other.logprob == pytest.approx(one.logprob, abs=NEAR)
        assert one.top[0][0] == other.top[0][0] or one.top[0][2] == pytest.approx(rows[i][other.top[0][0]], abs=NEAR)


def test_tokens_come_with_their_texts(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    deltas, prompt, finish = run(engine, sampled(30, logprobs=2))
    assert prompt == [] and finish.profile.completion_tokens == 30
    assert all(len(delta.tokens) == delta.n_tokens for delta in deltas)
    assert all(len(one.top) == 2 and one.logprob is not None for delta in deltas for one in delta.tokens)

    async def on_a_loop() -> list[TokenScore]:
        generation = engine.submit(Request("r", PROMPT, sampled(30, logprobs=2)))
        await asyncio.sleep(0.05)  # they pile up
        return [one async for delta in generation for one in delta.tokens]

    found = asyncio.run(on_a_loop())
    assert [one.token for one in found] == [one.token for delta in deltas for one in delta.tokens]
    assert all(not delta.tokens for delta in run(engine, sampled(3))[0])


@pytest.mark.parametrize("how", [Preempt.SWAP, Preempt.RECOMPUTE])
def test_prompts_under_preemption(make_engine: Callable[..., Engine], how: Preempt) -> None:
    """Four slots' worth of prompts in a budget for less than two: they lose their slots again and again."""
    engine = make_engine(kv_tokens=400, batch_size=32, scheduler="round_robin")
    alone = run(engine, greedy(40, prompt_logprobs=2))[1]
    generations = [
        engine.submit_sync(Request(f"r{i}", [65 + i, *PROMPT], greedy(100, prompt_logprobs=2), preempt=how))
        for i in range(4)
    ]
    apart = make_engine()
    for i, generation in enumerate(generations):
        assert sum(delta.n_tokens for delta in generation) == 100
        assert [one.token for one in generation.prompt_logprobs] == PROMPT, "each of them once"
        for one, other in zip(
            generation.prompt_logprobs, run(apart, greedy(1, prompt_logprobs=2), [65 + i, *PROMPT])[1], strict=True
        ):
            assert one.logprob == pytest.approx(other.logprob, abs=NEAR)
    assert len(alone) == len(PROMPT) - 1
    assert engine.counters()["preemptions"] > 0


def test_nothing_is_generated(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    deltas, prompt, finish = run(engine, greedy(0, prompt_logprobs=0))
    assert "".join(delta.text for delta in deltas) == "" and not finish.profile.completion_tokens
    assert len(prompt) == len(PROMPT) - 1 and finish.reason == "length"
    assert run(engine, greedy(4))[2].profile.kv_cache_hit == len(PROMPT) - 1


def test_other_weights_meanwhile(make_engine: Callable[..., Engine], twin: Path) -> None:
    """Of the same shape: records go on, each token once."""
    engine = make_engine(batch_size=32)
    generations = [
        engine.submit_sync(Request("r", PROMPT * 2, greedy(8, prompt_logprobs=1, logprobs=1))) for _ in range(3)
    ]
    engine.weights.swap(twin)
    for generation in generations:
        deltas = list(generation)
        assert len(generation.prompt_logprobs) == 2 * len(PROMPT) - 1
        assert sum(len(delta.tokens) for delta in deltas) == 8


def test_the_token_that_ended_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    biased = {"logit_bias": ((66, 1000.0),)}
    assert run(engine, greedy(4, stop_token_ids=(66,), **biased))[2].stop_token == 66
    assert run(engine, greedy(4, **biased))[2].stop_token is None
