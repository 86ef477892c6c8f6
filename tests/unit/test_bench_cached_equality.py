"""How texts of a cache are judged against those without."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_bench_equality import LOGPROBS, REFERENCE

from bench import cached_equality
from bench.answers import Outcome
from bench.cached_equality import COMPUTING, KINDS, Probe, Tally, prompts, report, request, verdict_of
from bench.context import MULLAMA, PEER
from bench.prompts import PromptMaker
from bench.servers import Server


class Asked(Probe):
    """A probe that knows the answer, and counts."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        super().__init__(Server("no", PEER, [], 0))
        self.entries = entries
        self.places: list[int] = []

    def logprobs(self, prompt: str, text: str, at_byte: int) -> list[dict[str, Any]]:
        self.places.append(at_byte)
        return self.entries


def out(text: str, **fields: Any) -> Outcome:
    return Outcome(0, 1, text=text, **fields)


KNOWN = out(REFERENCE, logprobs=LOGPROBS)


def test_prompts_share_their_beginnings_in_random_order() -> None:
    made = prompts(PromptMaker(3), 7, 120)
    assert made == prompts(PromptMaker(3), 7, 120) and len(made) == len(set(made)) == 120
    assert made != prompts(PromptMaker(3), 8, 120)
    words = [text.split() for text in made]
    begins = {tuple(text[:12]) for text in words}
    assert len(begins) <= cached_equality.N_SHORT + cached_equality.N_LONG
    assert max(map(len, words)) > 400 and min(map(len, words)) < 100
    assert any(b.startswith(a) for a in made for b in made if a != b), "no chat goes on"


def test_a_cache_is_on_or_off() -> None:
    bodies = {name: json.loads(request(name, "x", 5).partition(b"\r\n\r\n")[2]) for name in KINDS}
    assert "cache_salt" not in bodies[MULLAMA] and bodies[MULLAMA + COMPUTING]["cache_salt"] == "alone-5"
    assert bodies[PEER]["cache_prompt"] is True and bodies[PEER + COMPUTING]["cache_prompt"] is False
    assert all(body["temperature"] == 0 for body in bodies.values())


@pytest.mark.parametrize(
    ("computed", "text", "kind"),
    [
        (REFERENCE, REFERENCE, "exact"),
        (REFERENCE, "The the dog barks", "tie"),
        ("The the dog barks", REFERENCE, "tie"),  # either of the two may be as the reference
        (REFERENCE, "The the cat Bern", "different"),
        ("The the dog barks", "The the dog barks", "exact"),
    ],
)
def test_the_reference_judges_as_far_as_it_agrees(computed: str, text: str, kind: str) -> None:
    probe = Asked([])
    assert verdict_of("p", KNOWN, computed, text, probe).kind == kind
    assert probe.places == []


def test_where_the_reference_went_another_way_it_is_asked() -> None:
    probe = Asked(LOGPROBS)
    verdict = verdict_of("p", out("A the"), REFERENCE, "The the dog barks", probe)
    assert (verdict.kind, probe.places) == ("tie", [len("The the ")])


def test_an_early_end_agrees_as_well() -> None:
    """The reference ends where one of the two does."""
    probe = Asked([])
    ended = [*LOGPROBS[:3], LOGPROBS[3] | {"id": 9, "bytes": [], "top_logprobs": [{"id": 6, **second()}]}]
    verdict = verdict_of("p", out("The the cat", logprobs=ended), "The the cat", "The the cat Zürich", probe)
    assert verdict.kind == "tie" and probe.places == []


def second() -> dict[str, Any]:
    return {"token": " Zürich", "bytes": list(" Zürich".encode()), "logprob": -0.6}


def test_the_counts_say_whether_it_holds() -> None:
    texts = ["a", "b", "c"]
    same = [out(REFERENCE, logprobs=LOGPROBS, prompt_tokens=9, cached_tokens=0) for _ in texts]
    cached = [out(REFERENCE, cached_tokens=8), out("The the dog"), out("The the cat Bern")]
    answers = {MULLAMA: same, MULLAMA + COMPUTING: same, PEER: cached, PEER + COMPUTING: same}
    tally = Tally()
    for block in (slice(0, 1), slice(1, 3)):
        part = {name: outs[block] for name, outs in answers.items()}
        tally.add(texts[block], part, dict.fromkeys(KINDS, 1.5), Asked([]))
    assert tally.short() == "mullama 3+0+0, llama-server 1+1+1, mullama, computing 3+0+0"
    found = tally.result()
    theirs = found["against"][f"{PEER} | {PEER + COMPUTING}"]
    assert (theirs["exact"], theirs["tie"], theirs["different"]) == (1, 1, 1)
    assert [case["verdict"] for case in theirs["cases"]] == ["tie", "different"]
    assert found["holds"] and found["servers"][PEER] == {"prompt_tokens": 0, "cached_tokens": 8, "seconds": 3.0}
    assert "3 prompts" in report(found)
    swapped = {MULLAMA: cached, MULLAMA + COMPUTING: same, PEER: same, PEER + COMPUTING: same}
    other = Tally()
    other.add(texts, swapped, dict.fromkeys(KINDS, 1.5), Asked([]))
    assert not other.result()["holds"]
