"""The prefix index: a radix tree over tokens that knows where the KV of every stretch lives. Sans-I/O.

One tree a model, one root a namespace (salt, adapters), so that what must not be shared is never compared. A node is
a stretch of tokens [start, end); its KV may be in slots of the context, in host memory, on disk, in several of
them, or nowhere any more:

    root ── "You are …" [0, 930) ─┬─ [930, 951) slot 2
                                  └─ [930, 944) host

The laws:

- A slot is named in every node on its path, and its path ends at the end of a node.
- Host and disk hold KV without gaps from the root: a node's KV is only of use with that of all nodes above it.
- A node that holds nothing and leads to nothing does not exist.

Tokens are passed as the bytes of 32-bit integers (``pack``), because comparing bytes is what a processor does best.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, Self

TOKEN_BYTES = 4

# Slots as a node names them. The sets are never changed but replaced, so that a whole path shares one.
NOBODY: frozenset[int] = frozenset()


def pack(tokens: Iterable[int]) -> bytes:
    """Token ids as the tree takes them."""
    ids = tokens if isinstance(tokens, list | tuple) else list(tokens)
    return struct.pack(f"{len(ids)}i", *ids)  # PERF: twice as fast as an array


def namespace_of(salt: str, adapters: bytes = b"") -> bytes:
    """The namespace of a ``cache_salt``; no salt is a namespace as well.

    ``adapters``: what tells the LoRA adapters that compute the KV (``namespaces.adapters_key``); empty: the bare model.
    """
    if adapters:
        # Another personalisation: no salt of a client is ever the namespace of an adapter's KV.
        return hashlib.blake2b(adapters + salt.encode(), digest_size=16, person=b"lora").digest()
    return hashlib.blake2b(salt.encode(), digest_size=16).digest() if salt else b""


def unpack(tokens: bytes) -> list[int]:
    """The token ids again."""
    return array("i", tokens).tolist()


def common(a: bytes, b: bytes) -> int:
    """Tokens that two texts share from their start."""
    high = min(len(a), len(b)) // TOKEN_BYTES
    if a[: high * TOKEN_BYTES] == b[: high * TOKEN_BYTES]:
        return high
    low = 0  # equal up to here; bisect what is left
    while high - low > 1:
        middle = (low + high) // 2
        if a[low * TOKEN_BYTES : middle * TOKEN_BYTES] == b[low * TOKEN_BYTES : middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle
    return low


class Payload(Protocol):
    """KV of a stretch of tokens, whatever holds it."""

    @property
    def n_bytes(self) -> int: ...

    def split(self, n_tokens: int) -> tuple[Self, Self]:
        """The first ``n_tokens`` and the rest, together of as many bytes as this one, which is not used again."""


class Node:
    """A stretch of tokens. Read it; only the tree and the tiers write."""

    __slots__ = (
        "checkpoint",
        "children",
        "cost_ns",
        "created_ns",
        "disk",
        "hits",
        "host",
        "id",
        "key",
        "mixed",
        "namespace",
        "parent",
        "pinned_until_ns",
        "slots",
        "start",
        "used_ns",
    )

    def __init__(
        self, node_id: int, key: bytes, start: int, parent: Node | None, namespace: bytes, now_ns: int
    ) -> None:
        self.id = node_id
        self.key = key
        self.start = start
        self.parent = parent
        self.namespace = namespace
        self.children: dict[bytes, Node] = {}  # by first token
        self.slots = NOBODY
        self.host: Payload | None = None
        self.disk: Payload | None = None
        self.checkpoint: Payload | None = None  # what cannot be cut (window, recurrent state), valid at ``end``
        self.created_ns = now_ns
        self.used_ns = now_ns
        self.hits = 0
        self.cost_ns = 0.0  # what computing it took; 0 while unknown
        self.pinned_until_ns = 0
        # Computed by other weights than those in charge, wholly or in what it builds on: never written to disk.
        self.mixed: bool = parent is not None and parent.mixed

    @property
    def n_tokens(self) -> int:
        return len(self.key) // TOKEN_BYTES

    @property
    def end(self) -> int:
        return self.start + len(self.key) // TOKEN_BYTES

    @property
    def is_stored(self) -> bool:
        """Whether host memory or disk holds it."""
        return self.host is not None or self.disk is not None

    @property
    def n_bytes(self) -> int:
        """Host memory it takes."""
        return sum(part.n_bytes for part in (self.host, self.checkpoint) if part is not None)

    @property
    def has_checkpoint(self) -> bool:
        """Whether what cannot be cut is stored for its end."""
        return self.checkpoint is not None or getattr(self.disk, "has_checkpoint", False)

    @property
    def n_served(self) -> int:
        """Tokens from the start of its prompt that have served another prompt."""
        node: Node | None = self
        while node is not None and node.hits == 0:
            node = node.parent
        return node.end if node is not None else 0

    @property
    def is_bare(self) -> bool:
        """Whether nothing holds it."""
        return not self.slots and self.host is None and self.disk is None and self.checkpoint is None

    def path(self) -> list[Node]:
        """The nodes from below the root to this one."""
        found: list[Node] = []
        node, above = self, self.parent
        while above is not None:
            found.append(node)
            node, above = above, above.parent
        found.reverse()
        return found

    def subtree(self) -> list[Node]:
        """This node and all below it, parents first."""
        found = [self]
        for node in found:  # it grows meanwhile
            found.extend(node.children.values())
        return found

    def tokens(self) -> bytes:
        """All tokens from the start of the prompt to the end of this node."""
        return b"".join(node.key for node in self.path())

    def __repr__(self) -> str:
        return f"<Node {self.id} [{self.start}, {self.end})>"


@dataclass(slots=True)
class Match:
    """What the tree knows of a prompt."""

    n_tokens: int = 0  # that the prompt shares with any path, whoever still holds it
    slots: dict[int, int] = field(default_factory=dict)  # tokens shared with each slot's path
    n_host: int = 0  # tokens in host memory, from the start
    n_stored: int = 0  # tokens in host memory or on disk, from the start
    checkpoints: list[Node] = field(default_factory=list)  # whole nodes with one, by position
    nodes: list[Node] = field(default_factory=list)  # the path; the last one may be shared in part only


class PrefixTree:
    """Not thread-safe: it belongs to the engine thread (or the simulator)."""

    def __init__(self) -> None:
        self.n_nodes = 0
        self._roots: dict[bytes, Node] = {}
        self._ends: dict[int, Node] = {}  # slot -> last node of its path
        self._ids = itertools.count(1)
        # Where the last match ended: its namespace, its tokens and the last whole node. What is looked up is mostly
        # inserted next. A node keeps its end as long as it is in the tree, so the way to it need not be gone twice.
        self._hint: tuple[bytes, bytes, Node] | None = None

    # -- asking -------------------------------------------------------------------------------------------------

    def match(self, namespace: bytes, tokens: bytes) -> Match:
        """Walk down as far as the prompt goes. Changes nothing."""
        found = Match()
        root = self._roots.get(namespace)
        if root is None:
            return found
        nodes, slots, checkpoints = found.nodes, found.slots, found.checkpoints
        named = NOBODY
        at, size = 0, len(tokens)  # in bytes
        n_host = n_stored = 0
        in_host = in_store = is_whole = True
        # PERF: a chat of short turns has hundreds of nodes, so that each has to cost as little as possible.
        children = root.children
        while at < size:
            child = children.get(tokens[at : at + TOKEN_BYTES])
            if child is None:
                break
            if child.slots is not named:  # the further down, the fewer: those that leave share what was before
                if not nodes:
                    slots.update(dict.fromkeys(child.slots, 0))
                for slot in named - child.slots:
                    slots[slot] = at // TOKEN_BYTES
                named = child.slots
            nodes.append(child)
            key = child.key
            end = at + len(key)
            is_whole = tokens[at:end] == key
            at = end if is_whole else at + TOKEN_BYTES * common(key, tokens[at:end])
            if in_store:
                if child.host is None:
                    in_host, in_store = False, child.disk is not None
                if in_host:
                    n_host = at
                if in_store:
                    n_stored = at
            if not is_whole:
                break
            if child.checkpoint is not None or (child.disk is not None and child.has_checkpoint):
                checkpoints.append(child)
            children = child.children
        if children is not root.children:
            last = nodes[-1] if is_whole else nodes[-2]
            self._hint = (namespace, tokens[: TOKEN_BYTES * last.end], last)
        found.n_tokens, found.n_host, found.n_stored = at // TOKEN_BYTES, n_host // TOKEN_BYTES, n_stored // TOKEN_BYTES
        for slot in named:
            slots[slot] = found.n_tokens
        return found

    def end_of(self, slot: int) -> Node | None:
        """Last node of a slot's path; None: it holds nothing."""
        return self._ends.get(slot)

    def nodes(self) -> Iterator[Node]:
        """Every node, parents first."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    # -- changing -----------------------------------------------------------------------------------------------

    def hold(self, slot: int, namespace: bytes, tokens: bytes, now_ns: int) -> Node:
        """From now on the slot holds these tokens, instead of what it held. Returns the last node of its path."""
        end = self.insert(namespace, tokens, now_ns)
        old = self._ends.get(slot)
        self._ends[slot] = end
        _move(slot, old, end)
        if old is not None:
            self.prune(old)
        return end

    def release(self, slot: int) -> None:
        """The slot holds nothing any more. Harmless when it held nothing."""
        old = self._ends.pop(slot, None)
        if old is not None:
            _move(slot, old, None)
            self.prune(old)

    def exchange(self, a: int, b: int) -> None:
        """Two slots have changed places."""
        ends = {slot: node for slot in (a, b) if (node := self._ends.pop(slot, None)) is not None}
        for slot, end in ends.items():
            _move(slot, end, None)
        for slot, end in ends.items():
            other = b if slot == a else a
            _move(other, None, end)
            self._ends[other] = end

    def insert(self, namespace: bytes, tokens: bytes, now_ns: int) -> Node:
        """See that a node ends where ``tokens`` end, and return it. The caller gives it something to hold."""
        if not tokens or len(tokens) % TOKEN_BYTES:
            raise ValueError(f"{len(tokens)} bytes are not a path of tokens")
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = Node(0, b"", 0, None, namespace, now_ns)
        at, size = 0, len(tokens)
        if self._hint is not None:
            known_in, known, last = self._hint
            if known_in == namespace and last.parent is not None and tokens.startswith(known):
                node, at = last, len(known)
        while at < size:
            child = node.children.get(tokens[at : at + TOKEN_BYTES])
            if child is None:
                child = Node(next(self._ids), tokens[at:], at // TOKEN_BYTES, node, namespace, now_ns)
                node.children[tokens[at : at + TOKEN_BYTES]] = child
                self.n_nodes += 1
                return child
            key = child.key
            end = at + len(key)
            if tokens[at:end] != key:
                child = self.split(child, common(key, tokens[at:end]))
                end = at + len(child.key)
            at = end
            node = child
        return node

    def split(self, node: Node, n_tokens: int) -> Node:
        """Cut a node after ``n_tokens``; returns the new upper part. The lower part stays the node that it was."""
        if not 0 < n_tokens < node.n_tokens:
            raise ValueError(f"a node of {node.n_tokens} tokens cannot be cut after {n_tokens}")
        cut = n_tokens * TOKEN_BYTES
        parent = node.parent
        assert parent is not None
        upper = Node(next(self._ids), node.key[:cut], node.start, parent, node.namespace, node.created_ns)
        upper.slots = node.slots
        upper.used_ns, upper.hits, upper.pinned_until_ns = node.used_ns, node.hits, node.pinned_until_ns
        upper.mixed = node.mixed
        upper.cost_ns = node.cost_ns * n_tokens / node.n_tokens
        node.cost_ns -= upper.cost_ns
        if node.host is not None:
            upper.host, node.host = node.host.split(n_tokens)
        if node.disk is not None:
            upper.disk, node.disk = node.disk.split(n_tokens)
        parent.children[upper.key[:TOKEN_BYTES]] = upper
        node.key = node.key[cut:]
        node.start += n_tokens
        node.parent = upper
        upper.children[node.key[:TOKEN_BYTES]] = node
        self.n_nodes += 1
        return upper

    def prune(self, node: Node) -> None:
        """Remove a node that holds nothing and leads to nothing, and what that leaves bare above it."""
        while node.parent is not None and not node.children and node.is_bare:
            parent = node.parent
            del parent.children[node.key[:TOKEN_BYTES]]
            node.parent = None
            self.n_nodes -= 1
            if parent.parent is None:
                if not parent.children:
                    del self._roots[parent.namespace]
                return
            node = parent


def _move(slot: int, old: Node | None, new: Node | None) -> None:
    """A slot's path ended at ``old`` (None: nowhere) and ends at ``new`` now; what is above both is not visited."""
    above = None
    if old is not None and new is not None:
        left, right = old, new
        while left is not right and left.parent is not None and right.parent is not None:
            if left.end >= right.end:
                left = left.parent
            else:
                right = right.parent
        above = left if left is right else None
    names: frozenset[int] = NOBODY
    seen: frozenset[int] | None = None  # what the last node had instead of ``names``
    node = old
    while node is not None and node is not above and node.parent is not None:
        if node.slots is not seen:
            seen = node.slots
            names = seen - {slot} or NOBODY
        node.slots = names
        node = node.parent
    seen = None
    node = new
    while node is not None and node is not above and node.parent is not None:
        if node.slots is not seen:
            seen = node.slots
            names = seen | {slot}
        node.slots = names
        node = node.parent
