"""What was cached once and is gone: so that a miss can name its reason. Sans-I/O."""

from __future__ import annotations

from mullama.kv.index.payload import Ghost
from mullama.kv.index.tree import Node, PrefixTree

LIMIT = 2048  # stretches that are remembered


class Ghosts:
    """The last evictions, as a tree of their own that holds marks instead of KV."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._tree = PrefixTree()
        self._order: dict[Node, None] = {}  # every node that holds a mark, oldest first
        self._limit = limit

    def add(
        self, namespace: bytes, tokens: bytes, evicted_ns: int, request: str | None, needed_by: bytes = b""
    ) -> None:
        """The KV of the end of ``tokens`` is gone, for a request of the namespace ``needed_by``."""
        node = self._tree.insert(namespace, tokens, evicted_ns)
        node.host = Ghost(evicted_ns, request, needed_by)
        for one in (node.parent, node):  # the upper part of a stretch that was cut for it has a mark as well
            if one is not None and one.host is not None:
                self._order.setdefault(one)
        while len(self._order) > self._limit:
            old = next(iter(self._order))
            del self._order[old]
            old.host = None
            self._tree.prune(old)

    def find(self, namespace: bytes, tokens: bytes, beyond: int) -> Ghost | None:
        """The eviction that explains why the KV of ``tokens`` ends after ``beyond``; None: it was never cached."""
        match = self._tree.match(namespace, tokens)
        for node in match.nodes:  # of the last one only a part may be shared
            if isinstance(node.host, Ghost) and min(node.end, match.n_tokens) > beyond:
                return node.host
        return None
