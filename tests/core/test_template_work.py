"""What a chat template may cost: it comes with a file, and no messages may make it run for ever or end the process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mullama._core import Model
from mullama.errors import InvalidRequest

CHILD = """
import json, sys
from mullama._core import Model
from mullama.errors import MullamaError
path, given = sys.argv[1], json.load(sys.stdin)
model = Model(path, vocab_only=True)
for name, (template, messages) in given.items():
    print(name, end=" ", flush=True)  # the last one is what ended it
    try:
        twin = model.twin(chat_template=template)
        try:
            text = twin.render_chat(json.dumps(messages).encode())
        finally:
            twin.close()
    except MullamaError as error:
        print("refused", flush=True)
    else:
        print("rendered", flush=True)
"""
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "hi"}]
DEEP = "{% set ns = namespace(a=[]) %}{% for i in range(4000) %}{% set ns.a = [ns.a] %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"

REFUSED = {
    "a loop in a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{{ range(10000000000) | length }}",
    "a range that overflows": "{{ range(0, 9223372036854775807, 3) | length }}",
    "a text that is doubled": DOUBLED.replace("START", "'x'").replace("STEP", "ns.x + ns.x"),
    "a text that is joined": DOUBLED.replace("START", "'x'").replace("STEP", "[ns.x, ns.x] | join"),
    "an array that is doubled": DOUBLED.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
    "a block that is doubled": "{% set x = 'x' * 1000 %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "a product": "{{ 'x' * 10000000000 }}",
    "a replacement": "{{ ('x' * 90000).replace('x', 'y' * 90000) | length }}",
    "a replacement of nothing": "{{ ('x' * 90000).replace('', 'y' * 90000) | length }}",
    "arrays of one array": DOUBLED.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x | tojson }}",
    "their text": DOUBLED.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x | string }}",
    "an array in itself": "{% set a = [1] %}{% set b = a.append(a) %}{{ a }}",
    "its text": "{% set a = [1] %}{% set b = a.append(a) %}{{ a | string }}",
    "arrays in arrays, as text": DEEP + "{{ ns.a | string }}",
    "arrays in arrays, compared": DEEP + "{{ ns.a == [[1]] }}{{ {'x': ns.a} == {'x': ns.a} }}" + "{{ ns.a | tojson }}",
    "nothing divides": "{{ 5 is divisibleby(0) }}",
    "a macro in a loop": "{% macro f(n) %}{% for i in range(99) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
}
RENDERED = {
    "arrays in arrays": DEEP + "{{ ns.a | length }}",
    "arrays appended to each other": "{% set ns = namespace(a=[]) %}{% set root = ns.a %}{% for i in range(3000) %}"
    "{% set b = [] %}{% set c = ns.a.append(b) %}{% set ns.a = b %}{% endfor %}{{ root | length }}",
    "an array that holds itself": "{% set a = [1] %}{% set b = a.append(a) %}{{ a | length }}",
    "minus one divides": "{{ (-9223372036854775807 - 1) is divisibleby(-1) }}",
    "numbers beyond integers": "{{ 1 % 0 }}{{ 9223372036854775807 * 2 }}{{ (9223372036854775807 * 2.0) | int }}"
    "{{ -9223372036854775807 - 9 }}",
    "steps beyond integers": "{{ [1, 2][1::9223372036854775807] | length }}{{ 'ab'[::-9223372036854775808] }}",
    "values of every type in order": "{% set a = range(40) | list %}{% set a = a + ['x', none, 1.5, [], {}, true] %}"
    "{{ (a + a) | sort | length }}{{ {'b': 1, 'a': none, 'c': []} | dictsort(by='value') | length }}",
    "indents": "{{ messages | tojson(indent=9999999999) | length }}{{ 'a\\nb' | indent(9999999999) | length }}",
    "a long text": "{% for m in messages %}{{ m.content | upper | lower | trim }}{% endfor %}" * 50,
}


def outcomes(path: Path, given: dict[str, tuple[str, list[dict[str, str]]]]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(path)],
        input=json.dumps(given), capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-500:])
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())  # type: ignore[misc]


def test_what_costs_more_than_the_chat_is_worth_is_refused(tiny_model: Callable[..., Path]) -> None:
    given = {name: (template, CHAT) for name, template in {**REFUSED, **RENDERED}.items()}
    expected = {**dict.fromkeys(REFUSED, "refused"), **dict.fromkeys(RENDERED, "rendered")}
    assert outcomes(tiny_model(), given) == expected


def test_what_only_some_messages_lead_to_is_refused_then(tiny_model: Callable[..., Path]) -> None:
    """A trial with a few messages, as a new file gets, shows nothing."""
    bomb = "{% if messages | length > 3 %}{% for a in range(1000000000) %}{% endfor %}{% endif %}ok"
    given = {"few": (bomb, CHAT), "many": (bomb, CHAT + CHAT), "few again": (bomb, CHAT)}
    found = outcomes(tiny_model(), given)
    assert found == {"few": "rendered", "many": "refused", "few again": "rendered"}


def test_long_chats_are_worth_more(tiny_model: Callable[..., Path]) -> None:
    """5,000 messages; 300 with a loop over all of them for each; one of 2 MB with a million separators, which took a
    time that grew with their square."""
    chatml = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    square = "{% for m in messages %}{% for o in messages %}{% if o.role == 'x' %}x{% endif %}{% endfor %}{% endfor %}"
    cut = "{% for m in messages %}{{ m.content.split('|')[-1] }}{{ m.content.rsplit('|', 1)[0] | length }}"
    cut += "{{ m.content.replace('|', '-') | length }}{{ m.content.replace('|', '') | length }}{% endfor %}"
    one = {"role": "user", "content": "hello there"}
    given = {
        "long": (chatml, [one] * 5000),
        "square": (square, [one] * 300),
        "separators": (cut, [{"role": "user", "content": "a|" * 1_000_000}]),
    }
    assert outcomes(tiny_model(), given) == dict.fromkeys(given, "rendered")


TEXTS = st.text("ab|", max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.text("ab|", min_size=1, max_size=2), TEXTS, st.integers(-1, 3))
def test_cutting_and_replacing_are_python_s(
    twins: Callable[[str], Model], text: str, part: str, other: str, most: int
) -> None:
    def rendered(expression: str) -> str:
        shown = expression.replace("TEXT", json.dumps(text)).replace("PART", json.dumps(part))
        shown = shown.replace("OTHER", json.dumps(other)).replace("MOST", str(most))
        model = twins("{{ (" + shown + ") | tojson }}")
        try:
            return model.render_chat(json.dumps(CHAT).encode())
        finally:
            model.close()

    assert json.loads(rendered("TEXT.split(PART)")) == text.split(part)
    assert json.loads(rendered("TEXT.split(PART, MOST)")) == text.split(part, most)
    assert json.loads(rendered("TEXT.rsplit(PART, MOST)")) == text.rsplit(part, most)
    assert json.loads(rendered("TEXT.replace(PART, OTHER)")) == text.replace(part, other)


@pytest.fixture
def twins(models: Callable[..., Model]) -> Callable[[str], Model]:
    return lambda template: models("llama").twin(chat_template=template)


def test_the_error_says_what_it_is(twins: Callable[[str], Model]) -> None:
    model = twins(REFUSED["a range"])
    with pytest.raises(InvalidRequest, match="does more work than this chat is worth"):
        model.render_chat(json.dumps(CHAT).encode())
    model.close()
