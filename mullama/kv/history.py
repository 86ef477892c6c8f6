"""What happened to cached KV, and for whose request: events, what was lost, and why a prompt found nothing.

Everything belongs to the engine thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mullama.kv.events import KvEvent, KvEventKind, KvEventLog, KvTier
from mullama.kv.index.ghosts import Ghosts
from mullama.kv.index.miss_reasons import miss_reason
from mullama.kv.index.tree import TOKEN_BYTES, Match, Node


class KvHistory:
    """``note_evicted(n)`` is told of tokens that no tier holds any more."""

    def __init__(self, note_evicted: Callable[[int], None]) -> None:
        self.events = KvEventLog()
        self.lost = 0  # tokens that no tier holds any more, since ``begin``
        self._note_evicted = note_evicted
        self._ghosts = Ghosts()
        self._request: str | None = None  # whose request the work is for
        self._needed_by = b""  # and its namespace

    def begin(self, request: str | None, namespace: bytes = b"") -> None:
        """What happens from now on is for this request (None: for nobody's)."""
        self._request = request
        self._needed_by = namespace
        self.lost = 0

    def lose(self, node: Node, n_tokens: int, start: int, tier: KvTier) -> None:
        """Tokens of the path to the end of ``node``, from ``start`` on, are about to be in no tier any more."""
        self.lost += n_tokens
        self._note_evicted(n_tokens)
        self._ghosts.add(node.namespace, node.tokens(), time.monotonic_ns(), self._request, self._needed_by)
        self.note(KvEventKind.EVICTED, tier, start, node.end, node, gone=True)

    def explain(
        self,
        namespace: bytes,
        key: bytes,
        reuse: int,
        match: Match,
        text: Callable[[Sequence[int]], str],
        *,
        is_shared: bool = False,
    ) -> str | None:
        """Why the KV of a prompt's tokens from ``reuse`` on had to be computed (see kv/index/miss_reasons.py)."""
        ghost = self._ghosts.find(namespace, key, reuse)
        return miss_reason(namespace, key, reuse, match, ghost, time.monotonic_ns(), text, is_shared=is_shared)

    def note(
        self,
        kind: KvEventKind,
        tier: KvTier,
        start: int,
        end: int,
        node: Node,
        *,
        source: KvTier | None = None,
        slot: int | None = None,
        gone: bool = False,
        path: bytes | None = None,
    ) -> None:
        """Write an event of the tokens [start, end) on the path to ``node`` (``path``: its tokens, if cut off)."""
        self.events.append(
            KvEvent(
                self.events.next_seq(),
                time.monotonic_ns(),
                kind,
                tier,
                start,
                end,
                node.namespace,
                (node.tokens() if path is None else path)[: TOKEN_BYTES * end],
                self._request,
                source,
                slot,
                gone,
            )
        )
