"""The prefix tree beside a model that keeps every path as it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kv_support import FakeCheckpoint, FakeRows, check_tree, held

from mullama.kv.index.tree import PrefixTree, common, pack, unpack

Path = tuple[bytes, tuple[int, ...]]  # namespace, tokens

tokens_st = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)
spaces_st = st.sampled_from([b"", b"salt"])
slots_st = st.integers(0, 3)


def prefixes(path: Path) -> set[Path]:
    return {(path[0], path[1][:n]) for n in range(1, len(path[1]) + 1)}


class TreeModel(RuleBasedStateMachine):
    """What is held is kept as sets of prefixes: ``(namespace, tokens[:n])`` stands for token n of a path."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree()
        self.slots: dict[int, Path] = {}
        self.host: set[Path] = set()
        self.disk: set[Path] = set()
        self.checkpoints: set[Path] = set()
        self.now = 0

    @rule(slot=slots_st, space=spaces_st, tokens=tokens_st)
    def hold(self, slot: int, space: bytes, tokens: tuple[int, ...]) -> None:
        end = self.tree.hold(slot, space, pack(tokens), self.now)
        self.slots[slot] = (space, tokens)
        assert unpack(end.tokens()) == list(tokens)

    @rule(slot=slots_st, space=spaces_st, tokens=tokens_st, more=tokens_st, other=tokens_st)
    def look_up_and_hold(
        self, slot: int, space: bytes, tokens: tuple[int, ...], more: tuple[int, ...], other: tuple[int, ...]
    ) -> None:
        """As the engine does for a prompt, with something else done in between."""
        self.tree.match(space, pack(tokens))
        self.hold((slot + 1) % 4, space, other)
        self.hold(slot, space, tokens + more)

    @precondition(lambda self: self.slots)
    @rule(slot=slots_st, more=tokens_st)
    def go_on(self, slot: int, more: tuple[int, ...]) -> None:
        """A slot's path grows, as an answer is generated."""
        if slot in self.slots:
            space, tokens = self.slots[slot]
            self.hold(slot, space, tokens + more)

    @rule(slot=slots_st)
    def release(self, slot: int) -> None:
        self.tree.release(slot)
        self.slots.pop(slot, None)

    @rule(a=slots_st, b=slots_st)
    def exchange(self, a: int, b: int) -> None:
        self.tree.exchange(a, b)
        swapped = {b if slot == a else a if slot == b else slot: path for slot, path in self.slots.items()}
        self.slots = swapped

    @rule(space=spaces_st, tokens=tokens_st, where=st.sampled_from(["host", "disk"]))
    def store(self, space: bytes, tokens: tuple[int, ...], where: str) -> None:
        for node in self.tree.insert(space, pack(tokens), self.now).path():
            if getattr(node, where) is None:
                setattr(node, where, FakeRows.of(node))
        (self.host if where == "host" else self.disk).update(prefixes((space, tokens)))

    @precondition(lambda self: self.host or self.disk)
    @rule(data=st.data(), where=st.sampled_from(["host", "disk"]))
    def forget(self, data: st.DataObject, where: str) -> None:
        """What a path and all that continues it hold in a tier goes."""
        held = self.host if where == "host" else self.disk
        nodes = [node for node in self.tree.nodes() if getattr(node, where) is not None]
        if not nodes:
            return
        node = data.draw(st.sampled_from(nodes))
        first = (node.namespace, tuple(unpack(node.tokens())[: node.start + 1]))
        gone = [node]
        for one in gone:
            gone.extend(one.children.values())
        for one in reversed(gone):
            setattr(one, where, None)
            if where == "host":
                one.checkpoint = None
            self.tree.prune(one)
        held -= {path for path in held if path[0] == first[0] and path[1][: len(first[1])] == first[1]}
        if where == "host":
            self.checkpoints &= held

    @precondition(lambda self: self.host)
    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from([node for node in self.tree.nodes() if node.host is not None]))
        node.checkpoint = FakeCheckpoint(node.tokens(), 7)
        self.checkpoints.add((node.namespace, tuple(unpack(node.tokens()))))

    @precondition(lambda self: any(node.n_tokens > 1 for node in self.tree.nodes()))
    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from([node for node in self.tree.nodes() if node.n_tokens > 1]))
        n_tokens = data.draw(st.integers(1, node.n_tokens - 1))
        node.cost_ns = 12.0
        before = node.tokens()
        upper = self.tree.split(node, n_tokens)
        assert upper.n_tokens == n_tokens and node.parent is upper and node.tokens() == before
        assert upper.cost_ns + node.cost_ns == pytest.approx(12.0)
        assert (upper.used_ns, upper.hits, upper.created_ns) == (node.used_ns, node.hits, node.created_ns)

    @rule(space=spaces_st, tokens=tokens_st)
    def match(self, space: bytes, tokens: tuple[int, ...]) -> None:
        self.check_match((space, tokens))

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), more=tokens_st)
    def match_more(self, data: st.DataObject, more: tuple[int, ...]) -> None:
        space, tokens = data.draw(st.sampled_from(sorted(self.slots.values())))
        self.check_match((space, tokens + more))

    def check_match(self, path: Path) -> None:
        space, tokens = path
        found = self.tree.match(space, pack(tokens))
        known = set().union(self.host, self.disk, *(prefixes(held) for held in self.slots.values()))

        def longest(of: set[Path]) -> int:
            return next((n for n in range(len(tokens)) if (space, tokens[: n + 1]) not in of), len(tokens))

        assert found.n_tokens == longest(known)
        assert found.n_host == longest(self.host)
        assert found.n_stored == longest(self.host | self.disk)
        shared = {slot: longest(prefixes(held)) for slot, held in self.slots.items()}
        assert found.slots == {slot: n for slot, n in shared.items() if n > 0}
        ends = [n for n in range(1, len(tokens) + 1) if (space, tokens[:n]) in self.checkpoints]
        assert [node.end for node in found.checkpoints] == ends
        at = 0
        for node in found.nodes:
            assert node.start == at < found.n_tokens
            at = node.end
        assert at >= found.n_tokens
        last = found.nodes[-1].tokens() if found.nodes else b""
        assert unpack(last)[: found.n_tokens] == list(tokens[: found.n_tokens])

    @invariant()
    def the_laws_hold(self) -> None:
        self.now += 1
        check_tree(self.tree)
        assert held(self.tree) == {slot: len(path[1]) for slot, path in self.slots.items()}
        for slot, (space, tokens) in self.slots.items():
            end = self.tree.end_of(slot)
            assert end is not None and end.namespace == space and unpack(end.tokens()) == list(tokens)
        found = {"host": set[Path](), "disk": set[Path]()}
        for node in self.tree.nodes():
            path = (node.namespace, tuple(unpack(node.tokens())))
            part = {(path[0], path[1][:n]) for n in range(node.start + 1, node.end + 1)}
            for where, paths in found.items():
                if getattr(node, where) is not None:
                    paths |= part
        assert found == {"host": self.host, "disk": self.disk}

    def teardown(self) -> None:
        for slot in list(self.slots):
            self.release(slot)
        for node in reversed(list(self.tree.nodes())):
            node.host = node.disk = node.checkpoint = None
            self.tree.prune(node)
        assert self.tree.n_nodes == 0
        assert list(self.tree.nodes()) == []
        assert self.tree._roots == {} and held(self.tree) == {}


TestTree = TreeModel.TestCase
TestTree.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


# -- tokens as bytes -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packed_tokens_come_back(tokens: list[int]) -> None:
    assert len(pack(tokens)) == 4 * len(tokens)
    assert unpack(pack(tokens)) == tokens


@given(
    st.lists(st.integers(0, 300), max_size=40),
    st.lists(st.integers(0, 300), max_size=9),
    st.lists(st.integers(0, 300), max_size=9),
)
def test_common_counts_whole_tokens(head: list[int], a: list[int], b: list[int]) -> None:
    """300: two tokens may share some of their bytes."""
    left, right = head + a, head + b
    expected = next(
        (i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right))
    )
    assert common(pack(left), pack(right)) == expected


# -- single cases ---------------------------------------------------------------------------------------------------


def test_the_picture_of_the_docstring() -> None:
    tree = PrefixTree()
    system, one, two = list(range(930)), list(range(1000, 1021)), list(range(2000, 2014))
    tree.hold(2, b"", pack(system + one), 1)
    for node in tree.insert(b"", pack(system + two), 2).path():
        node.host = FakeRows.of(node)
    spans = [(node.start, node.end, sorted(node.slots), node.host is not None) for node in tree.nodes()]
    assert sorted(spans) == [(0, 930, [2], True), (930, 944, [], True), (930, 951, [2], False)]
    found = tree.match(b"", pack(system + two + [7]))
    assert (found.n_tokens, found.n_host, found.slots) == (944, 944, {2: 930})
    assert tree.match(b"other", pack(system)).n_tokens == 0


def test_the_lower_part_of_a_split_stays_the_node_it_was() -> None:
    tree = PrefixTree()
    node = tree.hold(0, b"", pack([1, 2, 3, 4]), 5)
    node.used_ns, node.hits, node.cost_ns, node.pinned_until_ns = 9, 3, 8.0, 11
    tree.hold(1, b"", pack([1, 2, 9]), 6)
    (upper,) = node.path()[:-1]
    assert tree.end_of(0) is node and (node.start, node.end) == (2, 4)
    assert (upper.start, upper.end, sorted(upper.slots)) == (0, 2, [0, 1])
    assert (upper.created_ns, upper.used_ns, upper.hits, upper.pinned_until_ns) == (5, 9, 3, 11)
    assert (upper.cost_ns, node.cost_ns) == (4.0, 4.0)


def test_what_was_looked_up_may_be_gone_when_it_is_inserted() -> None:
    tree = PrefixTree()
    tree.hold(0, b"", pack([1, 2, 3]), 1)
    tree.hold(1, b"", pack([1, 2, 3, 4, 5]), 1)
    assert tree.match(b"", pack([1, 2, 3, 4, 5, 6])).n_tokens == 5
    tree.release(1)  # the last whole node of the match has gone
    end = tree.hold(1, b"", pack([1, 2, 3, 4, 5, 6]), 2)
    assert [(node.start, node.end) for node in end.path()] == [(0, 3), (3, 6)]
    tree.match(b"", pack([1, 2, 3, 4, 5, 6]))
    tree.hold(2, b"", pack([1, 2]), 3)  # and a node of the match may have been cut
    assert [(node.start, node.end) for node in tree.hold(3, b"", pack([1, 2, 3, 4, 5, 6, 7]), 4).path()] == [
        (0, 2), (2, 3), (3, 6), (6, 7),
    ]  # fmt: skip
    other = tree.hold(3, b"salt", pack([1, 2, 3, 4, 5, 6]), 5)
    assert other.namespace == b"salt" and other.start == 0
    check_tree(tree)


def test_a_slot_that_goes_back_leaves_what_it_left() -> None:
    """A regenerated answer: the prompt stays, the old answer goes."""
    tree = PrefixTree()
    tree.hold(0, b"", pack([1, 2, 3, 4]), 1)
    tree.hold(0, b"", pack([1, 2]), 2)
    assert [(node.start, node.end) for node in tree.nodes()] == [(0, 2)]
    tree.hold(0, b"", pack([1, 2]), 3)
    assert tree.n_nodes == 1
    tree.release(0)
    tree.release(0)
    assert tree.n_nodes == 0


@pytest.mark.parametrize("n_tokens", [-1, 0, 3, 4])
def test_a_node_is_cut_inside(n_tokens: int) -> None:
    tree = PrefixTree()
    node = tree.hold(0, b"", pack([1, 2, 3]), 1)
    with pytest.raises(ValueError, match=f"3 tokens cannot be cut after {n_tokens}"):
        tree.split(node, n_tokens)
    check_tree(tree)


@pytest.mark.parametrize("tokens", [b"", b"abc", b"abcde"])
def test_a_path_is_whole_tokens(tokens: bytes) -> None:
    tree = PrefixTree()
    with pytest.raises(ValueError, match="not a path of tokens"):
        tree.hold(0, b"", tokens, 1)
    assert tree._roots == {}


def test_a_long_chain_is_no_recursion() -> None:
    """Thousands of turns of one conversation."""
    tree = PrefixTree()
    for n in range(1, 1501):
        for node in tree.insert(b"", pack(range(n)), n).path()[-1:]:
            node.host = FakeRows.of(node)
    assert tree.n_nodes == 1500
    assert tree.match(b"", pack(range(5000))).n_host == 1500
    for node in reversed(list(tree.nodes())):
        node.host = None
        tree.prune(node)
    assert tree.n_nodes == 0
