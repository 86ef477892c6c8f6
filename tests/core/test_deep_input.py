"""Input that is nested thousands of times: an error, no stack that overflows; in children, for that is their end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mullama._core import Model
from mullama.errors import MullamaError
from mullama.models.files import gguf

CHILD = """
import json, sys
from mullama._core import Model
from mullama.errors import MullamaError
path, templates = sys.argv[1], json.load(sys.stdin)
for name, template in templates.items():
    try:
        model = Model(path, vocab_only=True, chat_template=template)
        try:
            model.render_chat(json.dumps([{"role": "user", "content": "hi"}]).encode())
        finally:
            model.close()
    except MullamaError as error:
        print(name, "refused", flush=True)
    else:
        print(name, "rendered", flush=True)
"""


def templates(n: int) -> dict[str, str]:
    """One of each kind of nesting, ``n`` deep."""
    return {
        "parentheses": "{{ " + "(" * n + "1" + ")" * n + " }}",
        "lists": "{{ " + "[" * n + "]" * n + " }}",
        "objects": "{{ " + '{"a":' * n + "1" + "}" * n + " }}",
        "not": "{{ " + "not " * n + "1 }}",
        "minus": "{{ " + "-" * n + "1 }}",
        "plus": "{{ " + "1+" * n + "1 }}",
        "or": "{{ " + "false or " * n + "1 }}",
        "choices": "{{ " + "1 if 1 else " * n + "2 }}",
        "filters": "{{ 'a'" + "|upper" * n + " }}",
        "members": "{{ messages" + ".x" * n + " }}",
        "subscripts": "{{ messages" + "[0]" * n + " }}",
        "calls": "{{ " + "range(" * n + "1" + ")" * n + " }}",
        "ifs": "{% if true %}" * n + "x" + "{% endif %}" * n,
        "branches": "{% if false %}x" + "{% elif false %}y" * n + "{% endif %}",
        "loops": "{% for m in [1] %}" * n + "x" + "{% endfor %}" * n,
    }


def outcomes(path: Path, given: dict[str, str]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(path)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-500:])
    return dict(line.split(" ") for line in done.stdout.splitlines())


@pytest.mark.parametrize("n", [1_000, 20_000])
def test_a_template_that_is_nested_too_deeply_is_refused(tiny_model: Callable[..., Path], n: int) -> None:
    given = templates(n)
    assert outcomes(tiny_model(), given) == dict.fromkeys(given, "refused")


def test_a_template_that_calls_or_holds_itself_is_refused(tiny_model: Callable[..., Path]) -> None:
    given = {
        "macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "two": "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "value": "{% set ns = namespace(x=1) %}{% set ns.x = ns %}{{ ns.x|tojson }}",
    }
    assert outcomes(tiny_model(), given) == dict.fromkeys(given, "refused")


def test_what_templates_really_do_is_rendered(tiny_model: Callable[..., Path]) -> None:
    """Twenty deep, and long flat lists."""
    given = {
        name: text for name, text in templates(20).items() if name not in ("members", "subscripts", "calls")
    }  # which are errors of their own
    given["flat"] = "{{ [" + "1," * 5_000 + "1]|length }}"
    given["text"] = "{% if true %}x{% endif %}" * 5_000
    assert outcomes(tiny_model(), given) == dict.fromkeys(given, "rendered")


def nested_array(depth: int) -> bytes:
    """A GGUF header whose one value is an array of arrays of arrays."""
    import struct

    key = b"general.architecture"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<I", 9)
    return head + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 1) + struct.pack("<I", 7) + bytes(64)


@pytest.mark.parametrize("depth", [1, 2, 100, 100_000])
def test_metadata_of_nested_arrays_is_refused(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(nested_array(depth))
    with pytest.raises(MullamaError):
        gguf.check(path, label="m")
    with pytest.raises(MullamaError):
        Model(path, vocab_only=True)
