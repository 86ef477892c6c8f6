"""``usage`` and ``profile`` of several choices."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from mullama.types import Finish, FinishReason, LoraUse, Profile, WeightSpan
from mullama.web.openai.fingerprint import fingerprint_of
from mullama.web.openai.usage import profile_fields, total

from .fake_engine import model_info

#: A value other than the default for every field of a profile.
GIVEN: dict[str, Any] = {
    "time_to_first_token_ms": 5.0,
    "kv_cache_source": "host",
    "kv_miss_reason": "evicted",
    "weights": (WeightSpan("w", 0),),
    "adapters": (LoraUse("a", 0.5),),
    "kernels": {"Q4_1": "plain"},
}


def full() -> Profile:
    given = {f.name: GIVEN.get(f.name, 3.0 if isinstance(f.default, float) else 3) for f in fields(Profile)}
    return Profile(**given)


@pytest.mark.parametrize("field", [f.name for f in fields(Profile)])
def test_a_total_forgets_no_field(field: str) -> None:
    assert getattr(total([full(), full()]), field) != getattr(Profile(), field), field


def test_the_profile_of_several_choices_has_what_theirs_have() -> None:
    finishes = [Finish(FinishReason.STOP, full()), Finish(FinishReason.STOP, replace(full(), prompt_tokens=4))]
    both = profile_fields(finishes)
    assert set(both["profile"]) == set(both["profiles"][0])
    assert both["profile"]["adapters"] == both["profiles"][0]["adapters"]
    assert both["profile"]["prompt_tokens"] == 7


def test_a_profile_says_all_that_it_has() -> None:
    one = replace(full(), queue_ms=1.23456)
    assert one.to_dict() == {**asdict(one), "queue_ms": 1.235}
    assert one.to_dict()["kernels"] is not one.kernels, "the engine has one for all of its requests"


def test_the_fingerprint_names_weights_build_and_kernels() -> None:
    info = model_info()
    ways = {"Q4_1": {"columns": {"1": "plain", "8": "tiles"}, "bytes": {}}}
    others = [replace(info, weights="q8"), replace(info, kernels=ways), replace(info, size_bytes=1)]
    found = [fingerprint_of(one) for one in (info, *others)]
    assert len(set(found)) == 4
    assert found == [fingerprint_of(one) for one in (info, *others)]
    assert fingerprint_of(replace(info, created=info.created + 1)) == found[0], "a restart changes nothing"
