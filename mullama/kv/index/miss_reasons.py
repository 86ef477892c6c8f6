"""Why a prompt's KV had to be computed, in words. Sans-I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mullama.kv.index.payload import Ghost
from mullama.kv.index.tree import TOKEN_BYTES, Match, unpack

SHOWN = 6  # tokens on either side of where two prompts part


def miss_reason(
    namespace: bytes,
    key: bytes,
    reuse: int,
    match: Match,
    ghost: Ghost | None,
    now_ns: int,
    text: Callable[[Sequence[int]], str],
    *,
    is_shared: bool = False,
) -> str | None:
    """Why the KV of a prompt's tokens from ``reuse`` on was not there; None: nothing was missing.

    ``ghost`` is what explains it by an eviction, ``text`` makes tokens readable. A request of another namespace is not
    named: who else is there is none of a tenant's business. ``is_shared``: other tenants' KV is in this namespace as
    well, so that nobody is named and only the prompt itself is quoted.
    """
    n = len(key) // TOKEN_BYTES
    if reuse >= n - 1:
        return None
    if ghost is not None:
        ago = (now_ns - ghost.evicted_ns) / 1e9
        if ghost.request is None:
            whose = "nobody's request"
        elif is_shared:
            whose = "another request"
        elif ghost.namespace == namespace:
            whose = f"request {ghost.request}"
        else:
            whose = "another tenant's request"
        return f"tokens from {reuse} on were evicted {ago:.1f} s ago to make room for {whose}"
    at = match.n_tokens
    if at > reuse and at >= n - 1:
        return f"the prompt was cached, but its KV could be used up to token {reuse} only"
    if at == 0:
        return "no cached prompt begins with its first token"
    before = text(_tokens(key, max(at - SHOWN, 0), at))
    here = text(_tokens(key, at, at + SHOWN))
    if is_shared:
        return f"diverges at token {at}: after {before!r} it goes on with {here!r}, no cached prompt does"
    cached = _cached_after(match, at, key)
    other = f", the cached one with {text(cached)!r}" if cached else ", the cached one ends there"
    return f"diverges at token {at}: after {before!r} it goes on with {here!r}{other}"


def _tokens(key: bytes, start: int, end: int) -> list[int]:
    return unpack(key[TOKEN_BYTES * start : TOKEN_BYTES * end])


def _cached_after(match: Match, at: int, key: bytes) -> list[int]:
    """The tokens that follow the first ``at`` ones of ``key`` in another prompt that is cached."""
    node = match.nodes[-1]
    if node.start <= at < node.end:
        return _tokens(node.key, at - node.start, at - node.start + SHOWN)
    for child in node.children.values():
        if child.start == at and not key.startswith(child.key[:TOKEN_BYTES], TOKEN_BYTES * at):
            return _tokens(child.key, 0, SHOWN)
    return []
