"""Chat templates and messages through llama.cpp's Jinja: refused, or rendered, within bounded work; the process lives.

An input is the template; what comes behind a NUL, if anything, are the messages as JSON.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from mullama._core import Model, set_log_level
from mullama.engine.requests.chat_text import ControlTokens
from mullama.errors import MullamaError

from .targets import corpus, shaken

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_end|>"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": [{"type": "text", "text": "é漢🙂"}]},
]
STATEMENTS = [
    "{% for m in messages %}{{ m['role'] }}: {{ m.content }}\n{% endfor %}", "{% set x = namespace(a=1) %}",
    "{% set x.a = x.a + 1 %}", "{% if messages[0].role == 'system' %}s{% elif x %}y{% else %}n{% endif %}",
    "{{ messages | length }}", "{{ messages | map(attribute='role') | list | join(',') }}", "{{ loop.index0 }}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}", "{{ f(1) }}", "{% call f(1) %}c{% endcall %}",
    "{{ messages[::-1] }}", "{{ 'a,b'.split(',')[-1] }}", "{{ raise_exception('no') }}", "{{ range(3) | list }}",
    "{{ messages | tojson(indent=2) }}", "{{ 'x' * 3 }}", "{{ 7 // 2 - 1 ** 2 % 3 }}", "{%- set y -%} z {%- endset -%}",
    "{{ strftime_now('%Y') }}", "{% filter upper %}a{% endfilter %}", "{{ x is defined and x is not none }}",
    "{% generation %}g{% endgeneration %}", "{{ {'a': [1, 2.5, none, true]}.items() | list }}", "{{ 'é'[0] }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | first }}", "{{ 'a'.replace('a', 'b').strip().title() }}",
    "{{ ('%s-%d' | format('a', 1)) ~ 2 }}", "{# comment #}", "{{ x.y.z | default('d') }}", "{% break %}",
    "{{ [3, 1, 2] | sort(reverse=true) }}", "{{ messages | groupby('role') }}", "{{ 1 if x else 2 }}", "{{ -(-1) }}",
    "{{ dict(a=1) | dictsort }}", "{{ 'abc'[1:9:-1] }}", "{{ messages[0]['content'][:2] + 'b' }}", "{{ 'a' in 'abc' }}",
]  # fmt: skip


class Target:
    words = (
        b"{{ }} {% %} {# #} {%- -%} for endfor if elif else endif set macro endmacro call endcall filter namespace "
        b"messages loop. range( |length |tojson |join |map |select |reject |sort |indent |replace |int |float |string "
        b"|items defined not in is content role tools ** // ~ recursive [::-1] none true divisibleby append dictsort"
    ).split()

    def __init__(self) -> None:
        set_log_level("none")
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "m.gguf"
        path.write_bytes(corpus("vocabularies")["bpe"])
        self._model = Model(path, vocab_only=True)
        self._control = ControlTokens([("<|im_start|>", False, False), ("<|im_end|>", False, True)])

    def __call__(self, data: bytes) -> None:
        source, _, messages = data.partition(b"\0")
        template = source.decode("utf-8", "replace")
        try:
            given = json.dumps(json.loads(messages)).encode() if messages else json.dumps(MESSAGES).encode()
        except (ValueError, RecursionError):
            given = messages
        try:
            model = self._model.twin(chat_template=template)
        except MullamaError:
            return
        try:
            for prompt in (True, False):
                self._render(model, given, prompt)
        finally:
            model.close()

    def _render(self, model: Model, given: bytes, prompt: bool) -> None:
        try:
            text = model.render_chat(given, add_generation_prompt=prompt)
            shown = self._control.render(lambda data: model.render_chat(data, add_generation_prompt=prompt), given)
        except MullamaError as error:
            assert len(str(error)) < 2000
            return
        assert isinstance(text, str) and isinstance(shown, str)
        parts = getattr(shown, "parts", ())
        assert not parts or "".join(part for part, _ in parts) == shown

    def change(self, rng: random.Random, data: bytes) -> bytes:
        """A statement put in, taken out or doubled."""
        source, nul, messages = data.partition(b"\0")
        at = rng.choice([0, len(source), *(i for i in range(len(source)) if source[i : i + 1] in (b"{", b"}"))])
        how = rng.randrange(4)
        if how == 0:
            source = source[:at] + rng.choice(STATEMENTS).encode() + source[at:]
        elif how == 1:
            end = source.find(b"}", at) + 2
            source = source[:at] + source[max(end, at) :]
        elif how == 2:
            inside = rng.choice(STATEMENTS)[2:-2].encode()
            source = source[:at] + inside + source[at:]
        else:
            source = shaken(rng, source)
        return source + nul + messages

    def close(self) -> None:
        self._folder.cleanup()
