"""A miss is explained in words, and names nobody whom the reader must not know."""

from __future__ import annotations

import pytest

from mullama.kv.payload import Ghost
from mullama.kv.reasons import miss_reason
from mullama.kv.tree import Match, pack


@pytest.mark.parametrize(
    ("namespace", "ghost", "whose"),
    [
        (b"a", Ghost(0, "carol", b"a"), "request carol"),
        (b"", Ghost(0, "carol"), "request carol"),
        (b"a", Ghost(0, "carol", b"b"), "another tenant's request"),
        (b"a", Ghost(0, "carol"), "another tenant's request"),
        (b"", Ghost(0, "carol", b"b"), "another tenant's request"),
        (b"a", Ghost(0, None, b"b"), "nobody's request"),
    ],
)
def test_only_requests_of_the_same_namespace_are_named(namespace: bytes, ghost: Ghost, whose: str) -> None:
    reason = miss_reason(namespace, pack(range(50)), 10, Match(n_tokens=10), ghost, 2_500_000_000, str)
    assert reason == f"tokens from 10 on were evicted 2.5 s ago to make room for {whose}"


def test_what_was_reused_needs_no_reason() -> None:
    assert miss_reason(b"", pack(range(50)), 49, Match(n_tokens=50), Ghost(0, "carol"), 1, str) is None
