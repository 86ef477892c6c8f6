"""Sampling parameters: each does something, each is checked, the quick ways equal the long ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from core_support import Driver, Output, greedy, sampled

from mullama._core import Model, Sampling, check_params
from mullama.errors import InvalidRequest
from mullama.types import Constraint, ConstraintKind, SamplingParams

PROMPT = "some words, some words"
ONLY_ABCD = tuple((token, -1e9) for token in range(tiny.N_VOCAB) if token not in (65, 66, 67, 68))

# Control characters have equal logits here, and equals may come in any order.
ONLY_PRINTABLE = tuple((token, -1e9) for token in range(tiny.N_VOCAB) if not 0x20 <= token < 0x7F)

# A few letters only, so that repetitions abound for the penalties and DRY to find.
REPETITIVE = {"logit_bias": ONLY_ABCD, "max_tokens": 60}
DRY = {**REPETITIVE, "dry_multiplier": 5.0, "dry_allowed_length": 1}
MIROSTAT = {"mirostat": 2, "mirostat_tau": 3.0}

# field: (base, value that must change the text)
EFFECTS: dict[str, tuple[dict[str, Any], Any]] = {
    "temperature": ({}, 0.2),
    "top_k": ({}, 2),
    "top_p": ({}, 0.2),
    "min_p": ({}, 0.5),
    "typical_p": ({}, 0.2),
    "repeat_penalty": (REPETITIVE, 2.0),
    "repeat_last_n": ({**REPETITIVE, "repeat_penalty": 3.0}, 1),
    "presence_penalty": ({**REPETITIVE, "repeat_last_n": 4}, 5.0),
    "frequency_penalty": (REPETITIVE, 5.0),
    "dry_multiplier": (REPETITIVE, 5.0),
    "dry_base": (DRY, 4.0),
    "dry_allowed_length": (DRY, 6),
    "dry_penalty_last_n": (DRY, 3),
    "dry_sequence_breakers": (DRY, ("A", "B", "C", "D")),
    "xtc_probability": ({"xtc_threshold": 0.01}, 1.0),
    "xtc_threshold": ({"xtc_probability": 1.0, "xtc_threshold": 0.4}, 0.001),
    "mirostat": ({}, 1),
    "mirostat_tau": (MIROSTAT, 0.5),
    "mirostat_eta": ({**MIROSTAT, "mirostat_tau": 1.0}, 0.9),
    "logit_bias": ({}, ((66, 100.0),)),
    "seed": ({}, 2),
    "max_tokens": ({}, 3),
    "min_tokens": ({"logit_bias": ((tiny.EOS, 100.0),), "ignore_eos": False}, 5),
    "ignore_eos": ({"logit_bias": ((tiny.EOS, 100.0),), "ignore_eos": False}, True),
    "stop": ({"logit_bias": ONLY_ABCD}, ("A", "B", "C", "D")),
    "constraint": ({}, Constraint(ConstraintKind.REGEX, "[0-9]+")),
}


def test_every_field_is_in_the_table() -> None:
    assert sorted(EFFECTS) == sorted(field.name for field in dataclasses.fields(SamplingParams))


@pytest.mark.parametrize("name", EFFECTS)
def test_every_field_changes_the_text(core: Driver, name: str) -> None:
    base, value = EFFECTS[name]
    before = core.generate(PROMPT, sampled(**base))
    again = core.generate(PROMPT, sampled(**base), slot=1)
    after = core.generate(PROMPT, sampled(**{**base, name: value}), slot=2)
    assert before.tokens == again.tokens, "same parameters, same text"
    assert before.tokens != after.tokens


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 - 1, 2**32, 2**63, -1, -(2**63)])
def test_a_seed_gives_the_same_text_again(core: Driver, seed: int) -> None:
    first = core.generate(PROMPT, sampled(seed=seed))
    again = core.generate(PROMPT, sampled(seed=seed), slot=3)
    assert first.tokens == again.tokens


def test_seeds_differ_and_no_seed_is_random(core: Driver) -> None:
    texts = {core.generate(PROMPT, sampled(seed=seed)).text for seed in range(8)}
    assert len(texts) == 8
    texts = {core.generate(PROMPT, sampled(seed=None)).text for _ in range(8)}
    assert len(texts) == 8


@pytest.mark.parametrize(
    "params",
    [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-5}, {"top_k": 1, "repeat_last_n": 0},
     {"temperature": 0.0, "mirostat": 2}],
    ids=str,
)  # fmt: skip
def test_many_ways_to_be_greedy(core: Driver, params: dict[str, Any]) -> None:
    assert core.generate(PROMPT, sampled(**params)).tokens == core.generate(PROMPT, greedy()).tokens


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-42, 1e-38, 1e-9])
@pytest.mark.parametrize("more", [{}, {"top_k": 40, "top_p": 0.9}, {"mirostat": 1}, {"mirostat": 2}], ids=str)
def test_temperatures_that_change_nothing_are_greedy(core: Driver, temperature: float, more: dict[str, Any]) -> None:
    """Also those by which a logit cannot be divided: denormal for a float, or none at all."""
    output = core.generate(PROMPT, sampled(temperature=temperature, **more))
    assert (output.reason, output.tokens) == ("length", core.generate(PROMPT, greedy()).tokens)
    slow = core.generate(PROMPT, sampled(temperature=temperature, presence_penalty=1e-30, **more), slot=1)
    assert slow.tokens == output.tokens


@pytest.mark.parametrize(
    "params",
    [{"top_p": 1e-42}, {"min_p": 1e-42}, {"typical_p": 1e-42}, {"xtc_probability": 1.0, "xtc_threshold": 1e-42},
     {"mirostat": 1, "mirostat_tau": 1e-42}, {"mirostat": 2, "mirostat_eta": 1e-42}, {"dry_multiplier": 1e-42},
     {"presence_penalty": 1e-42}, {"logit_bias": ((66, 1e-42),)}, {"repeat_penalty": 1e-3}],
    ids=str,
)  # fmt: skip
def test_other_denormal_values_end_no_request_in_an_error(core: Driver, params: dict[str, Any]) -> None:
    assert core.generate(PROMPT, sampled(**params)).reason == "length"


# Penalties so small that no logit changes, but the chain is the long one, over all candidates.
SLOW = {"presence_penalty": 1e-30}


@pytest.mark.parametrize(
    "params",
    [{"top_k": 40}, {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8}, {"top_k": 2},
     {"top_k": 512, "logit_bias": ONLY_PRINTABLE},
     {"top_k": 40, "typical_p": 0.7}, {"top_k": 40, "xtc_probability": 0.5}, {"top_k": 10, "logit_bias": ((66, 3.0),)}],
    ids=str,
)  # fmt: skip
def test_the_quick_top_k_equals_the_long_way(core: Driver, params: dict[str, Any]) -> None:
    for seed in range(5):
        quick = core.generate(PROMPT, sampled(40, seed=seed, **params))
        slow = core.generate(PROMPT, sampled(40, seed=seed, **params, **SLOW))
        assert quick.tokens == slow.tokens


def test_greedy_with_a_chain_equals_greedy_without(core: Driver) -> None:
    assert core.generate(PROMPT, greedy(40, **SLOW)).tokens == core.generate(PROMPT, greedy(40)).tokens


@pytest.mark.model
def test_the_quick_top_k_on_a_real_vocabulary(make_core: Callable[..., Driver], real_model: Model) -> None:
    driver = make_core(real_model, n_slots=2)
    plain = {"top_k": 40, "top_p": 0.95, "temperature": 0.8}
    quick = driver.generate("Once upon a time", sampled(24, **plain))
    slow = driver.generate("Once upon a time", sampled(24, **plain, **SLOW))
    assert quick.text == slow.text


# -- logit bias, ends


@pytest.mark.parametrize("params", [greedy, sampled], ids=["greedy", "sampled"])
def test_logit_bias_forces_and_bans(core: Driver, params: Callable[..., SamplingParams]) -> None:
    forced = core.generate(PROMPT, params(12, logit_bias=((66, 100.0),)))
    assert forced.text == "B" * 12
    free = core.generate(PROMPT, params(12))
    banned = core.generate(PROMPT, params(12, logit_bias=tuple((token, -100.0) for token in set(free.tokens))))
    assert not set(banned.tokens) & set(free.tokens)


def test_logit_bias_of_minus_infinity_bans(core: Driver) -> None:
    first = core.generate(PROMPT, greedy(1)).tokens[0]
    assert core.generate(PROMPT, greedy(1, logit_bias=((first, -math.inf),))).tokens[0] != first


def test_biases_of_one_token_add_up(core: Driver) -> None:
    output = core.generate(PROMPT, greedy(3, logit_bias=((66, 100.0), (66, -200.0), (67, 100.0))))
    assert output.text == "CCC"


def test_bias_on_everything_is_still_a_distribution(core: Driver) -> None:
    everything = tuple((token, 50.0) for token in range(tiny.N_VOCAB))
    same = core.generate(PROMPT, greedy(12, logit_bias=everything)).tokens
    assert same == core.generate(PROMPT, greedy(12)).tokens


END = {"logit_bias": ((tiny.EOS, 100.0),), "ignore_eos": False}


def test_the_end_of_generation(core: Driver) -> None:
    output = core.generate(PROMPT, greedy(12, **END))
    assert (output.reason, output.text, output.tokens) == ("stop", "", [tiny.EOS])
    assert output.stop_index == -1
    assert output.facts.completion_tokens == 1 == sum(n for _, n in output.deltas)


@pytest.mark.parametrize("token", [tiny.EOS, tiny.IM_END])
def test_ignore_eos_goes_on(core: Driver, token: int) -> None:
    output = core.generate(PROMPT, greedy(12, logit_bias=((token, 100.0),)))
    assert output.reason == "length"
    assert not {tiny.EOS, tiny.IM_END} & set(output.tokens)


@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_min_tokens_come_before_the_end(core: Driver, n: int) -> None:
    output = core.generate(PROMPT, greedy(12, min_tokens=n, **END))
    assert len(output.tokens) == min(n + 1, 12)
    assert tiny.EOS not in output.tokens[:n]
    assert output.reason == ("stop" if n < 12 else "length")


def test_min_tokens_beyond_max_tokens(core: Driver) -> None:
    assert core.generate(PROMPT, greedy(4, min_tokens=1000, **END)).reason == "length"


def test_stop_strings_end_the_text_before_them(core: Driver) -> None:
    whole = core.generate(PROMPT, greedy(30)).text
    for at in (1, 5, 12):
        stop = whole[at : at + 3]
        output = core.generate(PROMPT, greedy(30, stop=("never seen", stop)))
        assert output.text == whole[: whole.index(stop)]
        assert (output.reason, output.stop_index) == ("stop", 1)
        assert output.facts.completion_tokens == sum(n for _, n in output.deltas) == len(output.tokens)


def test_no_part_of_a_stop_string_is_shown(core: Driver) -> None:
    whole = core.generate(PROMPT, greedy(30)).text
    output = core.generate(PROMPT, greedy(30, stop=(whole[5:9] + "never",)))
    assert output.text == whole, "what was held back comes when it was none"
    shown = ""
    for text, _ in output.deltas:
        shown += text
        assert not shown.endswith(whole[5:9]) or len(shown) > 9


def test_stop_strings_before_min_tokens_do_not_count(core: Driver) -> None:
    output = core.generate(PROMPT, greedy(20, logit_bias=((66, 100.0),), stop=("BB",), min_tokens=6))
    assert (output.reason, output.text) == ("stop", "B" * 5 + "")
    assert len(output.tokens) == 7 or output.text == "B" * 5


def test_max_tokens_is_cut_to_the_context(core: Driver) -> None:
    output = core.generate([65] * 500, greedy(1000))
    assert (output.reason, len(output.tokens)) == ("length", 12)


# -- long pieces, extremes


def test_a_token_with_a_very_long_text(core: Driver) -> None:
    output = core.generate(PROMPT, greedy(3, logit_bias=((tiny.LONG_TOKEN, 1000.0),)))
    assert output.tokens == [tiny.LONG_TOKEN] * 3
    assert output.text == "A" * 3 * tiny.LONG_TOKEN_BYTES


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-45}, {"temperature": 1e-38}, {"temperature": 1e-30}, {"temperature": 100.0},
    {"top_k": 1 << 30}, {"top_k": -1}, {"typical_p": 0.0}, {"typical_p": 0.0, "top_p": 0.0, "min_p": 1.0, "top_k": 1},
    {"repeat_penalty": 100.0}, {"repeat_penalty": 1e-3}, {"presence_penalty": 100.0}, {"frequency_penalty": -100.0},
    {"repeat_last_n": -1, "repeat_penalty": 1.1}, {"repeat_last_n": 1 << 20, "repeat_penalty": 1.1},
    {"dry_multiplier": 100.0, "dry_base": 100.0, "dry_allowed_length": 0}, {"dry_multiplier": 1.0, "dry_base": 0.0},
    {"dry_multiplier": 1.0, "dry_sequence_breakers": ()}, {"dry_multiplier": 1.0, "dry_penalty_last_n": 1 << 20},
    {"dry_multiplier": 1.0, "dry_sequence_breakers": ("x" * 1000, "€", "\0")},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0}, {"xtc_probability": 1.0, "xtc_threshold": 1.0},
    {"mirostat": 1, "mirostat_tau": 0.0}, {"mirostat": 1, "mirostat_tau": 1000.0, "mirostat_eta": 1.0},
    {"mirostat": 2, "mirostat_tau": 0.0}, {"mirostat": 2, "mirostat_tau": 1000.0, "mirostat_eta": 0.0},
    {"mirostat": 1, "temperature": 1e-38}, {"mirostat": 2, "temperature": 1e-38},
    {"logit_bias": tuple((token, 1e4) for token in range(tiny.N_VOCAB))},
    {"logit_bias": tuple((t, -1e30) for t in range(290))},
]  # fmt: skip


@pytest.mark.parametrize("params", EXTREMES, ids=lambda p: str(p)[:70])
def test_extremes_within_the_ranges_end_well(core: Driver, params: dict[str, Any]) -> None:
    """Whatever is accepted gives tokens of the vocabulary or an error of this request alone."""
    neighbour = core.open("the neighbour", greedy(16), slot=1)
    output = core.generate("ABABABABAB", sampled(16, **params))
    assert output.reason in ("length", "stop", "error")
    assert all(0 <= token < tiny.N_VOCAB for token in output.tokens)
    assert output.facts.completion_tokens == len(output.tokens)
    assert core.outputs[neighbour].tokens == core.generate("the neighbour", greedy(16)).tokens


# -- checks

NUMBER_RANGES = {
    "temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1), "repeat_penalty": (1e-3, 100),
    "presence_penalty": (-100, 100), "frequency_penalty": (-100, 100), "dry_multiplier": (0, 100),
    "dry_base": (0, 100), "xtc_probability": (0, 1), "xtc_threshold": (0, 1), "mirostat_tau": (0, 1000),
    "mirostat_eta": (0, 1),
}  # fmt: skip
WHOLE_RANGES = {
    "top_k": (-1, 1 << 30), "repeat_last_n": (-1, 1 << 20), "dry_allowed_length": (0, 1 << 20),
    "dry_penalty_last_n": (-1, 1 << 20), "mirostat": (0, 2), "min_tokens": (0, 1 << 30), "max_tokens": (1, 1 << 30),
    "seed": (-(1 << 63), (1 << 64) - 1),
}  # fmt: skip


def refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        check_params(SamplingParams(**{name: value}))
    assert error.value.param == name
    assert name in str(error.value)


@pytest.mark.parametrize("name", NUMBER_RANGES)
def test_numbers_are_checked(name: str) -> None:
    low, high = NUMBER_RANGES[name]
    for value in (low, high, (low + high) / 2):
        check_params(SamplingParams(**{name: value}))
    for value in (low - 1, high + 1, math.nan, math.inf, -math.inf, "1", None, True, [1], 1e300):
        refused(name, value)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 10**400), ("logit_bias", ((5, 10**400),))], ids=["temperature", "logit_bias"]
)
def test_huge_integers_are_refused(name: str, value: Any) -> None:
    refused(name, value)


@pytest.mark.parametrize("name", WHOLE_RANGES)
def test_whole_numbers_are_checked(name: str) -> None:
    low, high = WHOLE_RANGES[name]
    for value in (low, high, low + 1):
        check_params(SamplingParams(**{name: value}))
    for value in (low - 1, high + 1, 1.5, math.nan, "1", True, [1], 10**400):
        refused(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ("",)), ("stop", ("ok", 5)), ("stop", ("\ud800",)), ("stop", (b"x",)), ("stop", (None,)),
        ("dry_sequence_breakers", (5,)), ("dry_sequence_breakers", ("\ud800",)),
        ("logit_bias", ((1.5, 1.0),)), ("logit_bias", (("5", 1.0),)), ("logit_bias", ((True, 1.0),)),
        ("logit_bias", ((5, math.nan),)), ("logit_bias", ((5, "1"),)), ("logit_bias", ((5, True),)),
        ("logit_bias", ((5, 1e5),)), ("logit_bias", ((5,),)), ("logit_bias", (5,)), ("logit_bias", {5: 1.0}),
    ],
)  # fmt: skip
def test_texts_and_biases_are_checked(name: str, value: Any) -> None:
    refused(name, value)


def test_tokens_outside_the_vocabulary(core: Driver) -> None:
    for token in (-1, tiny.N_VOCAB, 1 << 40):
        with pytest.raises(InvalidRequest, match="token id") as error:
            core.open(PROMPT, greedy(1, logit_bias=((token, 1.0),)))
        assert error.value.param == "logit_bias"


def test_the_records_of_one_request(core: Driver) -> None:
    """Every token is announced, its text follows whole, the finish record is last."""
    output: Output = core.generate(PROMPT, sampled(30))
    assert [n for _, n in output.deltas] == [1] * 30
    assert output.text == core.core.model.detokenize(output.tokens)


# -- DRY's sequence breakers ------------------------------------------------------------------------------------------


def llama_cpp_breakers(model: Model, text: str) -> set[tuple[int, ...]]:
    """``get_overlapping_token_sequences`` of llama.cpp, to the letter: what ``dry.h`` must find."""
    breaker = text.encode()[:40]
    found = set()
    for token in range(model.n_vocab):
        word = model.detokenize_bytes([token], special=True)
        if breaker in word:
            found.add((token,))
            continue
        for at in range(len(word)):
            end = word[at:]
            if end == breaker[: len(end)]:
                rest = breaker[len(end) :]
                try:
                    tail = model.tokenize(rest.decode(), add_special=False, parse_special=False)
                except UnicodeDecodeError:
                    tail = None  # it is cut inside of a character: only llama.cpp itself can tokenise it
                found.add((token, *tail[:20]) if tail is not None else (token, -1))
    return found


@pytest.mark.parametrize("text", ["\n", ":", "ab", "the", "\n\n", " ##", "é", "日本", "🙂", "x" * 50, "</s>", "'s a"])
def test_breakers_are_those_of_llama_cpp(real_model: Model, text: str) -> None:
    prepared = Sampling(real_model, SamplingParams(dry_multiplier=1, dry_sequence_breakers=(text,)))
    found = {tuple(sequence) for sequence in prepared.breaker_sequences}
    expected = llama_cpp_breakers(real_model, text)
    cut = {sequence[0] for sequence in expected if sequence[-1] == -1}
    assert {one for one in found if one[0] not in cut} == {one for one in expected if one[0] not in cut}
    assert cut <= {one[0] for one in found}


def test_breakers_of_several_are_listed_once(model: Model) -> None:
    def of(*texts: str) -> list[list[int]]:
        return Sampling(model, SamplingParams(dry_multiplier=1, dry_sequence_breakers=texts)).breaker_sequences

    a, b = (sorted(map(list, llama_cpp_breakers(model, text))) for text in "ab")
    assert [97] in a and of("a") == a
    assert of("a", "b", "a") == sorted([*a, *(one for one in b if one not in a)])
    assert [97, 98] in of("ab") and of("ab", "a").count([97, 98]) == 1
    assert of() == []
    for params in ({"dry_multiplier": 0}, {"dry_base": 0.5}, {"dry_penalty_last_n": 0}):
        assert Sampling(model, SamplingParams(**{"dry_multiplier": 1, **params})).breaker_sequences == []


def test_breakers_that_most_tokens_hold_are_refused(real_model: Model) -> None:
    letters = tuple("abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(InvalidRequest, match="more than 32768 tokens of this model hold one") as caught:
        Sampling(real_model, SamplingParams(dry_multiplier=1, dry_sequence_breakers=letters))
    assert caught.value.param == "dry_sequence_breakers"
    assert Sampling(real_model, SamplingParams(dry_multiplier=1)).breaker_sequences, "and the usual ones are taken"


def test_what_was_prepared_samples_the_same(core: Driver, model: Model) -> None:
    for fields in (DRY, {**DRY, "dry_sequence_breakers": ("AB", "C")}, REPETITIVE, {"repeat_penalty": 2.0}):
        params = sampled(**fields)
        texts = [core.generate(PROMPT, params, prepared=prepared).text for prepared in (None, Sampling(model, params))]
        assert texts[0] == texts[1]
