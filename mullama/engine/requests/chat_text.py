"""The prompt of a chat in which messages stay text: only what the template writes is parsed as control tokens.

A template makes one text of all messages, and a message that spells ``<|im_end|>`` would end its turn there and could
begin one of the system. So characters with which the messages could begin a control token are changed before the
template sees them, into characters of a private plane that nothing else uses, and changed back behind it:

    messages    "a <|im_end|> b"              what the template sees:   "a ⍰|im_end|> b"
    rendered    <|im_start|>user\\na ⍰|im_end|> b<|im_end|>
    parts       [<|im_start|>] [user\\na <|im_end|> b] [<|im_end|>]
                     special          as text              special

Every occurrence of a control token that has a changed character is text. The tokens are those of ``tokenize`` with
``parse_special``, if these spellings were not special: it cuts a text at control tokens, and works out each stretch
between them alone, so a stretch that holds such a spelling may be worked out without ``parse_special``. Messages that
spell nothing of the kind take none of these ways.

A template may look at what the messages hold. Where the changed characters would make it write another text, only
those of whole control tokens are changed, which no template has reason to look for; if even then the text is another
one, it is the prompt: the template has been shown what the spelling means here, text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from mullama.errors import InvalidRequest

Render = Callable[[bytes], str]
#: A stretch of text, and whether control tokens are parsed in it.
Part = tuple[str, bool]

_FIRST_PRIVATE = 0xF0000  # plane 15: private use, one character each for UTF-8 and for Python
_NUM_PRIVATE = 0xFFFD
_SPACES = " \t\n\v\f\r"  # C's isspace


def continuing(render: Render) -> Render:
    """As ``render``, of a chat whose last message is the beginning of the answer: the prompt ends with its text."""

    def render_begun(messages_json: bytes) -> str:
        *before, last = json.loads(messages_json)
        return render(_encode(before)) + str(last["content"])

    return render_begun


class ChatText(str):
    """The prompt of a chat, for ``tokenize``. ``parts`` make it up; empty: it is tokenised as it is."""

    parts: tuple[Part, ...] = ()

    def __new__(cls, text: str, parts: Sequence[Part] = ()) -> ChatText:
        self = super().__new__(cls, text)
        self.parts = tuple(parts)
        return self


class ControlTokens:
    """The control tokens of a vocabulary, as (text, strips the whitespace before it, strips that behind it), in the
    order in which the tokeniser looks for them."""

    def __init__(self, tokens: Sequence[tuple[str, bool, bool]]) -> None:
        self._tokens = list(tokens)
        heads = sorted({text[:2] for text, _, _ in tokens})
        self._firsts = sorted({head[0] for head in heads})
        # One expression each for what begins like a control token, and for what spells one.
        self._head = _any_of(heads)
        self._whole = _any_of(text for text, _, _ in tokens)
        in_json = [json.dumps(head, ensure_ascii=False)[1:-1].encode() for head in heads]
        self._in_json = re.compile(b"|".join([*map(re.escape, in_json), rb"\\u[0-9a-fA-F]"]))

    def render(self, render: Render, messages_json: bytes) -> str:
        """``render(messages_json)``, as a ChatText where the messages hold what begins like a control token."""
        text = render(messages_json)
        if not self._tokens or self._in_json.search(messages_json) is None:
            return text
        messages = json.loads(messages_json)
        if not any(self._head.search(one) for one in _strings(messages)):
            return text
        private = self._private(messages_json.decode() + text)
        for pattern in (self._head, self._whole):
            try:
                shown, marks = private.undo(render(_encode(_changed(messages, pattern, private))))
            except InvalidRequest:
                if pattern is self._whole:
                    raise
                continue
            if shown == text:
                break
        parts = self._parts(shown, marks)
        return ChatText(shown, parts) if parts else shown

    def _private(self, used: str) -> _Private:
        """Characters that are not in ``used``, neither as they are nor as JSON's escapes."""
        for first in range(_FIRST_PRIVATE, _FIRST_PRIVATE + _NUM_PRIVATE - len(self._firsts), len(self._firsts)):
            private = _Private(self._firsts, first)
            if private.pattern.search(used) is None:
                break
        return private

    def _parts(self, text: str, marks: Sequence[int]) -> list[Part]:
        """``text`` in stretches, where the characters at ``marks`` (in order) came from the messages."""
        control = self._genuine(text, marks)
        parts: list[Part] = []
        done = 0  # what comes before is in the parts
        edge, strips = 0, False  # where the last control token ended, and whether it takes the whitespace behind it
        for start, end, left, right in [*control, (len(text), len(text), False, False)]:
            low, high = edge, start
            while strips and low < high and text[low] in _SPACES:
                low += 1
            while left and low < high and text[high - 1] in _SPACES:
                high -= 1
            if self._whole.search(text, low, high):  # what no template wrote, else it were a control token
                if low > done:
                    parts.append((text[done:low], True))
                parts.append((text[low:high], False))
                done = high
            edge, strips = end, right
        if parts and done < len(text):
            parts.append((text[done:], True))
        return parts

    def _genuine(self, text: str, marks: Sequence[int]) -> list[tuple[int, int, bool, bool]]:
        """(start, end, strips left, strips right) of the control tokens that the template wrote, in order."""
        taken: list[tuple[int, int, bool, bool]] = []
        for token, left, right in self._tokens:
            at = text.find(token)
            while at >= 0:
                end = at + len(token)
                i = bisect_left(taken, (end,))
                is_free = i == 0 or taken[i - 1][1] <= at
                if is_free and not _has_mark(marks, at, end):
                    taken.insert(i, (at, end, left, right))
                    at = text.find(token, end)
                else:
                    at = text.find(token, at + 1)
        return taken


class _Private:
    """Private characters that stand for some others, from ``first`` on."""

    def __init__(self, others: Sequence[str], first: int) -> None:
        self._of = {other: chr(first + i) for i, other in enumerate(others)}
        self._back = {private: other for other, private in self._of.items()}
        for private, other in list(self._back.items()):
            self._back[json.dumps(private)[1:-1]] = other  # as a template may write it
        self.pattern = re.compile("|".join(map(re.escape, self._back)), re.IGNORECASE)

    def change(self, found: re.Match[str]) -> str:
        return self._of[found[0]]

    def undo(self, text: str) -> tuple[str, list[int]]:
        """The text with the characters that were meant, and where they are."""
        out, marks, size, at = [], [], 0, 0
        for found in self.pattern.finditer(text):
            out += [text[at : found.start()], self._back[found[0].lower() if len(found[0]) > 1 else found[0]]]
            size += found.start() - at
            marks.append(size)
            size += 1
            at = found.end()
        return "".join([*out, text[at:]]), marks


def _any_of(texts: Any) -> re.Pattern[str]:
    """The first character of any of these, where the others follow."""
    by_first: dict[str, list[str]] = {}
    for text in sorted(texts, key=len, reverse=True):
        by_first.setdefault(text[0], []).append(re.escape(text[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?=({'|'.join(rest)}))" for first, rest in by_first.items()))


def _has_mark(marks: Sequence[int], start: int, end: int) -> bool:
    i = bisect_left(marks, start)
    return i < len(marks) and marks[i] < end


def _strings(value: Any) -> list[str]:
    """Every text of a JSON value, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in _strings(one)]
    return [text for one in value for text in _strings(one)] if isinstance(value, list) else []


def _changed(value: Any, pattern: re.Pattern[str], private: _Private) -> Any:
    """The same JSON value with the characters that ``pattern`` finds in its texts changed."""
    if isinstance(value, str):
        return pattern.sub(private.change, value)
    if isinstance(value, dict):
        return {_changed(name, pattern, private): _changed(one, pattern, private) for name, one in value.items()}
    return [_changed(one, pattern, private) for one in value] if isinstance(value, list) else value


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
