"""Context policies without a server: what is cut, that it fits, that no more goes than must."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama.config import options
from mullama.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from mullama.web.openai.context_policy import (
    NOTHING,
    SYSTEM_ROLES,
    ContextPolicy,
    Dropped,
    PromptLimits,
    context_member,
    default_policy,
    drop_tokens,
    drop_turns,
    policy_for,
    policy_of,
    shift_member,
    without,
)

LEFT, MIDDLE = ContextPolicy.TRUNCATE_LEFT, ContextPolicy.TRUNCATE_MIDDLE
ERROR, SHIFT = ContextPolicy.ERROR, ContextPolicy.SHIFT
TEMPLATE = 3  # tokens that the template adds to any chat
LETTERS = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}

both = pytest.mark.parametrize("policy", [LEFT, MIDDLE])


@dataclass(frozen=True)
class Msg:
    role: str
    size: int
    at: int


def chat(letters: str, sizes: Sequence[int] | None = None) -> list[Msg]:
    """One message a letter, of ten tokens each where no sizes are given."""
    sizes = sizes or [10] * len(letters)
    return [Msg(LETTERS[letter], size, at) for at, (letter, size) in enumerate(zip(letters, sizes, strict=True))]


def tokens(messages: Sequence[Msg]) -> int:
    return TEMPLATE + sum(message.size for message in messages)


def cut(
    messages: Sequence[Msg], policy: ContextPolicy, limits: PromptLimits, count: Callable[[Sequence[Msg]], int] = tokens
) -> range:
    return drop_turns(messages, count, policy, limits, n_whole=count(messages))


def limits_of(wanted: int, limit: int | None = None) -> PromptLimits:
    """Limits with just these bounds."""
    limits = PromptLimits(
        (wanted + 1 if limit is None else limit + 1), max_tokens=1 if limit is None else limit + 1 - wanted
    )
    assert limits.wanted == wanted
    return limits


def leading_systems(messages: Sequence[Msg]) -> int:
    return next((i for i, m in enumerate(messages) if m.role not in SYSTEM_ROLES), len(messages))


def last_user(messages: Sequence[Msg]) -> int:
    return max((m.at for m in messages if m.role == "user"), default=len(messages))


def what_stays(messages: list[Msg]) -> list[Msg]:
    """The leading system messages and the last turn; without a user message there is nothing else."""
    last = last_user(messages)
    if last == len(messages):
        return messages
    while last > 0 and messages[last - 1].role in SYSTEM_ROLES:
        last -= 1
    return messages[: leading_systems(messages)] + messages[max(last, leading_systems(messages)) :]


@st.composite
def chats(draw: st.DrawFn, alphabet: str = "sduat") -> list[Msg]:
    letters = draw(st.text("sd", max_size=2)) + draw(st.text(alphabet, min_size=1, max_size=24))
    return chat(letters, draw(st.lists(st.integers(0, 30), min_size=len(letters), max_size=len(letters))))


@st.composite
def rooms(draw: st.DrawFn) -> PromptLimits:
    return PromptLimits(draw(st.integers(2, 400)), draw(st.none() | st.integers(1, 400)))


# -- the limits


@pytest.mark.parametrize(
    ("n_ctx", "max_tokens", "wanted"),
    [
        (4096, 100, 3996),
        (4096, 1, 4095),
        (4096, 4096, 2048),  # the prompt keeps half
        (4096, None, 3584),
        (512, None, 256),
        (3, 2, 2),
        (2, None, 1),
        (1, None, 0),
    ],
)
def test_room(n_ctx: int, max_tokens: int | None, wanted: int) -> None:
    limits = PromptLimits(n_ctx, max_tokens)
    assert (limits.wanted, limits.limit) == (wanted, n_ctx - 1)


@given(rooms())
def test_the_prompt_has_at_least_half_and_the_completion_at_least_one_token(limits: PromptLimits) -> None:
    assert limits.n_ctx / 2 <= limits.wanted <= limits.limit < limits.n_ctx


# -- chats


@pytest.mark.parametrize(
    ("policy", "letters", "n_fit", "span"),
    [
        (LEFT, "suauau", 6, NOTHING),
        (LEFT, "suauau", 5, range(1, 3)),
        (LEFT, "suauau", 4, range(1, 3)),
        (LEFT, "suauau", 3, range(1, 5)),
        (LEFT, "suauau", 2, range(1, 5)),
        (LEFT, "uauau", 3, range(2)),
        (LEFT, "sauau", 4, range(1, 2)),  # a greeting is no turn and goes first
        (LEFT, "sdsuau", 5, range(3, 5)),
        (LEFT, "uatatau", 6, range(6)),  # a tool call keeps its result, or both go
        (LEFT, "uasuau", 5, range(2)),  # a system message belongs to the user message behind it
        (LEFT, "uuasau", 5, range(1)),
        (LEFT, "uuasau", 4, range(5)),  # one before a reply belongs to the turn around it
        (LEFT, "uaua", 2, range(2)),  # a reply to be continued stays with its turn
        (LEFT, "auaua", 2, range(3)),
        (MIDDLE, "suauauau", 8, NOTHING),
        (MIDDLE, "suauauau", 7, range(3, 5)),
        (MIDDLE, "suauauau", 4, range(3, 7)),
        (MIDDLE, "suauauau", 3, range(1, 7)),  # the first turn only when nothing else helps
        (MIDDLE, "uau", 2, range(2)),
        (MIDDLE, "sauauau", 5, range(4, 6)),  # a greeting stays with the first turn
        (MIDDLE, "sauauau", 2, range(1, 6)),
        (MIDDLE, "uuuu", 3, range(1, 2)),
    ],
)
def test_what_goes(policy: ContextPolicy, letters: str, n_fit: int, span: range) -> None:
    """``n_fit``: how many messages fit."""
    assert cut(chat(letters), policy, limits_of(TEMPLATE + 10 * n_fit)) == span


@both
@pytest.mark.parametrize("letters", ["su", "u", "sua", "s", "sd", "a", "at", "sat", "uata"])
def test_what_always_stays_does_not_fit(policy: ContextPolicy, letters: str) -> None:
    messages = chat(letters)
    n = tokens(messages)
    assert cut(messages, policy, limits_of(n - 5, limit=n)) == NOTHING, "one token is left for the completion"
    with pytest.raises(ContextLengthExceeded) as raised:
        cut(messages, policy, limits_of(n - 1))
    assert raised.value.param == "messages"
    assert f"one request may use {n}, completion included" in raised.value.message


@both
def test_a_refusal_says_the_sizes(policy: ContextPolicy) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"has 43 tokens, .* alone 23; one request may use 20,"):
        cut(chat("suau"), policy, PromptLimits(20))


@both
def test_the_largest_cut_is_taken_when_it_leaves_less_than_is_wanted(policy: ContextPolicy) -> None:
    """What ``error`` would take is not refused, and no history stays at the completion's cost."""
    messages = chat("suauau", [10, 10, 10, 10, 10, 50])
    assert cut(messages, policy, limits_of(60, limit=70)) == range(1, 5)
    assert cut(messages, policy, limits_of(60, limit=110)) == range(1, 5)


@given(chats(), rooms(), st.sampled_from([LEFT, MIDDLE]))
@settings(max_examples=400, deadline=None)
def test_the_rest_fits_and_keeps_what_it_must(messages: list[Msg], limits: PromptLimits, policy: ContextPolicy) -> None:
    n_system, always = leading_systems(messages), what_stays(messages)
    try:
        span = cut(messages, policy, limits)
    except ContextLengthExceeded:
        assert tokens(messages) > limits.limit
        assert tokens(always) > limits.limit
        return
    rest = without(messages, span)
    assert [m.at for m in rest] == [m.at for m in messages if m.at not in span], "the order is kept"
    assert set(always) <= set(rest)
    assert tokens(rest) <= limits.limit
    if not span:
        return
    assert tokens(messages) > limits.wanted, "what fits is left alone"
    assert tokens(rest) <= limits.wanted or tokens(rest) >= tokens(always)
    behind = [m.role for m in messages[span.stop :] if m.role not in SYSTEM_ROLES]
    assert behind[0] == "user", "behind a gap the user speaks"
    assert policy is MIDDLE or span.start == n_system


def candidates(messages: list[Msg], start: int) -> list[range]:
    """Every span from ``start`` on behind which a whole turn begins, found without the code under test."""
    found = []
    for stop in range(start + 1, last_user(messages) + 1 if last_user(messages) < len(messages) else 0):
        behind = [m.role for m in messages[stop:] if m.role not in SYSTEM_ROLES]
        belongs = messages[stop].role in ("user", *SYSTEM_ROLES) and messages[stop - 1].role not in SYSTEM_ROLES
        if behind[0] == "user" and (belongs or stop - 1 < leading_systems(messages)):
            found.append(range(start, stop))
    return found


@given(chats(), rooms())
@settings(max_examples=400, deadline=None)
def test_left_takes_the_fewest_turns(messages: list[Msg], limits: PromptLimits) -> None:
    fitting = [
        span
        for span in candidates(messages, leading_systems(messages))
        if tokens(without(messages, span)) <= limits.wanted
    ]
    if tokens(messages) > limits.wanted and fitting:
        assert cut(messages, LEFT, limits) == min(fitting, key=len)


@given(chats(), rooms())
@settings(max_examples=400, deadline=None)
def test_middle_keeps_the_first_turn_where_it_can(messages: list[Msg], limits: PromptLimits) -> None:
    n_system = leading_systems(messages)
    borders = [span.stop for span in candidates(messages, n_system)]
    if messages[n_system : n_system + 1] and messages[n_system].role != "user":
        borders = borders[1:]  # the first one ends a greeting
    if tokens(messages) <= limits.wanted or not borders:
        return
    fitting = [span for span in candidates(messages, borders[0]) if tokens(without(messages, span)) <= limits.wanted]
    try:
        span = cut(messages, MIDDLE, limits)
    except ContextLengthExceeded:
        assert not fitting
        return
    if fitting:
        assert span == min(fitting, key=len)
    else:
        assert span in (NOTHING, range(n_system, borders[-1]))


@given(st.integers(1, 12), st.lists(st.integers(1, 30), min_size=25, max_size=25), st.data())
@settings(max_examples=200, deadline=None)
def test_alternation_survives(num_turns: int, sizes: list[int], data: st.DataObject) -> None:
    letters = "s" + "ua" * num_turns + "u"
    messages = chat(letters, sizes[: len(letters)] if len(letters) <= 25 else sizes + [5] * (len(letters) - 25))
    least = tokens([messages[0], messages[-1]])
    limits = limits_of(data.draw(st.integers(least, max(least, tokens(messages)))))
    for policy in (LEFT, MIDDLE):
        rest = without(messages, cut(messages, policy, limits))
        assert [m.role for m in rest[1:]] == (["user", "assistant"] * num_turns + ["user"])[: len(rest) - 1]


@given(st.integers(2, 400), st.integers(1, 400), st.sampled_from([LEFT, MIDDLE]))
@settings(deadline=None)
def test_it_is_bisection(num_turns: int, n_keep: int, policy: ContextPolicy) -> None:
    messages = chat("ua" * num_turns + "u")
    asked: list[int] = []

    def count(kept: Sequence[Msg]) -> int:
        asked.append(len(kept))
        return tokens(kept)

    n_keep = min(n_keep, num_turns)
    drop_turns(messages, count, policy, limits_of(TEMPLATE + 10 * (2 * n_keep + 1)), n_whole=tokens(messages))
    assert len(asked) <= 3 + 2 * math.ceil(math.log2(num_turns))
    # However long the chat is, what is looked at is never much longer than what fits.
    assert max(asked, default=0) <= 2 * (2 * n_keep + 1) + 4


@given(chats(), rooms(), st.sampled_from([LEFT, MIDDLE]), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_a_template_may_count_as_it_likes(
    messages: list[Msg], limits: PromptLimits, policy: ContextPolicy, seed: int
) -> None:
    """Fewer messages with more tokens: what is returned fits all the same, and what ``error`` takes is taken."""

    def count(kept: Sequence[Msg]) -> int:
        return hash((seed, *(m.at for m in kept))) % 500

    n_whole = count(messages)
    try:
        span = cut(messages, policy, limits, count)
    except ContextLengthExceeded:
        assert n_whole > limits.limit
        return
    n = count(without(messages, span))
    assert n <= limits.limit
    assert n < n_whole if span else n == n_whole


# -- completions


@given(st.integers(0, 500), rooms(), st.booleans(), st.sampled_from([LEFT, MIDDLE]))
@settings(max_examples=300, deadline=None)
def test_tokens_fill_the_room(n: int, limits: PromptLimits, has_bos: bool, policy: ContextPolicy) -> None:
    prompt = list(range(n))
    span = drop_tokens(n, policy, limits, has_bos=has_bos)
    rest = without(prompt, span)
    assert len(rest) == min(n, limits.wanted)
    if not span:
        assert rest == prompt
        return
    assert rest[-1] == n - 1, "the completion goes on behind the prompt's last token"
    if policy is LEFT:
        assert span.start == (1 if has_bos and limits.wanted > 1 else 0)
    else:
        assert len(prompt) - span.stop - span.start in (0, 1), "two halves"


def test_a_room_for_one_token_is_for_the_last() -> None:
    for policy in (LEFT, MIDDLE):
        assert without([1, 5, 6, 7], drop_tokens(4, policy, PromptLimits(2), has_bos=True)) == [7]


# -- names and reports


def test_the_option_takes_the_policies() -> None:
    (option,) = [option for option in options() if option.name == "context_policy"]
    assert option.metadata["choices"] == tuple(ContextPolicy)
    assert option.default == ContextPolicy.ERROR


@pytest.mark.parametrize("can_shift", [True, False])
@pytest.mark.parametrize("name", ["", "left", "ERROR", "SHIFT", "truncate-left", "x" * 5000])
def test_other_names_are_refused_with_those_there_are(name: str, can_shift: bool) -> None:
    with pytest.raises(InvalidRequest) as raised:
        policy_of(name, can_shift=can_shift)
    assert raised.value.param == "context_policy"
    offered = "error, truncate_left, truncate_middle" + ", shift" * can_shift
    assert raised.value.message == f"context_policy: it must be one of {offered}"


def test_shift_is_refused_where_the_model_cannot() -> None:
    with pytest.raises(InvalidRequest) as raised:
        policy_of("shift", can_shift=False)
    words = "context_policy: this model cannot shift; it must be one of error, truncate_left, truncate_middle"
    assert (raised.value.message, raised.value.param) == (words, "context_policy")


def test_names() -> None:
    for can_shift in (True, False):
        assert policy_of(None, can_shift=can_shift) is None
    assert [policy_of(str(policy), can_shift=True) for policy in ContextPolicy] == list(ContextPolicy)
    assert [policy_of(str(policy), can_shift=False) for policy in (ERROR, LEFT, MIDDLE)] == [ERROR, LEFT, MIDDLE]
    assert [policy for policy in ContextPolicy if policy.truncates] == [LEFT, MIDDLE]


@pytest.mark.parametrize("can_shift", [True, False])
@pytest.mark.parametrize("default", ContextPolicy)
def test_the_request_s_policy_goes_before_the_server_s(default: ContextPolicy, can_shift: bool) -> None:
    for asked in ContextPolicy:
        assert policy_for(asked, str(default), can_shift=can_shift) is asked
    expected = ERROR if default is SHIFT and not can_shift else default
    assert policy_for(None, str(default), can_shift=can_shift) is expected


@pytest.mark.parametrize("name", ["", "nonsense", "Shift", 5, None])
def test_a_default_that_is_none_is_an_error_of_the_configuration(name: Any) -> None:
    words = f"--context-policy: '{name}' is not one of error, truncate_left, truncate_middle, shift"
    for call in (lambda: default_policy(name), lambda: policy_for(None, name, can_shift=True)):
        with pytest.raises(ConfigError) as raised:
            call()
        assert (raised.value.message, raised.value.param) == (words, "context_policy")


def test_context_member() -> None:
    of_chat = Dropped(LEFT, 100, 60, range(1, 4), is_chat=True)
    of_text = Dropped(MIDDLE, 100, 60, range(30, 70), is_chat=False)
    chat_object: dict[str, Any] = {
        "policy": "truncate_left",
        "prompt_tokens_before": 100,
        "prompt_tokens": 60,
        "dropped_tokens": 40,
        "dropped_messages": 3,
        "dropped_message_range": [1, 4],
    }
    text_object: dict[str, Any] = {
        "policy": "truncate_middle",
        "prompt_tokens_before": 100,
        "prompt_tokens": 60,
        "dropped_tokens": 40,
        "dropped_token_range": [30, 70],
    }
    assert context_member([of_chat]) == {"context": chat_object}
    assert context_member([of_text]) == {"context": text_object}
    assert context_member([None, of_text]) == {"context": [None, text_object]}
    assert context_member([]) == context_member([None]) == context_member([None, None]) == {}


def test_shift_member() -> None:
    one, other = ({"policy": "shift", "dropped_tokens": n} for n in (46, 138))
    assert shift_member([46]) == {"context": one}
    assert shift_member([46, 138]) == {"context": [one, other]}
    assert shift_member([0, 138, 0]) == {"context": [None, other, None]}
    assert shift_member([]) == shift_member([0]) == shift_member([0, 0]) == {}
