"""Which KV stays in host memory: a budget, and an eviction policy that says who goes first. Sans-I/O.

What can go is a leaf (see ``Tier``). A long leaf is cut, and its end goes first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from mullama.kv.eviction.guarded import GuardedPolicy
from mullama.kv.eviction.policy import EvictionPolicy
from mullama.kv.index.tree import Node, Payload, PrefixTree

GRAIN = 32  # tokens; a leaf is cut at multiples of it
MIN_STORED = 16  # tokens: a shorter prefix is not worth a place in host memory


class HostTier:
    """Payloads of nodes within ``budget`` bytes. ``can_cut``: part of a node is of use without the rest."""

    def __init__(
        self,
        tree: PrefixTree,
        budget: int,
        policy: EvictionPolicy,
        *,
        can_cut: bool = True,
        on_evict: Callable[[Node], None] | None = None,
    ) -> None:
        self.budget = budget
        self.used = 0
        self._tree = tree
        self._can_cut = can_cut
        self._on_evict = on_evict  # told of a node before it goes
        self._heap: list[tuple[float, int, Node]] = []
        self._valid: dict[Node, int] = {}  # number of a leaf's entry in the heap
        self._numbers = itertools.count()
        self._stale = False  # whether the scores in the heap are another policy's
        self._install(policy)

    def put(self, node: Node, payload: Payload | None, now_ns: int, checkpoint: Payload | None = None) -> bool:
        """Keep a node's KV. False: it does not fit, or what is above it is not here.

        The node's ancestors are safe meanwhile; the order of calls is from the root down.
        """
        above = node.parent
        assert above is not None
        if node.host is not None:
            return checkpoint is None or self.put_checkpoint(node, checkpoint, now_ns)
        if payload is None or (above.parent is not None and above.host is None):
            return False
        n_bytes = payload.n_bytes + (checkpoint.n_bytes if checkpoint is not None else 0)
        if not self.ensure_free(n_bytes, now_ns, keep=above):
            return False
        node.host = payload
        if checkpoint is not None:
            self._set_checkpoint(node, checkpoint)
        self.used += payload.n_bytes
        self._valid.pop(above, None)  # no leaf any more
        self._push(node, now_ns)
        return True

    def put_checkpoint(self, node: Node, checkpoint: Payload, now_ns: int) -> bool:
        """Keep what cannot be cut beside a node's KV, instead of what was. False: no KV there, or it does not fit."""
        if node.host is None:
            return False
        before = node.checkpoint.n_bytes if node.checkpoint is not None else 0
        if not self.ensure_free(max(checkpoint.n_bytes - before, 0), now_ns, keep=node):
            return False
        self._set_checkpoint(node, checkpoint)
        if node in self._valid:
            self._push(node, now_ns)  # it takes more memory now
        return True

    def _set_checkpoint(self, node: Node, checkpoint: Payload) -> None:
        if node.checkpoint is not None:
            self.used -= node.checkpoint.n_bytes
        node.checkpoint = checkpoint
        self.used += checkpoint.n_bytes

    def touch(self, nodes: list[Node], now_ns: int) -> None:
        """These nodes have served a prompt."""
        for node in nodes:
            node.used_ns = now_ns
            node.hits += 1
        valid = self._valid
        for node in [node for node in nodes if node in valid]:
            self._push(node, now_ns)

    def ensure_free(self, n_bytes: int, now_ns: int, keep: Node | None = None) -> bool:
        """Evict until ``n_bytes`` more fit. ``keep`` and what is above it stay, and so does what is pinned.

        False: they do not fit. Beside ``keep`` that is known at once, and nothing goes; beside what is pinned it is
        known only when the rest has gone.
        """
        safe = set(keep.path()) if keep is not None else set()
        if sum(node.n_bytes for node in safe) + n_bytes > self.budget:
            return False
        aside: list[tuple[float, int, Node]] = []
        while self.used + n_bytes > self.budget:
            if self._stale:
                self._score_all(now_ns)
            if not self._heap:
                break
            score, number, node = entry = heapq.heappop(self._heap)
            if self._valid.get(node) != number:
                continue
            if node in safe or node.pinned_until_ns > now_ns:
                aside.append(entry)
                continue
            self.policy.evicted(node, score)
            self._evict_end(node, self.used + n_bytes - self.budget, now_ns)
        for entry in aside:
            heapq.heappush(self._heap, entry)  # with the score it had: nothing has happened to it
        return self.used + n_bytes <= self.budget

    def budget_below(self, above: Node | None) -> int:
        """Bytes that there would be for a node below ``above`` if all but what it hangs on had gone."""
        return max(self.budget - sum(node.n_bytes for node in (above.path() if above is not None else ())), 0)

    def drop(self, node: Node, now_ns: int) -> int:
        """Give up a node's KV and that of all below it. Returns the bytes that that freed."""
        above, before = node.parent, self.used
        for one in reversed(node.subtree()):
            self._remove(one)
            self._tree.prune(one)
        self._leaf_again(above, now_ns)
        return before - self.used

    def set_policy(self, policy: EvictionPolicy, now_ns: int) -> None:
        """Another policy decides from now on; nothing moves."""
        self._install(policy)
        self._score_all(now_ns)

    def rescore(self) -> None:
        """Ask for all scores anew before the next eviction: the policy's parameters have changed, say."""
        self._stale = True

    def _install(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        if isinstance(policy, GuardedPolicy):
            policy.on_fallback = self.rescore

    def _score_all(self, now_ns: int) -> None:
        self._stale = False  # first: a policy may fail while it is asked
        leaves = list(self._valid)
        self._heap.clear()
        self._valid.clear()
        for node in leaves:
            self._push(node, now_ns)

    def _evict_end(self, node: Node, n_bytes: int, now_ns: int) -> None:
        """Give up at least ``n_bytes`` of a leaf, from its end, or all of it."""
        assert node.host is not None
        if self._can_cut and node.checkpoint is None and node.n_tokens > GRAIN:
            per_token = max(node.host.n_bytes // node.n_tokens, 1)
            going = -(-n_bytes // per_token)
            kept = (node.n_tokens - going) // GRAIN * GRAIN
            if kept > 0:
                self._tree.split(node, kept)
        above = node.parent
        if self._on_evict is not None:
            self._on_evict(node)
        self._remove(node)
        self._tree.prune(node)
        self._leaf_again(above, now_ns)

    def _remove(self, node: Node) -> None:
        """Give up what a node has here."""
        if node.host is not None:
            self.used -= node.host.n_bytes
            node.host = None
        if node.checkpoint is not None:
            self.used -= node.checkpoint.n_bytes
            node.checkpoint = None
        self._valid.pop(node, None)

    def _leaf_again(self, node: Node | None, now_ns: int) -> None:
        """Something below a node has gone: it may be the next."""
        if node is not None and node.host is not None and node not in self._valid and self._is_leaf(node):
            self._push(node, now_ns)

    def _is_leaf(self, node: Node) -> bool:
        return all(child.host is None for child in node.children.values())

    def _push(self, node: Node, now_ns: int) -> None:
        number = next(self._numbers)
        self._valid[node] = number
        heapq.heappush(self._heap, (self.policy.score(node, now_ns), number, node))
        if len(self._heap) > 64 + 4 * len(self._valid):  # mostly entries that count no more
            self._heap = [entry for entry in self._heap if self._valid.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
