"""Log-probabilities: of the very logits that tokens were sampled from, and of prompts, however they are computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
from core_support import Driver, Output, greedy, sampled

from mullama import abi, types
from mullama._core import Model
from mullama._core.testing.gate import logits_of, score
from mullama.errors import InvalidRequest
from mullama.types import Constraint, ConstraintKind, SamplingParams, TokenScore

PROMPT = "some words, some words, and a few more of them"
NEAR = 1e-4

Floats = np.ndarray[Any, np.dtype[np.float64]]


def logprobs(logits: Any) -> Floats:
    row = np.asarray(logits, dtype=np.float64)
    shifted = row - row.max(axis=-1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def expected(model: Model, tokens: list[int]) -> Floats:
    """Log-probabilities behind each token, of llama.cpp called directly."""
    return logprobs(np.frombuffer(logits_of(model, tokens), dtype=np.float32).reshape(len(tokens), model.n_vocab))


def check(one: TokenScore, row: Floats, k: int, model: Model) -> None:
    """A token's log-probability and the ``k`` largest are those of ``row``."""
    assert one.logprob == pytest.approx(row[one.token], abs=NEAR)
    assert abs(one.rank - 1 - int((row > row[one.token]).sum())) <= int((abs(row - row[one.token]) < NEAR).sum())
    assert one.piece == model.piece(one.token, special=True)
    assert len(one.top) == min(k, len(row))
    assert [logprob for _, _, logprob in one.top] == pytest.approx(np.sort(row)[::-1][:k], abs=NEAR)
    for token, piece, logprob in one.top:
        assert logprob == pytest.approx(row[token], abs=NEAR)
        assert piece == model.piece(token, special=True)
        assert token != one.token or logprob == one.logprob, "equal to the bit: lm-eval compares them so"


@pytest.mark.parametrize("n", [1, 15, 16, 64, 65, 1023, 1025, 49152, 262144])
def test_a_row_of_any_length(n: int) -> None:
    random = np.random.default_rng(n)
    for scale in (0.01, 1.0, 30.0, 1e4):
        row = (random.standard_normal(n) * scale).astype(np.float32)
        if n > 16:
            row[random.integers(0, n, n // 16)] = -np.inf
            row[3] = -1e30
        token = int(np.argmax(row)) if scale > 1 else 0
        found = score(row.tolist(), token, 20)
        assert found is not None
        rank, logprob, top = found
        true = logprobs(row)
        assert logprob == pytest.approx(true[token], rel=1e-6, abs=5e-6)
        assert rank == 1 + int((row > row[token]).sum())
        assert [one for _, one in top] == pytest.approx(
            [x for x in np.sort(true)[::-1][:20] if x > -1e20], rel=1e-6, abs=5e-6
        )


def test_rows_that_are_not_usable() -> None:
    assert score([0.0, math.nan], 0, 1) is None
    assert score([0.0, math.inf], 0, 1) is None
    assert score([-math.inf] * 3, 0, 1) is None


BIASED = {"logit_bias": ((66, 5.0), (67, -3.0)), "min_tokens": 4, "ignore_eos": False}


@pytest.mark.parametrize(
    "params",
    [
        greedy(12),
        sampled(12),
        sampled(12, top_k=3, temperature=0.7),
        sampled(12, repeat_penalty=1.3),
        sampled(12, **BIASED),
        greedy(12, allowed_token_ids=(65, 66, 67), bad_words=("A",)),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_of_the_models_own_distribution(core: Driver, model: Model, params: SamplingParams, k: int) -> None:
    """Whatever temperature, penalties, biases and rules make of it."""
    output = core.generate(PROMPT, replaced(params, logprobs=k))
    assert output.tokens == core.generate(PROMPT, params, slot=1).tokens, "asking changes nothing"
    assert [one.token for one in output.scores] == output.tokens
    rows = expected(model, [*output.prompt, *output.tokens])
    for i, one in enumerate(output.scores):
        check(one, rows[len(output.prompt) + i - 1], k, model)


def replaced(params: SamplingParams, **more: Any) -> SamplingParams:
    import dataclasses

    return dataclasses.replace(params, **more)


@pytest.mark.parametrize("arch", ["gemma3", "mamba", "lfm2"])
def test_other_kinds_of_models(make_core: Callable[..., Driver], models: Callable[..., Model], arch: str) -> None:
    model = models(arch)
    output = make_core(model).generate(PROMPT, sampled(8, logprobs=5, prompt_logprobs=2), chunk=7)
    rows = expected(model, [*output.prompt, *output.tokens])
    for i, one in enumerate([*output.prompt_scores, *output.scores]):
        check(one, rows[i], 2 if i < len(output.prompt_scores) else 5, model)


def test_of_the_distribution_that_was_sampled(core: Driver, model: Model) -> None:
    def of(**more: Any) -> tuple[Output, Floats]:
        output = core.generate(PROMPT, sampled(10, logprobs=5, logprobs_mode="processed", **more))
        return output, np.frombuffer(logits_of(model, [*output.prompt, *output.tokens]), np.float32).reshape(
            -1, model.n_vocab
        )

    output, rows = of(temperature=0.5)
    for i, one in enumerate(output.scores):
        check(one, logprobs(rows[len(output.prompt) + i - 1] / 0.5), 5, model)

    output, rows = of(top_k=3, temperature=2.0)
    for i, one in enumerate(output.scores):
        row = rows[len(output.prompt) + i - 1].astype(np.float64)
        kept = np.sort(row)[::-1][:3]
        assert [logprob for *_, logprob in one.top] == pytest.approx(logprobs(kept / 2.0), abs=NEAR)
        assert one.rank <= 3

    output, rows = of(allowed_token_ids=(65, 66), temperature=100.0)
    for one in output.scores:
        assert {token for token, *_ in one.top} == {65, 66}, "what cannot come is not listed"
        assert sum(math.exp(logprob) for *_, logprob in one.top) == pytest.approx(1.0, abs=NEAR)

    output = core.generate(PROMPT, greedy(4, logprobs=1, logprobs_mode="processed", logit_bias=((66, 100.0),)))
    assert [one.token for one in output.scores] == [66] * 4
    assert all(one.logprob == pytest.approx(0.0, abs=NEAR) and one.rank == 1 for one in output.scores)


@pytest.mark.parametrize("chunk", [64, 7, 1])
@pytest.mark.parametrize("n_rows", [4, 5, 63])
def test_of_a_prompt_in_any_chunks(
    make_core: Callable[..., Driver], model: Model, monkeypatch: pytest.MonkeyPatch, chunk: int, n_rows: int
) -> None:
    monkeypatch.setattr(types, "LOGITS_BYTES", n_rows * 4 * model.n_vocab)
    core = make_core(model)
    other = core.open("another one", greedy(40), slot=1)
    core.prefill()
    output = core.generate(PROMPT, greedy(6, prompt_logprobs=3), chunk=chunk)
    assert [one.token for one in output.prompt_scores] == output.prompt[1:]
    rows = expected(model, output.prompt)
    for i, one in enumerate(output.prompt_scores):
        check(one, rows[i], 3, model)
    assert output.scores == []
    assert output.tokens == core.generate(PROMPT, greedy(6)).tokens
    assert core.outputs[other].done


@pytest.mark.parametrize("save", [True, False], ids=["swap", "recompute"])
def test_a_prompt_that_is_preempted(make_core: Callable[..., Driver], model: Model, save: bool) -> None:
    core = make_core(model)
    apart = core.generate(PROMPT, greedy(4, prompt_logprobs=2))
    core.generate(PROMPT, greedy(1), slot=2, retain=True)  # a prefix that must not be taken
    handle = core.open(PROMPT, greedy(4, prompt_logprobs=2))
    for n in (3, 1, 9, 20):
        core.core.run([], [(0, n)])
        parked = core.core.preempt(0, save=save)
        limit = parked.reuse_limit()
        core.core.resume(0, parked, reuse=0 if save else min(limit, core.core.retained(0)[0]))
    core.finish_all()
    output = core.outputs[handle]
    assert [one.token for one in output.prompt_scores] == output.prompt[1:], "each of them once"
    for one, other in zip(output.prompt_scores, apart.prompt_scores, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=NEAR)
    assert output.tokens == apart.tokens


def test_nothing_is_generated(core: Driver, model: Model) -> None:
    output = core.generate(PROMPT, greedy(0, prompt_logprobs=0, logprobs=3))
    assert (output.reason, output.text, output.tokens, output.scores) == ("length", "", [], [])
    assert len(output.prompt_scores) == len(output.prompt) - 1
    assert output.facts.completion_tokens == 0
    assert core.generate(PROMPT, greedy(0)).deltas == [("", 0)]
    assert core.generate("H", greedy(0, prompt_logprobs=1)).prompt_scores == [], "the first token has none"


def test_reuse_is_refused_where_the_prompt_is_to_be_scored(core: Driver) -> None:
    core.generate(PROMPT, greedy(1), retain=True)
    with pytest.raises(ValueError, match="need all of it"):
        core.open(PROMPT, greedy(1, prompt_logprobs=1), reuse=4)
    core.generate(PROMPT, greedy(1, prompt_logprobs=1))


@pytest.mark.parametrize("stop", ["BC", "BB", "never"])
def test_tokens_whose_text_is_held_back(core: Driver, stop: str) -> None:
    """One record a token, before its text, also where that waits for a stop string or for the rest of a character."""
    some = tuple((token, 100.0) for token in (66, 67, *tiny.EMOJI))
    output = core.generate(PROMPT, sampled(40, logit_bias=some, stop=(stop,), logprobs=1))
    assert len(output.scores) == len(output.tokens) == output.facts.completion_tokens
    assert sum(n for _, n in output.deltas) == len(output.tokens)
    whole = b"".join(one.piece for one in output.scores).decode("utf-8", "ignore")
    assert whole.startswith(output.text.rstrip("\ufffd")) or "\ufffd" in output.text


def test_the_token_that_ends_a_text_has_one_too(core: Driver) -> None:
    output = core.generate(PROMPT, sampled(8, ignore_eos=False, logit_bias=((tiny.EOS, 1000.0),), logprobs=1))
    assert (output.reason, output.text) == ("stop", "")
    assert [one.token for one in output.scores] == [tiny.EOS]
    assert output.scores[0].piece == b"<|eos|>"


def test_token_ids_alone(core: Driver) -> None:
    output = core.generate(PROMPT, sampled(8, return_token_ids=True))
    assert [one.token for one in output.scores] == output.tokens
    assert all((one.logprob, one.rank, one.top) == (None, 0, ()) for one in output.scores)
    assert b"".join(one.piece for one in output.scores).decode(errors="replace").startswith(output.text[:2])


def test_tokens_that_end_a_text(core: Driver) -> None:
    biased = {"logit_bias": ((65, 100.0), (66, 100.0), (67, 100.0)), "seed": 3}
    free = core.generate(PROMPT, sampled(30, **biased))
    ended = core.generate(PROMPT, sampled(30, stop_token_ids=(67, 99), **biased))
    n = free.tokens.index(67)
    assert ended.tokens == free.tokens[: n + 1]
    assert (ended.reason, ended.stop_token, ended.stop_index) == ("stop", 67, -1)
    assert ended.text == free.text[:n], "it is no part of the text"
    late = core.generate(PROMPT, sampled(30, stop_token_ids=(67,), min_tokens=10, **biased))
    assert 67 not in late.tokens[:10] and len(late.tokens) >= 10
    assert core.generate(PROMPT, sampled(3, **biased)).stop_token == -1


def test_words_that_must_not_come(core: Driver) -> None:
    letters = {"logit_bias": tuple((token, 100.0) for token in b"ABC")}
    free = core.generate(PROMPT, sampled(60, **letters)).text
    assert "CA" in free and "CCB" in free
    kept = core.generate(PROMPT, sampled(60, bad_words=("CA", "CCB"), **letters))
    assert "CA" not in kept.text and "CCB" not in kept.text
    assert "C" in kept.text and len(kept.tokens) == 60, "their parts may come"


def test_tokens_that_alone_may_come(core: Driver) -> None:
    only = core.generate(PROMPT, sampled(40, allowed_token_ids=(70, 65)))
    assert set(only.tokens) == {65, 70}
    assert set(core.generate(PROMPT, sampled(40, top_k=40, allowed_token_ids=(70,))).tokens) == {70}
    nothing = core.generate(PROMPT, greedy(4, allowed_token_ids=(65,), bad_words=("A",)))
    assert (nothing.reason, abi.CORE_ERRORS[nothing.error]) == ("error", "no_token")


@pytest.mark.parametrize(
    "wrong",
    [
        {"logprobs": 21}, {"logprobs": -1}, {"logprobs": True}, {"prompt_logprobs": 21}, {"logprobs_mode": "both"},
        {"stop_token_ids": (tiny.N_VOCAB,)}, {"allowed_token_ids": (-1,)}, {"bad_words": ("",)}, {"max_tokens": -1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(core: Driver, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        core.open(PROMPT, sampled(**wrong))
    assert refused.value.param == next(iter(wrong))


@pytest.mark.parametrize(
    "told", [{"logprobs": 3}, {"logprobs": 3, "logprobs_mode": "processed"}, {"return_token_ids": True}]
)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 40}, {"bad_words": ("ab",)}], ids=str)
def test_tokens_that_a_constraint_forces(
    core: Driver, model: Model, told: dict[str, Any], options: dict[str, Any]
) -> None:
    """Each is told like any other, of the row that stood before it, and the text stays what it was."""
    constraint = Constraint(ConstraintKind.REGEX, "[abc]{2}forced text[0-9]{3}")
    params = sampled(60, constraint=constraint, ignore_eos=False, **options)
    free = core.generate(PROMPT, params)
    output = core.generate(PROMPT, replaced(params, **told), slot=1)
    assert free.reason == "stop" and (output.text, output.tokens) == (free.text, free.tokens)
    assert [one.token for one in output.scores] == output.tokens
    rows = expected(model, [*output.prompt, *output.tokens])
    at = 0
    for i, one in enumerate(output.scores):
        is_forced = at >= 2 and at + len(one.piece) <= 2 + len("forced text")
        at += len(one.piece)
        if "logprobs" not in told:
            assert one.rank == 0
        elif "logprobs_mode" not in told:
            check(one, rows[len(output.prompt) + i - 1], 3, model)
        elif is_forced:
            assert (one.logprob, one.rank, one.top) == (0.0, 1, ((one.token, one.piece, 0.0),))
        else:
            assert len(one.top) in (2, 3) and all(piece.isalnum() for _, piece, _ in one.top)
