"""The text gate: whole characters, no part of a stop string, against a naive reference."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mullama._core.testing.gate import StopText


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def run(stops: list[str], pieces: list[bytes]) -> tuple[list[bytes], str | None]:
    """What came out after each piece (and at the end), and the stop string that ended it."""
    gate = StopText(stops)
    out = []
    for piece in pieces:
        released, which = gate.push(piece)
        out.append(released)
        if which >= 0:
            return out, stops[which]
    out.append(gate.flush())
    return out, stops[gate.ended_by] if gate.ended_by >= 0 else None


def reference(stops: list[str], text: bytes) -> tuple[bytes, set[str | None]]:
    """The text up to the stop string that starts first, and those that start there: borders of pieces do not count."""
    starts = {stop: text.find(stop.encode()) for stop in stops if stop.encode() in text}
    if not starts:
        return text, {None}
    first = min(starts.values())
    return text[:first], {stop for stop, at in starts.items() if at == first}


letters = st.text("ab", max_size=12)
odd = st.text("ab€😀é\n", max_size=12)
stop_lists = st.lists(
    st.one_of(st.text("ab", min_size=1, max_size=4), st.text("ab€😀é\n", min_size=1, max_size=3)), max_size=4
)
places = st.lists(st.integers(0, 60), max_size=12)


@settings(max_examples=600, deadline=None)
@given(st.one_of(letters, odd), stop_lists, places)
@example("aab", ["ab"], [1, 2])
@example("abab", ["abb", "bab"], [1, 2, 3])
@example("😀", ["😀"], [1, 2, 3])
@example("😀x", ["😁"], [1, 2, 3])
@example("ab", ["ab", "b"], [1])
@example("abc", ["abc", "b"], [1, 2])
@example("abd", ["abc", "b"], [1, 2])
@example("aab", ["aabb", "ab", "b"], [1, 2, 3])
@example("ab", ["abc", "b"], [1])
def test_equals_the_reference(text: str, stops: list[str], where: list[int]) -> None:
    pieces = cut(text.encode(), where)
    out, which = run(stops, pieces)
    kept, stopped_by = reference(stops, text.encode())
    assert b"".join(out) == kept
    assert which in stopped_by


@settings(max_examples=400, deadline=None)
@given(st.one_of(letters, odd), stop_lists, places)
def test_never_a_part_of_a_stop_string_nor_of_a_character(text: str, stops: list[str], where: list[int]) -> None:
    """After every piece: what may still become a stop string is held back, what is out decodes."""
    gate = StopText(stops)
    pushed = shown = b""
    for piece in cut(text.encode(), where):
        released, which = gate.push(piece)
        pushed += piece
        shown += released
        shown.decode()  # strict: whole characters
        if which >= 0:
            break
        for stop in stops:
            data = stop.encode()
            partial = max((n for n in range(1, len(data)) if pushed.endswith(data[:n])), default=0)
            assert len(shown) <= len(pushed) - partial
    assert not any(stop.encode() in shown for stop in stops)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), places)
def test_any_bytes_decode_the_same_in_releases_as_whole(data: bytes, where: list[int]) -> None:
    """Malformed UTF-8 too: replacing by U+FFFD release by release equals replacing in the whole."""
    out, _ = run([], cut(data, where))
    assert b"".join(out) == data
    assert "".join(part.decode("utf-8", "replace") for part in out) == data.decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(odd, places)
def test_without_stop_strings_at_most_three_bytes_wait(text: str, where: list[int]) -> None:
    gate = StopText()
    pushed = shown = 0
    for piece in cut(text.encode(), where):
        released, which = gate.push(piece)
        pushed, shown = pushed + len(piece), shown + len(released)
        assert which == -1
        assert pushed - shown <= 3
    assert len(gate.flush()) == pushed - shown == 0


def test_an_emoji_byte_by_byte() -> None:
    gate = StopText()
    assert [gate.push(bytes([b]))[0] for b in "a😀b".encode()] == [b"a", b"", b"", b"", "😀".encode(), b"b"]


@pytest.mark.parametrize("character", ["é", "漢", "😀"])
@pytest.mark.parametrize("before", [b"", b"x", "ö".encode(), b"\xff"])
def test_a_character_that_the_prompt_has_begun(character: str, before: bytes) -> None:
    data = character.encode()
    for at in range(1, len(data)):
        gate = StopText(["stop", character + "c"])
        gate.begin(before + data[:at])
        assert gate.push(b"") == (b"", -1), "a control token shows nothing"
        shown = b"".join(gate.push(bytes([byte]))[0] for byte in data[at:] + b"a")
        assert shown == data + b"a"
        other = StopText()
        other.begin(before + data[:at])
        assert other.push(b"a" + data) == (b"a" + data, -1), "the model went on with something else"
        assert other.flush() == b""
        stopped = StopText([character + "c"])
        stopped.begin(before + data[:at])
        assert stopped.push(data[at:] + b"c") == (b"", 0)


def test_a_prompt_that_ends_with_a_whole_character_adds_nothing() -> None:
    for end in (b"", b"a", "é".encode(), "a😀".encode(), b"\x80\x80\x80"):
        gate = StopText()
        gate.begin(end)
        assert gate.push(b"\x80b") == (b"\x80b", -1)


def test_what_was_held_back_comes_when_it_was_no_stop_string() -> None:
    gate = StopText(["STOP"])
    assert gate.push(b"x ST") == (b"x ", -1)
    assert gate.push(b"O") == (b"", -1)
    assert gate.push(b"RE") == (b"STORE", -1)
    assert gate.push(b"ST") == (b"", -1)
    assert gate.flush() == b"ST"
    assert gate.flush() == b""


def test_the_stop_string_that_starts_first_wins() -> None:
    assert StopText(["b", "abc"]).push(b"xabc") == (b"x", 1)
    assert StopText(["aa", "a"]).push(b"xaa") == (b"x", 0), "of equal starts the first in the list"


def test_a_complete_stop_string_waits_for_one_that_starts_before_it() -> None:
    gate = StopText(["abc", "b"])
    assert gate.push(b"xab") == (b"x", -1)
    assert gate.push(b"c") == (b"", 0), "the text has 'abc' before 'b'"
    gate = StopText(["abc", "b"])
    assert gate.push(b"xab") == (b"x", -1)
    assert gate.push(b"d") == (b"a", 1), "'abc' can no longer come"
    gate = StopText(["abc", "b"])
    assert gate.push(b"xab") == (b"x", -1)
    assert (gate.flush(), gate.ended_by) == (b"a", 1), "nothing else comes"


def test_a_stop_string_across_many_pieces() -> None:
    gate = StopText(["<|end|>"])
    released = [gate.push(bytes([b])) for b in b"hi <|end|> never"[:10]]
    assert b"".join(text for text, _ in released) == b"hi "
    assert released[-1] == (b"", 0)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    gate = StopText(["ab"])
    assert gate.push(b"xab", check_stops=False) == (b"xab", -1)
    assert gate.push(b"a", check_stops=False) == (b"a", -1)
    assert gate.push(b"b") == (b"b", -1), "its beginning was shown already"
    assert gate.push(b"ab") == (b"", 0)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a character"):
        StopText(["x", ""])


def test_a_long_text_is_released_as_it_comes() -> None:
    gate = StopText(["never there"])
    total = sum(len(gate.push(b"0123456789" * 10)[0]) for _ in range(1000))
    assert total == 100_000
