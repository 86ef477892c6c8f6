"""What becomes of what does not fit the context: which messages or tokens go, and how the response says so.

Sans-I/O: templates and the tokeniser come in as ``count``. One span goes from a prompt, half-open as slices are:

    chat    [system ...] [turn 0] [turn 1] [turn 2] ... [last turn]
                         |<-- truncate_left: as few as will do
                                  |<-- truncate_middle: the same, and turn 0 only when nothing else helps
    tokens  [BOS] |<-- truncate_left -->| the last of what fits
            the first half of what fits |<-- truncate_middle -->| the last half

A turn is a user message and all up to the next one, so that a tool call keeps its result. System messages directly
before a user message belong to its turn. The leading ones and the last turn always stay; no message is cut in two.

``shift`` cuts no prompt: the engine drops tokens while it generates, when the context is full.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mullama.errors import ConfigError, ContextLengthExceeded, InvalidRequest

SYSTEM_ROLES = ("system", "developer")
NOTHING = range(0)
#: Tokens kept free for a completion whose ``max_tokens`` is not given: a cut that leaves it one would be of no use.
USUAL_COMPLETION = 512


class ContextPolicy(enum.StrEnum):
    """What is done where the context is too small. ``--context-policy`` takes the same words (a test compares)."""

    ERROR = "error"
    TRUNCATE_LEFT = "truncate_left"
    TRUNCATE_MIDDLE = "truncate_middle"
    SHIFT = "shift"  # not about the prompt, which is treated as by ERROR

    @property
    def truncates(self) -> bool:
        """Whether a prompt that does not fit is cut."""
        return self in (ContextPolicy.TRUNCATE_LEFT, ContextPolicy.TRUNCATE_MIDDLE)


class HasRole(Protocol):
    """A message, as far as it matters here."""

    @property
    def role(self) -> object: ...


T = TypeVar("T")
M = TypeVar("M", bound=HasRole)


@dataclass(slots=True, frozen=True)
class PromptLimits:
    """How many tokens a prompt may have in a context of ``n_ctx``.

    ``wanted`` leaves the completion its ``max_tokens`` (``USUAL_COMPLETION`` without), at most half of the context;
    ``limit`` leaves it one token, which is the least the engine takes.
    """

    n_ctx: int
    max_tokens: int | None = None

    @property
    def wanted(self) -> int:
        return self.n_ctx - max(1, min(self.max_tokens or USUAL_COMPLETION, self.n_ctx // 2))

    @property
    def limit(self) -> int:
        return self.n_ctx - 1


@dataclass(slots=True, frozen=True)
class Dropped:
    """What went from one prompt; ``span`` counts the messages of a chat, the tokens of a completion's prompt."""

    policy: ContextPolicy
    n_before: int
    n_after: int
    span: range
    is_chat: bool

    @property
    def n_dropped(self) -> int:
        return self.n_before - self.n_after

    def to_dict(self) -> dict[str, Any]:
        """The ``context`` object of a response."""
        where = [self.span.start, self.span.stop]
        return {
            "policy": self.policy,
            "prompt_tokens_before": self.n_before,
            "prompt_tokens": self.n_after,
            "dropped_tokens": self.n_dropped,
            **(
                {"dropped_messages": len(self.span), "dropped_message_range": where}
                if self.is_chat
                else {"dropped_token_range": where}
            ),
        }


def policy_of(name: str | None, *, can_shift: bool) -> ContextPolicy | None:
    """The policy a request names. Raises InvalidRequest with those that its model has."""
    if name is None:
        return None
    offered = [policy for policy in ContextPolicy if can_shift or policy is not ContextPolicy.SHIFT]
    if name not in offered:
        why = "this model cannot shift; " if name == ContextPolicy.SHIFT else ""
        words = f"context_policy: {why}it must be one of {', '.join(offered)}"
        raise InvalidRequest(words, param="context_policy")
    return ContextPolicy(name)


def default_policy(name: str) -> ContextPolicy:
    """The policy that ``--context-policy`` names. Raises ConfigError: a ServeConfig made in Python holds any text."""
    try:
        return ContextPolicy(name)
    except ValueError:
        words = f"--context-policy: '{name}' is not one of {', '.join(ContextPolicy)}"
        raise ConfigError(words, param="context_policy") from None


def policy_for(asked: ContextPolicy | None, default: str, *, can_shift: bool) -> ContextPolicy:
    """The policy of one request: the one it asks for, else the server's.

    A server's ``shift`` is ``error`` for a model that cannot: it was given for all models, not for this one.
    """
    if asked is not None:
        return asked
    policy = default_policy(default)
    return ContextPolicy.ERROR if policy is ContextPolicy.SHIFT and not can_shift else policy


def without(items: Sequence[T], span: range) -> list[T]:
    """All but those in ``span``."""
    return [*items[: span.start], *items[span.stop :]]


def drop_turns(
    messages: Sequence[M],
    count: Callable[[Sequence[M]], int],
    policy: ContextPolicy,
    limits: PromptLimits,
    *,
    n_whole: int,
    fits: Callable[[Sequence[M]], bool] | None = None,
) -> range:
    """The messages that ``policy`` takes out of a chat of ``n_whole`` tokens so that it fits; an empty span: none.

    ``count`` says how many tokens a chat has, ``fits`` whether a chat has at most those wanted, which can be cheaper.
    ``count`` is asked about the largest cut, ``fits`` then about smaller ones, in strides that double until one is too
    small, then by bisection: what is looked at is never much longer than what fits, however long the chat is. If fewer
    messages never have more tokens, the span is the shortest that fits. Where even the largest cut leaves the
    completion less than it wants, that cut is taken if the rest fits at all: no policy refuses what ``error`` takes.
    Raises ContextLengthExceeded with the sizes.
    """
    if n_whole <= limits.wanted:
        return NOTHING
    spans = _cuts([message.role for message in messages], policy)

    if fits is None:

        def fits(kept: Sequence[M]) -> bool:
            return count(kept) <= limits.wanted

    n_least = count(without(messages, spans[-1])) if spans else n_whole
    if n_least > limits.wanted:
        if min(n_least, n_whole) > limits.limit:
            raise ContextLengthExceeded(
                f"messages: the chat has {n_whole} tokens, its system messages and last turn alone {n_least}; "
                f"one request may use {limits.n_ctx}, completion included",
                param="messages",
            )
        return spans[-1] if n_least < n_whole else NOTHING
    low, high = -1, len(spans) - 1  # spans[high] fits; spans[low] does not, and below them all is the whole chat
    stride = 1
    while (smaller := high - stride) >= 0:
        if not fits(without(messages, spans[smaller])):
            low = smaller
            break
        high, stride = smaller, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        if fits(without(messages, spans[middle])):
            high = middle
        else:
            low = middle
    return spans[high]


def _cuts(roles: Sequence[object], policy: ContextPolicy) -> list[range]:
    """The ways to cut a chat, from the least to the most; each takes out what the one before does, and more."""
    n_system = 0
    while n_system < len(roles) and roles[n_system] in SYSTEM_ROLES:
        n_system += 1
    turns = _turns(roles, n_system)
    if policy is not ContextPolicy.TRUNCATE_MIDDLE:
        return [range(n_system, turn) for turn in turns if turn > n_system]
    spans = [range(turns[1], turn) for turn in turns[2:]]
    if turns and turns[-1] > n_system:
        spans.append(range(n_system, turns[-1]))
    return spans


def _turns(roles: Sequence[object], n_system: int) -> list[int]:
    """Where the turns begin. What comes before the first user message, such as a greeting, is none."""
    turns = []
    for at, role in enumerate(roles):
        if role == "user":
            while at > n_system and roles[at - 1] in SYSTEM_ROLES:
                at -= 1
            turns.append(at)
    return turns


def drop_tokens(n_tokens: int, policy: ContextPolicy, limits: PromptLimits, *, has_bos: bool) -> range:
    """The tokens that ``policy`` takes out of a prompt so that it fits exactly; an empty span: none.

    ``has_bos``: the prompt begins with the vocabulary's beginning-of-sequence token, which stays.
    """
    n = limits.wanted
    if n_tokens <= n:
        return NOTHING
    if policy is ContextPolicy.TRUNCATE_MIDDLE:
        start = n // 2
    else:
        start = 1 if has_bos and n > 1 else 0
    return range(start, start + n_tokens - n)


def keep_tokens(prompt: list[int], keep: int, side: str | None, limits: PromptLimits) -> list[int]:
    """At most ``keep`` tokens of a prompt, vLLM's ``truncate_prompt_tokens``: the last ones, or the first where
    ``side`` is "right". -1: as many as leave the completion its room. Raises InvalidRequest beyond the context."""
    if keep > limits.n_ctx:
        words = f"truncate_prompt_tokens: {keep} tokens are more than the context of {limits.n_ctx}"
        raise InvalidRequest(words, param="truncate_prompt_tokens")
    n = min(len(prompt), limits.wanted if keep < 0 else keep)
    return prompt[:n] if side == "right" else prompt[len(prompt) - n :]


def context_member(dropped: Sequence[Dropped | None]) -> dict[str, Any]:
    """The member ``context`` of a response, from what each prompt lost; none where nothing was dropped.

    It is an object for one prompt; for several it is a list with null for those that fitted.
    """
    return _member([None if one is None else one.to_dict() for one in dropped])


def shift_member(dropped: Sequence[int]) -> dict[str, Any]:
    """The same, from how many tokens each choice dropped to go on; the list has null for those that dropped none."""
    return _member([{"policy": ContextPolicy.SHIFT, "dropped_tokens": n} if n else None for n in dropped])


def _member(each: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    if not any(each):
        return {}
    return {"context": each[0] if len(each) == 1 else each}
