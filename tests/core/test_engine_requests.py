"""Requests through the engine thread: what is refused, what comes back, and that the figures add up."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_support import greedy

from mullama import abi
from mullama.engine.engine import Engine
from mullama.engine.requests.generation import BaseGeneration
from mullama.errors import ComputeFailed, ContextLengthExceeded, InvalidRequest, QueueFull
from mullama.types import Finish, FinishReason, Request, SamplingParams


def request(prompt: list[int] | bytes | str, params: SamplingParams | None = None) -> Request:
    tokens = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
    return Request("r", tokens, params or greedy(16))


def finish_of(generation: BaseGeneration) -> Finish:
    assert generation.finish is not None
    return generation.finish


def complete(engine: Engine, prompt: str, params: SamplingParams | None = None) -> tuple[str, Finish]:
    """One request, read by this thread."""
    generation = engine.submit_sync(request(prompt, params))
    text = "".join(delta.text for delta in generation)
    return text, finish_of(generation)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([], greedy(1), InvalidRequest, "prompt"),
        ([65] * 512, greedy(1), ContextLengthExceeded, "prompt"),
        ([-1], greedy(1), InvalidRequest, "prompt"),
        ([1 << 20], greedy(1), InvalidRequest, "prompt"),
        ([65], greedy(1, temperature=-1.0), InvalidRequest, "temperature"),
        ([65], greedy(1, stop=("",)), InvalidRequest, "stop"),
    ],
)
def test_what_is_refused_at_once(
    make_engine: Callable[..., Engine], prompt: list[int], params: SamplingParams, error: type[Exception], param: str
) -> None:
    engine = make_engine()
    with pytest.raises(error) as refused:
        engine.submit_sync(request(prompt, params))
    assert refused.value.param == param  # type: ignore[attr-defined]
    assert complete(engine, "HELLO")[1].reason is FinishReason.LENGTH


def test_a_prompt_that_ends_within_a_character(make_engine: Callable[..., Engine]) -> None:
    """The tiny model's tokens are bytes: a list of ids may end anywhere."""
    engine = make_engine()
    begun = "caf\xe9".encode()[:-1]
    rest, other = ("\xe9".encode()[1], ord("s"))
    assert engine.detokenize(list(begun), only_whole=True) == "caf"
    assert engine.detokenize(list(begun)) == "caf\ufffd"
    for token, shown in ((rest, "\xe9"), (other, "s")):
        params = greedy(1, logit_bias=((token, 1000.0),))
        text = "".join(delta.text for delta in engine.submit_sync(request(begun, params)))
        assert engine.detokenize(list(begun), only_whole=True) + text == f"caf{shown}"


def test_a_bias_of_no_token_is_refused_and_nothing_else(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        complete(engine, "HELLO", greedy(4, logit_bias=((1 << 20, 1.0),)))
    assert complete(engine, "HELLO")[1].reason is FinishReason.LENGTH


@pytest.mark.parametrize("max_tokens", [None, 10_000])
def test_max_tokens_is_cut_to_what_fits(make_engine: Callable[..., Engine], max_tokens: int | None) -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    _, finish = complete(engine, "A" * 500, params)
    assert finish.reason is FinishReason.LENGTH
    assert finish.profile.completion_tokens == engine.info.n_ctx - 500


def test_the_queue_has_a_limit(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=1, max_queue=2)
    gate = threading.Event()
    engine.call(gate.wait)
    waiting = [engine.submit_sync(request("HELLO")) for _ in range(3)]  # one has a slot
    with pytest.raises(QueueFull) as refused:
        engine.submit_sync(request("HELLO"))
    assert refused.value.retry_after is not None and refused.value.retry_after >= 1
    gate.set()
    for generation in waiting:
        list(generation)
        assert finish_of(generation).reason is FinishReason.LENGTH
    assert complete(engine, "HELLO")[1].reason is FinishReason.LENGTH


def test_a_prefix_is_reused_and_changes_nothing(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    first, cold = complete(engine, "A PROMPT OF SOME LENGTH")
    second, warm = complete(engine, "A PROMPT OF SOME LENGTH")
    assert first == second
    assert (cold.profile.kv_cache_hit, cold.profile.kv_cache_miss) == (0, 23)
    assert (warm.profile.kv_cache_hit, warm.profile.kv_cache_miss) == (22, 1)


def test_an_eviction_is_told_to_whom_it_served(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parallel=1)
    complete(engine, "AAAAAAAAAA", greedy(6))
    _, finish = complete(engine, "ZZZZ")
    assert finish.profile.kv_cache_evict == 10 + 6 - 1, "the last token was never computed"


def test_logits_that_are_not_finite_fail_that_request_only(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    expected = complete(engine, "THE NEIGHBOUR", greedy(60))[0]
    gate = threading.Event()
    engine.call(gate.wait)
    generations = [engine.submit_sync(request(prompt, greedy(60))) for prompt in ("THE NEIGHBOUR", "THE VICTIM")]
    engine.call(lambda: engine._core.inject_nan(1))
    gate.set()
    texts = ["".join(delta.text for delta in generation) for generation in generations]
    finishes = [finish_of(generation) for generation in generations]
    failed = [finish for finish in finishes if finish.reason is FinishReason.ERROR]
    assert len(failed) == 1 and isinstance(failed[0].error, ComputeFailed)
    if finishes[0].reason is FinishReason.LENGTH:
        assert texts[0] == expected


def test_holes_are_closed(make_engine: Callable[..., Engine]) -> None:
    """After the second of four has finished, the others decode as one ubatch again."""
    engine = make_engine(ctx_size=4096)

    async def go() -> None:
        lengths = [3500, 20, 3500, 3500]
        prompts = ["ONE", "TWO", "THREE", "FOUR"]
        generations = [engine.submit(request(p, greedy(n))) for p, n in zip(prompts, lengths, strict=True)]
        async for _ in generations[1]:
            pass
        slots: list[int] = []
        while slots != [0, 1, 2]:
            running = engine.planning.snapshot()["running"]
            assert len(running) >= 3, "the long ones ended before the hole was closed"
            slots = sorted(item["slot"] for item in running)
            await asyncio.sleep(0)
        before = engine.counters()
        while engine.counters()["steps"] < before["steps"] + 100:
            await asyncio.sleep(0)
        assert engine.counters()["split_ubatches"] == before["split_ubatches"]
        for generation in generations:
            generation.cancel()
            async for _ in generation:
                pass

    asyncio.run(go())


def test_both_kinds_of_readers_at_once(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    expected = complete(engine, "HELLO", greedy(100))[0]

    async def read() -> str:
        return "".join([delta.text async for delta in engine.submit(request("HELLO", greedy(100)))])

    async def go() -> list[str]:
        apart = [asyncio.to_thread(lambda: complete(engine, "HELLO", greedy(100))[0]) for _ in range(3)]
        return list(await asyncio.gather(*[read() for _ in range(3)], *apart))

    assert set(asyncio.run(go())) == {expected}


def test_two_engines_in_one_process(make_engine: Callable[..., Engine], tiny_model: Callable[..., Path]) -> None:
    engines = [make_engine(), make_engine(tiny_model("gemma3"))]
    apart = [complete(engine, "HELLO", greedy(50))[0] for engine in engines]
    generations = [engine.submit_sync(request("HELLO", greedy(50))) for engine in engines for _ in range(2)]
    texts = ["".join(delta.text for delta in generation) for generation in generations]
    assert texts == [apart[0], apart[0], apart[1], apart[1]]


def test_the_page_is_read_from_its_file(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    reader = abi.Reader.attach(engine.page_path())
    complete(engine, "HELLO")
    engine.call(lambda: None).result(10)
    assert reader.counters().finished_length == 1
    assert abi.as_dict(reader.counters())["opened"] == engine.counters()["opened"] == 1


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "lfm2"])
def test_two_hundred_requests_a_third_cancelled(
    make_engine: Callable[..., Engine], tiny_model: Callable[..., Path], arch: str
) -> None:
    """Seeded. Prompts are shorter than 64 tokens, where texts are the same however the work was batched."""
    engine = make_engine(tiny_model(arch))
    rng = random.Random(11)
    starts = ["SHARED BEGINNING ", "ANOTHER ONE ", ""]
    prompts = [rng.choice(starts) + "".join(rng.choices("ABCXYZ", k=rng.randint(1, 30))) for _ in range(200)]
    lengths = [rng.randint(1, 24) for _ in prompts]
    cancels = [rng.randint(0, 12) if rng.random() < 1 / 3 else None for _ in prompts]

    async def one(number: int) -> tuple[str, int, Finish]:
        generation = engine.submit(request(prompts[number], greedy(lengths[number])))
        limit, n, text = cancels[number], 0, ""
        if limit == 0:
            generation.cancel()
        async for delta in generation:
            n, text = n + delta.n_tokens, text + delta.text
            if limit is not None and n >= limit:
                generation.cancel()
        return text, n, finish_of(generation)

    async def go() -> tuple[list[tuple[str, int, Finish]], dict[str, Any], int, dict[str, Any]]:
        results = await asyncio.gather(*[one(number) for number in range(len(prompts))])
        before = await engine.kv.asnapshot()
        freed = (await engine.kv.adrop())["cells_freed"]
        return list(results), before, freed, await engine.kv.asnapshot()

    results, before, freed, after = asyncio.run(go())
    for number, (_, n, finish) in enumerate(results):
        profile = finish.profile
        assert finish.reason in (FinishReason.LENGTH, FinishReason.CANCELLED)
        assert cancels[number] is not None or finish.reason is FinishReason.LENGTH
        assert profile.prompt_tokens == len(prompts[number])
        assert profile.completion_tokens == n <= lengths[number]
        if profile.steps:
            assert profile.kv_cache_hit + profile.kv_cache_miss == profile.prompt_tokens
    # Every used cell belongs to a listed retained slot; dropping those leaves none.
    assert before["audit"] == after["audit"] == []
    assert {slot["state"] for slot in before["slots"]} <= {"free", "retained"}
    assert before["cells_used"] == before["cells_retained"] == freed
    assert after["cells_used"] == 0 and {slot["state"] for slot in after["slots"]} == {"free"}
    assert after["slots"] and all(not slot["window_cells"] for slot in after["slots"])
    # The counters say the same as the profiles.
    counters = engine.counters()
    assert counters["running"] == counters["waiting"] == counters["failed"] == 0
    assert counters["opened"] == counters["finished_length"] + counters["cancelled"]
    assert counters["sampled_tokens"] == sum(n for _, n, _ in results)
    assert counters["kv_hit_tokens"] == sum(finish.profile.kv_cache_hit for _, _, finish in results)
    assert counters["kv_miss_tokens"] == sum(finish.profile.kv_cache_miss for _, _, finish in results)
    # And nobody's text was touched by the others.
    for number in range(0, len(prompts), 9):
        if results[number][2].reason is FinishReason.LENGTH:
            assert complete(engine, prompts[number], greedy(lengths[number]))[0] == results[number][0]
