"""Texts that are held to a constraint: whatever the model would rather write, what comes out is allowed and whole."""

# ruff: noqa: E501 - the tables

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from core_support import Driver, sampled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mullama._core import Model, Sampling, constraint_library
from mullama.errors import InvalidRequest
from mullama.types import Constraint, ConstraintKind, SamplingParams

PROMPT = "Tell me of the sea"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", "青"]}, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                        "required": ["zip"], "additionalProperties": False}},
}  # fmt: skip
LARK = 'start: "<" WORD ("," WORD)* ">"\nWORD: /[a-z]{1,5}/'
GBNF = 'root ::= "<" word ("," word)* ">"\nword ::= [a-z] [a-z]? [a-z]?'
LIST = r"<[a-z]{1,5}(,[a-z]{1,5})*>"


def schema(value: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value))


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


KINDS: dict[str, tuple[Constraint, Callable[[str], Any]]] = {
    "schema": (schema(PERSON), is_person),
    "object": (Constraint(ConstraintKind.JSON_OBJECT), lambda text: isinstance(json.loads(text), dict)),
    "regex": (Constraint(ConstraintKind.REGEX, r"[0-9]{3}-(ab|cd)+;"), re.compile(r"[0-9]{3}-(ab|cd)+;").fullmatch),
    "choice": (Constraint(ConstraintKind.CHOICE, '["a.b", "a+", "größer", "a\\nb"]'), ["a.b", "a+", "größer", "a\nb"].count),
    "lark": (Constraint(ConstraintKind.LARK, LARK), re.compile(LIST).fullmatch),
    "gbnf": (Constraint(ConstraintKind.GBNF, GBNF), re.compile(LIST).fullmatch),
}  # fmt: skip


def held(constraint: Constraint, *, seed: int = 1, max_tokens: int = 400, **more: Any) -> SamplingParams:
    return sampled(max_tokens, constraint=constraint, seed=seed, ignore_eos=False, **more)


def test_the_library_is_the_one_that_is_known() -> None:
    assert constraint_library()["problem"] is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 40}, {"repeat_penalty": 1.3}, {"mirostat": 2}])
def test_every_text_is_what_it_has_to_be(core: Driver, kind: str, options: dict[str, Any]) -> None:
    constraint, is_right = KINDS[kind]
    n_whole = 0
    for seed in range(3):
        output = core.generate(PROMPT, held(constraint, seed=seed, **options))
        if output.reason == "stop":
            n_whole += 1
            assert is_right(output.text), output.text
        else:  # a model that is greedy may write one list to the end of its days
            assert output.reason == "length"
    assert n_whole or options.get("temperature") == 0


def test_together_as_alone(core: Driver) -> None:
    alone = [core.generate(PROMPT, held(constraint)).text for constraint, _ in KINDS.values()]
    handles = [
        core.open(PROMPT, held(KINDS[kind][0]), slot=i) for i, kind in enumerate(list(KINDS)[: core.core.n_slots])
    ]
    core.finish_all()
    for handle, text in zip(handles, alone, strict=False):
        assert core.outputs[handle].text == text


def test_cut_by_max_tokens_is_length(core: Driver) -> None:
    output = core.generate(PROMPT, held(schema(PERSON), max_tokens=5))
    assert output.reason == "length" and output.facts.completion_tokens == 5
    assert output.text.lstrip().startswith("{")


def test_the_end_of_the_grammar_is_the_end(core: Driver) -> None:
    """Whatever asks for more."""
    for more in ({"min_tokens": 50}, {"ignore_eos": True}):
        output = core.generate(PROMPT, sampled(60, constraint=Constraint(ConstraintKind.REGEX, "abc"), **more))
        assert (output.reason, output.text) == ("stop", "abc")


def test_a_stop_string_ends_it_before(core: Driver) -> None:
    output = core.generate(PROMPT, held(Constraint(ConstraintKind.REGEX, "abc-def"), stop=("-",)))
    assert (output.reason, output.text) == ("stop", "abc")


def test_bias_cannot_break_it(core: Driver) -> None:
    bias = tuple((token, 100.0) for token in range(60, 90))
    output = core.generate(PROMPT, held(Constraint(ConstraintKind.REGEX, "[0-9]{4}"), logit_bias=bias))
    assert re.fullmatch("[0-9]{4}", output.text)


def test_it_begins_after_a_text(core: Driver) -> None:
    constraint = Constraint(ConstraintKind.REGEX, "[0-9]{4}", after=("th",))
    for seed in range(8):
        output = core.generate(PROMPT, held(constraint, seed=seed, max_tokens=400))
        before, _, rest = output.text.partition("th")
        assert output.reason == "length" or (re.fullmatch("[0-9]{4}", rest) and before is not None)
        if output.reason == "stop":
            return
    pytest.fail("none of them came to its end")


def test_it_begins_with_a_trigger(core: Driver) -> None:
    constraint = Constraint(ConstraintKind.REGEX, "q[0-9]{4}", triggers=("q",))
    output = core.generate(PROMPT, held(constraint, max_tokens=400, logit_bias=((ord("q"), 7.0),)))
    assert output.reason == "stop" and re.fullmatch("[^q]*q[0-9]{4}", output.text, re.DOTALL)


@pytest.mark.parametrize("save", [True, False])
def test_it_survives_a_preemption(core: Driver, save: bool) -> None:
    params = held(schema(PERSON), seed=4)
    wanted = core.generate(PROMPT, params).text
    handle = core.open(PROMPT, params, slot=1)
    core.prefill()
    core.step(7)
    parked = core.core.preempt(1, save=save)
    core.core.resume(0, parked)
    core.finish_all()
    assert core.outputs[handle].text == wanted


def test_a_cancelled_one_is_gone(core: Driver) -> None:
    for _ in range(20):
        core.open(PROMPT, held(schema(PERSON)))
        core.prefill()
        core.step(3)
        core.core.cancel(0)
        core.collect()


REFUSED = {
    "no JSON": (ConstraintKind.JSON_SCHEMA, "{", "schema"),
    "a type that is none": (ConstraintKind.JSON_SCHEMA, '{"type": "person"}', "person"),
    "a keyword that is not enforced": (ConstraintKind.JSON_SCHEMA, '{"type":"object","propertyNames":{"maxLength":3}}', "propertyNames"),
    "a format that is not enforced": (ConstraintKind.JSON_SCHEMA, '{"type":"string","format":"idn-email"}', "idn-email"),
    "nothing": (ConstraintKind.JSON_SCHEMA, "false", "cannot be enforced"),
    "a reference to nowhere": (ConstraintKind.JSON_SCHEMA, '{"$ref":"#/$defs/x"}', "cannot be enforced"),
    "a reference to another place": (ConstraintKind.JSON_SCHEMA, '{"$ref":"https://example.com/x"}', "cannot be enforced"),
    "an open door": (ConstraintKind.JSON_SCHEMA, '{"x-guidance":{"lenient":true},"format":"x"}', "lenient"),
    "an expression that is none": (ConstraintKind.REGEX, "[a", "regular expression"),
    "look-ahead": (ConstraintKind.REGEX, "a(?=b)", "look"),
    "no choices": (ConstraintKind.CHOICE, "[]", "choices"),
    "choices that are none": (ConstraintKind.CHOICE, '{"a":1}', "list of texts"),
    "no start": (ConstraintKind.LARK, 'a: "b"', "cannot be enforced"),
    "no rule": (ConstraintKind.LARK, "start: nowhere", "nowhere"),
    "no GBNF": (ConstraintKind.GBNF, "root ::= (", "GBNF"),
    "no root": (ConstraintKind.GBNF, 'a ::= "b"', "cannot be enforced"),
    "a NUL": (ConstraintKind.REGEX, "a\0b", "NUL"),
    "a lone surrogate": (ConstraintKind.REGEX, "a\ud800", "surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(model: Model, name: str) -> None:
    kind, text, reason = REFUSED[name]
    with pytest.raises(InvalidRequest, match=reason) as caught:
        Sampling(model, SamplingParams(constraint=Constraint(kind, text)))
    assert caught.value.param == "constraint"


def _rules(n: int, body: Callable[[int], str], last: str) -> str:
    return "\n".join([f"a{i}: {body(i)}" for i in range(n)] + [f"a{n}: {last}", "start: a0"])


BOMBS = {
    "a doubling of rules": (ConstraintKind.LARK, _rules(60, lambda i: f"a{i + 1} a{i + 1}", '"x"')),
    "a long chain of rules": (ConstraintKind.LARK, _rules(4_500, lambda i: f"a{i + 1}", '"x"')),
    "a chain without an end": (ConstraintKind.LARK, _rules(50_000, lambda i: f"a{i + 1}", '"x"')),
    "rules that only call themselves": (ConstraintKind.LARK, "start: a\na: b\nb: a"),
    "left recursion": (ConstraintKind.LARK, 'start: start start | start "a" | "a" | ""'),
    "nested repetitions of GBNF": (ConstraintKind.GBNF, 'root ::= ((("a"*)*)*)*'),
    "a deep GBNF": (ConstraintKind.GBNF, "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "repeated repetitions": (ConstraintKind.REGEX, "((((a{0,1000}){0,1000}){0,1000}){0,1000}){0,1000}"),
    "a wide repetition": (ConstraintKind.REGEX, "(a|b|c|[d-z]{2,900}){1000000}"),
    "exponential states": (ConstraintKind.REGEX, "(a|b)*a(a|b){400}"),
    "deep brackets": (ConstraintKind.REGEX, "(" * 100_000 + "a" + ")" * 100_000),
    "deep brackets, few": (ConstraintKind.REGEX, "(" * 199 + "a" + ")*" * 199),
    "a huge class": (ConstraintKind.REGEX, r"(\p{L}{1,500}\P{L}{1,500}){1,500}"),
    "a cycle of references": (ConstraintKind.JSON_SCHEMA, '{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}}}'),
    "a deep schema": (ConstraintKind.JSON_SCHEMA, '{"items":' * 100_000 + "{}" + "}" * 100_000),
    "deep JSON in a member": (ConstraintKind.JSON_SCHEMA, '{"const":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "exponential references": (ConstraintKind.JSON_SCHEMA, json.dumps({"$ref": "#/$defs/a0", "$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)} | {"a40": {"type": "string"}}})),
    "many alternatives": (ConstraintKind.JSON_SCHEMA, json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(8)]} for i in range(12)]})),
    "a huge enum": (ConstraintKind.JSON_SCHEMA, json.dumps({"enum": [f"value {i * 7919}" for i in range(40_000)]})),
    "a large schema": (ConstraintKind.JSON_SCHEMA, json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(30_000)}})),
    "a length beyond all": (ConstraintKind.JSON_SCHEMA, '{"type":"string","minLength":1000000000}'),
    "many items": (ConstraintKind.JSON_SCHEMA, '{"type":"array","minItems":100000000,"items":{"type":"array","minItems":1000000}}'),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_harmless(model: Model, name: str) -> None:
    kind, text = BOMBS[name]
    Sampling(model, SamplingParams(constraint=Constraint(ConstraintKind.REGEX, "a")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    try:
        Sampling(model, SamplingParams(constraint=Constraint(kind, text)))
        verdict = "taken"
    except InvalidRequest as error:
        verdict = error.message
    taken = time.monotonic() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(f"{name}: {taken * 1000:.0f} ms, {grown} MB, {verdict[:150]}")
    assert taken < 2 and grown < 64, verdict  # a second on a machine of its own


# -- schemas that nobody thought of ---------------------------------------------------------------------------------

_strings = st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 8)}) | st.sampled_from(
    [
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "uuid"},
        {"type": "string", "format": "ipv4"},
        {"type": "string", "minLength": 2, "maxLength": 3},
    ]
)
_numbers = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 99},
        {"type": "integer", "exclusiveMinimum": 3, "maximum": 10_000},
        {"type": "number", "minimum": 0.5, "maximum": 1.5},
        {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    ]
)
_leaves = (
    _strings | _numbers
    | st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "ü\n\"x\\"}, {"type": ["null", "boolean"]}])
    | st.lists(st.integers(-9, 9) | st.text(max_size=4) | st.none(), min_size=1, max_size=4).map(lambda of: {"enum": of})
)  # fmt: skip


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text('abzüξ_ "', min_size=1, max_size=4)
    objects = st.dictionaries(names, inner, max_size=4).flatmap(
        lambda of: st.sets(st.sampled_from(sorted(of)) if of else st.nothing()).map(
            lambda wanted: {
                "type": "object",
                "properties": of,
                "required": sorted(wanted),
                "additionalProperties": False,
            }
        )
    )
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        inner, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    return objects | arrays | st.lists(inner, min_size=1, max_size=3).map(lambda of: {"anyOf": of})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(of=st.recursive(_leaves, _nested, max_leaves=8), seed=st.integers(0, 100))
def test_any_schema(core: Driver, of: Any, seed: int) -> None:
    output = core.generate(PROMPT, held(schema(of), seed=seed, max_tokens=400))
    if output.reason == "stop":
        jsonschema.Draft202012Validator(of).validate(json.loads(output.text))
    else:
        assert output.reason == "length"
