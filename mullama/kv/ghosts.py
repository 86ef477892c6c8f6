"""What was cached once and is gone: so that a miss can name its reason. Sans-I/O."""

from __future__ import annotations

from collections import deque

from mullama.kv.payload import Ghost
from mullama.kv.tree import Node, PrefixTree

LIMIT = 2048  # stretches that are remembered


class Ghosts:
    """The last evictions, as a tree of their own that holds marks instead of KV."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._tree = PrefixTree()
        self._order: deque[Node] = deque()
        self._limit = limit

    def add(self, namespace: bytes, tokens: bytes, evicted_ns: int, request: str | None) -> None:
        """The KV of the end of ``tokens`` is gone."""
        node = self._tree.insert(namespace, tokens, evicted_ns)
        if node.host is None:
            self._order.append(node)
        node.host = Ghost(evicted_ns, request)
        while len(self._order) > self._limit:
            old = self._order.popleft()
            old.host = None
            self._tree.prune(old)

    def find(self, namespace: bytes, tokens: bytes, beyond: int) -> Ghost | None:
        """The eviction that explains why the KV of ``tokens`` ends after ``beyond``; None: it was never cached."""
        for node in self._tree.match(namespace, tokens).nodes:
            if isinstance(node.host, Ghost) and node.end > beyond:
                return node.host
        return None
