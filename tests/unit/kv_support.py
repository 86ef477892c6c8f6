"""KV that knows which tokens it belongs to, and the laws of the prefix tree and the host tier as checks."""

from __future__ import annotations

from mullama.kv.index.tree import Node, PrefixTree, pack, unpack
from mullama.kv.tiers.host_tier import HostTier


class FakeRows:
    """KV of the tokens [start, end) of a path: ``token_bytes`` each."""

    def __init__(self, tokens: list[int], start: int, token_bytes: int = 10) -> None:
        self.start = start
        self.token_bytes = token_bytes
        self._tokens: list[int] | None = tokens

    @classmethod
    def of(cls, node: Node, token_bytes: int = 10) -> FakeRows:
        return cls(unpack(node.key), node.start, token_bytes)

    @property
    def tokens(self) -> list[int]:
        assert self._tokens is not None, "used after it was split"
        return self._tokens

    @property
    def n_bytes(self) -> int:
        return len(self.tokens) * self.token_bytes

    def split(self, n_tokens: int) -> tuple[FakeRows, FakeRows]:
        tokens, self._tokens = self.tokens, None
        return (
            FakeRows(tokens[:n_tokens], self.start, self.token_bytes),
            FakeRows(tokens[n_tokens:], self.start + n_tokens, self.token_bytes),
        )


class FakeCheckpoint:
    """State at the end of a path; nobody may cut it."""

    def __init__(self, path: bytes, n_bytes: int) -> None:
        self.path = path
        self.n_bytes = n_bytes

    def split(self, n_tokens: int) -> tuple[FakeCheckpoint, FakeCheckpoint]:
        raise AssertionError("a checkpoint was cut")


def put_path(
    tree: PrefixTree, tier: HostTier, tokens: list[int], now_ns: int, *, namespace: bytes = b"", token_bytes: int = 10
) -> int:
    """Store a path from the root down, as far as it fits. Returns the tokens that are in the tier."""
    end = tree.insert(namespace, pack(tokens), now_ns)
    stored = 0
    for node in end.path():
        if not tier.put(node, FakeRows.of(node, token_bytes), now_ns):
            break
        stored = node.end
    tree.prune(end)
    return stored


def held(tree: PrefixTree) -> dict[int, int]:
    """Tokens on the path of every slot that holds some."""
    return {slot: node.end for slot, node in tree._ends.items()}


def check_tree(tree: PrefixTree) -> None:
    """The laws of the tree and of what its nodes hold."""
    seen: set[int] = set()
    nodes = list(tree.nodes())
    assert tree.n_nodes == len(nodes) == len({node.id for node in nodes})
    for node in nodes:
        parent = node.parent
        assert parent is not None
        assert parent.parent is None or parent.id in seen, "a child came before its parent"
        seen.add(node.id)
        assert parent.children[node.key[:4]] is node
        assert node.n_tokens > 0 and node.end == node.start + node.n_tokens
        assert node.start == (parent.end if parent.parent is not None else 0)
        assert node.namespace == parent.namespace
        assert node.children or not node.is_bare, f"{node} holds nothing and leads to nothing"
        if parent.parent is not None:
            assert node.slots <= parent.slots
            assert node.host is None or parent.host is not None, f"{node} is in host memory, what is above it is not"
        for payload in (node.host, node.disk):
            if payload is not None:
                assert isinstance(payload, FakeRows)
                assert (payload.tokens, payload.start) == (unpack(node.key), node.start)
        if node.checkpoint is not None:
            assert isinstance(node.checkpoint, FakeCheckpoint)
            assert node.checkpoint.path == node.tokens()
    for slot, n_tokens in held(tree).items():
        end = tree.end_of(slot)
        assert end is not None and end.end == n_tokens
        assert {node.id for node in nodes if slot in node.slots} == {node.id for node in end.path()}
    assert set().union(*(node.slots for node in nodes)) == set(held(tree))
    assert all(root.children for root in tree._roots.values()), "a namespace without a path"


def leaves(tree: PrefixTree) -> list[Node]:
    """What can go: in host memory, and nothing below it is."""
    return [
        node
        for node in tree.nodes()
        if node.host is not None and all(child.host is None for child in node.children.values())
    ]


def check_tier(tree: PrefixTree, tier: HostTier) -> None:
    check_tree(tree)
    assert tier.used == sum(node.n_bytes for node in tree.nodes())
    assert tier.used <= tier.budget
    assert all(node.host is not None for node in tree.nodes() if node.checkpoint is not None)
