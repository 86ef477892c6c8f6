"""How texts are judged against llama-server's own."""

from __future__ import annotations

import math
from typing import Any

from bench.answers import Outcome
from bench.equality import judge, tally


def token(text: str, other: str, gap: float, n: int) -> dict[str, Any]:
    """One entry of llama-server's logprobs: the chosen token and the second best, ``gap`` apart."""
    best = {"id": 2 * n, "token": text, "bytes": list(text.encode()), "logprob": -0.5}
    second = {"id": 2 * n + 1, "token": other, "bytes": list(other.encode()), "logprob": -0.5 - gap}
    return best | {"top_logprobs": [best, second]}


LOGPROBS = [
    token("The", "A", 2.0, 0),
    token(" the", " there", 0.1, 1),
    token(" cat", " dog", 0.3, 2),
    token(" Zürich", " Bern", 1.5, 3),
]
REFERENCE = "The the cat Zürich"


def test_equal_texts_are_exact() -> None:
    assert judge(REFERENCE, LOGPROBS, REFERENCE).kind == "exact"


def test_the_other_token_of_a_near_tie_is_accepted() -> None:
    verdict = judge(REFERENCE, LOGPROBS, "The the dog barks")
    assert (verdict.kind, verdict.at_token) == ("tie", 2)
    assert verdict.gap is not None
    assert math.isclose(verdict.gap, 0.3)


def test_the_other_token_of_a_clear_choice_is_not() -> None:
    verdict = judge(REFERENCE, LOGPROBS, "The the cat Bern")
    assert (verdict.kind, verdict.at_token, verdict.gap) == ("different", 3, 1.5)


def test_the_divergence_may_lie_in_the_token_before_the_first_differing_byte() -> None:
    verdict = judge(REFERENCE, LOGPROBS, "The there was")
    assert (verdict.kind, verdict.at_token) == ("tie", 1)


def test_a_third_token_is_never_a_tie() -> None:
    assert judge(REFERENCE, LOGPROBS, "The the fish").kind == "different"


def test_an_early_end_needs_an_end_token_as_the_second_choice() -> None:
    ending = [*LOGPROBS[:3], token(" Zürich", "<|im_end|>", 0.2, 3)]
    assert judge(REFERENCE, ending, "The the cat").kind == "tie"
    assert judge(REFERENCE, LOGPROBS, "The the cat").kind == "different"


def test_a_longer_text_is_judged_at_the_reference_s_end_token() -> None:
    ended = [*LOGPROBS[:3], token("", " and", 0.2, 3)]
    assert judge("The the cat", ended, "The the cat and").kind == "tie"


def test_a_character_cut_by_the_limit_does_not_count() -> None:
    assert judge("The\ufffd", LOGPROBS, "The").kind == "exact"


def test_tally_counts_strict_prompts_apart() -> None:
    def out(text: str, prompt_tokens: int) -> Outcome:
        return Outcome(0, 1, 200, text=text, prompt_tokens=prompt_tokens, completion_tokens=4, logprobs=LOGPROBS)

    reference = [out(REFERENCE, 20), out(REFERENCE, 20), out(REFERENCE, 200)]
    ours = [out(REFERENCE, 20), out("The the dog", 20), out("The the dog", 201)]
    counts = tally(["a", "b", "c"], reference, ours)
    assert {key: counts[key] for key in ("exact", "tie", "different")} == {"exact": 1, "tie": 2, "different": 0}
    assert (counts["strict"], counts["strict_not_exact"], counts["token_counts_differ"]) == (2, 1, 1)
    assert [case["prompt"] for case in counts["cases"]] == ["b", "c"]
