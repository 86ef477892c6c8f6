"""The loop computes what a recomputation from scratch computes, however the work was cut and batched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
from core_support import Driver, Output, greedy, sampled

from mullama import abi
from mullama._core import Model

PROMPTS = [
    "HELLO",
    "The quick brown fox jumps over the lazy dog and then",
    "x",
    "12345 67890 " * 8,
    "a longer prompt " * 10 + "ends here",
    "{[()]}",
    "ZZZZZZZZZZZZZZZ",
    "why is the sky so very blue?",
]
ARCHS = ["llama", "gemma3", "mamba", "lfm2"]


def alone(driver: Driver, prompt: str, n: int = 24) -> Output:
    return driver.generate(prompt, greedy(n))


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_equals_recomputation_token_by_token(
    make_core: Callable[..., Driver], models: Callable[..., Model], arch: str
) -> None:
    """Each token is what a fresh slot chooses first for the prompt and all tokens before it."""
    driver = make_core(models(arch))
    for prompt in PROMPTS[:4]:
        output = alone(driver, prompt, 20)
        for n in range(len(output.tokens)):
            again = driver.generate(output.prompt + output.tokens[:n], greedy(1), slot=n % 4)
            assert again.tokens == output.tokens[n : n + 1], f"token {n} of {prompt!r}"


@pytest.mark.parametrize("arch", ARCHS)
def test_the_tiny_models_look_at_their_context(
    make_core: Callable[..., Driver], models: Callable[..., Model], arch: str
) -> None:
    """What the other tests rely on: a changed first token changes what comes, also much later."""
    driver = make_core(models(arch))
    texts = {driver.generate(first + " and so on and on", greedy(20)).text for first in "ABCDEFGH"}
    assert len(texts) > 4


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_equals_whole(
    make_core: Callable[..., Driver], models: Callable[..., Model], arch: str, chunk: int
) -> None:
    driver = make_core(models(arch), n_batch=256)
    for prompt in PROMPTS:
        whole = driver.generate(prompt, greedy(16), chunk=256)
        cut = driver.generate(prompt, greedy(16), chunk=chunk)
        assert cut.tokens == whole.tokens
        assert whole.facts.ubatches == 16, "one for the prompt, one a token after the first"
        assert cut.facts.ubatches == 15 + -(-len(cut.prompt) // chunk)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("params", [greedy, sampled], ids=["greedy", "sampled"])
def test_eight_at_once_equal_alone(
    make_core: Callable[..., Driver], models: Callable[..., Model], arch: str, params: Callable[..., object]
) -> None:
    driver = make_core(models(arch), n_slots=8)
    apart = [driver.generate(prompt, params(24)).tokens for prompt in PROMPTS]
    handles = [driver.open(prompt, params(24), slot=slot) for slot, prompt in enumerate(PROMPTS)]
    driver.finish_all()
    assert [driver.outputs[handle].tokens for handle in handles] == apart
    assert driver.used_cells() == 0


def test_mixed_arrivals_equal_alone(make_core: Callable[..., Driver], model: Model) -> None:
    """Prompts that come while others decode, in chunks beside them, as the engine does it."""
    driver = make_core(model, n_slots=4)
    apart = [alone(driver, prompt, 30).tokens for prompt in PROMPTS]
    todo = list(enumerate(PROMPTS))
    handles: dict[int, int] = {}
    while todo or driver.slots_in(abi.PREFILL) or driver.slots_in(abi.DECODE):
        free = driver.slots_in(abi.FREE)
        if todo and free:
            number, prompt = todo.pop(0)
            handles[number] = driver.open(prompt, greedy(30), slot=free[0])
        chunks = []
        for slot in driver.slots_in(abi.PREFILL):
            _, _, n_past, tokens, _ = driver.core.slot_info(slot)
            chunks.append((slot, min(9, len(tokens) - n_past)))
        driver.core.run(driver.slots_in(abi.DECODE), chunks, 3)
        driver.check_law()
        driver.collect()
        for slot in driver.slots_in(abi.DONE):
            driver.core.close_slot(slot, retain=False)
    assert [driver.outputs[handles[number]].tokens for number in range(len(PROMPTS))] == apart


def test_holes_cost_ubatches_not_results(make_core: Callable[..., Driver], model: Model) -> None:
    driver = make_core(model, n_slots=6)
    apart = [alone(driver, prompt).tokens for prompt in PROMPTS[:3]]
    for slot, prompt in zip((0, 2, 5), PROMPTS[:3], strict=True):
        driver.open(prompt, greedy(24), slot=slot)
    before = driver.core.counters_dict()
    driver.finish_all()
    after = driver.core.counters_dict()
    assert [output.tokens for output in list(driver.outputs.values())[-3:]] == apart
    assert after["split_ubatches"] - before["split_ubatches"] == 2 * 23
    assert after["decode_tokens"] - before["decode_tokens"] == 3 * 23


def test_threads_do_not_change_results(make_core: Callable[..., Driver], model: Model) -> None:
    one, two = make_core(model), make_core(model, n_threads=2, threads_fixed=True)
    for prompt in PROMPTS:
        assert alone(one, prompt).tokens == alone(two, prompt).tokens


def test_the_governors_trials_and_aborts_do_not_change_results(make_core: Callable[..., Driver], model: Model) -> None:
    one, two = make_core(model), make_core(model, n_threads=2)
    for prompt in PROMPTS:
        assert alone(one, prompt, 60).tokens == alone(two, prompt, 60).tokens
    counters = two.core.counters_dict()
    assert counters["sampled_tokens"] == 60 * len(PROMPTS)


@pytest.mark.parametrize("flash_attn", ["on", "off", "auto"])
def test_flash_attention_settings(make_core: Callable[..., Driver], model: Model, flash_attn: str) -> None:
    driver = make_core(model, flash_attn=flash_attn)
    assert alone(driver, PROMPTS[1], 8).reason == "length"


def test_the_context_may_be_filled_to_the_last_cell(make_core: Callable[..., Driver], model: Model) -> None:
    driver = make_core(model, n_ctx=256, n_batch=256)
    output = driver.generate([65] * 200, greedy(10_000))
    assert output.reason == "length"
    assert output.facts.cells <= driver.core.n_ctx == 256
    assert driver.generate([65] * 256, greedy(10)).facts.completion_tokens == 1


def test_prompt_and_completion_fit_the_context(make_core: Callable[..., Driver], model: Model) -> None:
    driver = make_core(model, n_ctx=256, n_batch=256)
    output = driver.generate([65] * 200, greedy(10_000))
    assert output.facts.prompt_tokens + output.facts.completion_tokens == driver.core.n_ctx


def test_rows_add_up(make_core: Callable[..., Driver], model: Model) -> None:
    driver = make_core(model)
    for slot, prompt in enumerate(PROMPTS[:4]):
        driver.open(prompt, greedy(10 + slot), slot=slot)
    driver.finish_all(chunk=5)
    counters = driver.core.counters_dict()
    rows = [output.facts for output in driver.outputs.values()]
    for output in driver.outputs.values():
        row = output.facts
        assert row.completion_tokens == len(output.tokens) == sum(n for _, n in output.deltas)
        assert row.prompt_tokens == len(output.prompt) == row.kv_cache_hit + row.kv_cache_miss
        assert row.opened_ns <= row.started_ns < row.first_token_ns <= row.last_token_ns <= row.finished_ns
        assert row.ubatches == -(-row.prompt_tokens // 5) + row.completion_tokens - 1
        assert row.ubatches <= row.batch_sum <= 4 * row.ubatches
        assert row.threads_min == row.threads_max == 1
        assert row.prefill_ns > 0 and row.decode_ns > 0 and row.sample_ns > 0
    assert counters["sampled_tokens"] == sum(row.completion_tokens for row in rows)
    assert counters["prefill_tokens"] == sum(row.kv_cache_miss for row in rows) == counters["kv_miss_tokens"]
    assert counters["decode_tokens"] == sum(row.completion_tokens - 1 for row in rows)
    assert counters["busy_ns"] >= counters["decode_ns"] > 0
    assert counters["opened"] == counters["finished_length"] == 4


def test_repeat_limits_the_steps_of_a_run(core: Driver) -> None:
    core.open("HELLO", greedy(50))
    core.prefill()
    assert core.core.run([0], [], 7) is False
    assert core.core.progress()[0] == (abi.DECODE, 8, 12)
    assert core.core.run([0], []) is True
    assert core.core.progress()[0][:2] == (abi.DONE, 50)
    core.finish_all()


def test_interrupt_stops_a_run_after_one_step(core: Driver) -> None:
    core.open("HELLO", greedy(50))
    core.prefill()
    core.core.interrupt()
    assert core.core.run([0], []) is False
    assert core.core.progress()[0][:2] == (abi.DECODE, 2)
    core.core.rearm()
    core.finish_all()


@pytest.mark.model
def test_smollm2_greedy_equals_recomputation(make_core: Callable[..., Driver], real_model: Model) -> None:
    driver = make_core(real_model, n_slots=2)
    output = driver.generate("The capital of France is", greedy(12, ignore_eos=False))
    assert "Paris" in output.text
    for n in range(len(output.tokens)):
        again = driver.generate(output.prompt + output.tokens[:n], greedy(1, ignore_eos=False))
        assert again.tokens == output.tokens[n : n + 1], f"token {n}"


@pytest.mark.model
def test_smollm2_alone_and_eight_at_once(make_core: Callable[..., Driver], real_model: Model) -> None:
    driver = make_core(real_model, n_slots=8)
    questions = ["The sky is", "Once upon a time", "def add(a, b):", "Water boils at", "My name is", "1, 2, 3,",
                 "The best food in Italy is", "A cat and a dog"]  # fmt: skip
    apart = [driver.generate(text, greedy(8)).text for text in questions]
    handles = [driver.open(text, greedy(8), slot=slot) for slot, text in enumerate(questions)]
    driver.finish_all()
    assert [driver.outputs[handle].text for handle in handles] == apart


# -- the end of a text --------------------------------------------------------------------------------------------


def only_bytes(data: bytes) -> tuple[tuple[int, float], ...]:
    """A bias that leaves these bytes alone (token ids 0 to 255 are the bytes of that number)."""
    return tuple((token, -1e9) for token in range(tiny.N_VOCAB) if token not in set(data))


@pytest.mark.parametrize("lead", [0xC3, 0xE2, 0xF0], ids=hex)
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_a_character_that_was_cut_is_left_out(core: Driver, lead: int, max_tokens: int) -> None:
    """The last byte begins a character; what is broken before it stays visible."""
    output = core.generate("x", greedy(max_tokens, logit_bias=only_bytes(bytes([lead]))))
    assert output.reason == "length" and len(output.tokens) == max_tokens
    assert output.text == "\ufffd" * (max_tokens - 1)
    assert sum(n for _, n in output.deltas) == max_tokens, "its token counts"


def test_a_character_that_was_cut_before_a_stop_string(core: Driver) -> None:
    # After a lead byte, the best of the two is sure to be the other one only where nothing else may come.
    prompt = core.tokenize("x")
    for seed in range(20):
        bias = only_bytes(b"\xe2Z")
        output = core.generate(prompt, sampled(30, seed=seed, logit_bias=bias, stop=("Z",)))
        if output.reason == "stop":
            assert output.stop_index == 0
            assert output.text == "\ufffd" * max(0, len(output.tokens) - 2)


def test_a_stop_string_that_waited_for_an_earlier_one_ends_the_text(core: Driver) -> None:
    """The last token completes one, and could go on with another that begins before it."""
    letters = only_bytes(bytes(range(0x41, 0x5B)))
    plain = core.generate("x", greedy(30, logit_bias=letters)).text
    at = next(i for i in range(1, 30) if plain[i] not in plain[:i])
    stops = (f"{plain[at - 1 : at + 1]}never", plain[at])
    output = core.generate("x", greedy(at + 1, logit_bias=letters, stop=stops), slot=1)
    assert (output.reason, output.stop_index, output.text) == ("stop", 1, plain[:at])
    longer = core.generate("x", greedy(30, logit_bias=letters, stop=stops), slot=2)
    assert (longer.reason, longer.stop_index, longer.text) == ("stop", 1, plain[:at])
    assert len(longer.tokens) == at + 2, "one token tells that the earlier one does not come"
    earlier = (plain[at - 1 : at + 2], plain[at])
    output = core.generate("x", greedy(30, logit_bias=letters, stop=earlier), slot=3)
    assert (output.reason, output.stop_index, output.text) == ("stop", 0, plain[: at - 1])
