"""A miss is explained in words, and names nobody whom the reader must not know."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mullama.kv.index.miss_reasons import miss_reason
from mullama.kv.index.payload import Ghost
from mullama.kv.index.tree import Match, PrefixTree, pack


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


@pytest.mark.parametrize(
    ("cached", "shown"),
    [
        ([1, 2, 3, 70, 71], "diverges at token 3: after '1 2 3' it goes on with '4 5 6', no cached prompt does"),
        ([70, 71], "no cached prompt begins with its first token"),
        ([1, 2, 3, 4, 5, 6, 70], None),
    ],
)
def test_a_shared_cache_quotes_nothing_of_others(cached: list[int], shown: str | None) -> None:
    tree = PrefixTree()
    tree.insert(b"", pack(cached), 1)
    key = pack([1, 2, 3, 4, 5, 6])

    def text(tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    match = tree.match(b"", key)
    reason = miss_reason(b"", key, min(match.n_tokens, 5), match, None, 1, text, is_shared=True)
    assert reason == shown
    alone = miss_reason(b"", key, min(match.n_tokens, 5), match, None, 1, text)
    assert (alone is not None and "70 71" in alone) is (shown is not None and shown.startswith("diverges"))


def test_a_shared_cache_names_nobody() -> None:
    reason = miss_reason(
        b"", pack(range(50)), 10, Match(n_tokens=10), Ghost(0, "carol"), 1_000_000_000, str, is_shared=True
    )
    assert reason == "tokens from 10 on were evicted 1.0 s ago to make room for another request"
