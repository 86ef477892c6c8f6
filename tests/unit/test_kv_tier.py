"""The host tier: its budget, the order in which things go, what must stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kv_support import FakeCheckpoint, FakeRows, check_tier, leaves, put_path

from mullama.kv.eviction.guarded import GuardedPolicy
from mullama.kv.eviction.policy import Entry, EvictionPolicy
from mullama.kv.eviction.registry import create
from mullama.kv.index.tree import Node, PrefixTree, pack, unpack
from mullama.kv.tiers.host_tier import GRAIN, HostTier

# Scores that never change while nothing happens to a stretch: who must go first is known from outside.
ORDERS: dict[str, Callable[[Node], float]] = {
    "lru": lambda node: node.used_ns,
    "fifo": lambda node: node.created_ns,
    "lfu": lambda node: node.hits + node.used_ns / 2**63,
}

#: Paths whose branches are some tokens long or longer than a grain.
parts_st = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2 * GRAIN)), min_size=1, max_size=4)


def path_of(parts: list[tuple[int, int]]) -> list[int]:
    return [kind * 1000 + i for kind, n in parts for i in range(n)]


class TierMachine(RuleBasedStateMachine):
    """What an engine does to a tier, in any order; the laws are checked after each step."""

    can_cut = True

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree()
        self.name = "lru"
        self.safe: set[int] = set()  # ids of nodes that must not go in the current call
        self.gone = 0
        self.now = 1
        self.tier = HostTier(self.tree, 2000, create("lru"), can_cut=self.can_cut, on_evict=self.on_evict)

    def on_evict(self, node: Node) -> None:
        """The next to go is the first of those that may, by the policy's order."""
        assert node.host is not None
        may = [leaf for leaf in leaves(self.tree) if leaf.id not in self.safe and leaf.pinned_until_ns <= self.now]
        assert node in may
        order = ORDERS[self.name]
        assert order(node) == min(order(leaf) for leaf in may)
        self.gone += node.n_tokens

    @rule(parts=parts_st, token_bytes=st.sampled_from([3, 10, 50]))
    def store(self, parts: list[tuple[int, int]], token_bytes: int) -> None:
        tokens = path_of(parts)
        end = self.tree.insert(b"", pack(tokens), self.now)
        for node in end.path():
            above = node.parent
            assert above is not None
            self.safe = {one.id for one in above.path()}
            before, used = self.gone, self.tier.used
            fits = sum(one.n_bytes for one in above.path()) + node.n_tokens * token_bytes <= self.tier.budget
            was_there = node.host is not None
            done = self.tier.put(node, FakeRows.of(node, token_bytes), self.now)
            assert done == (node.host is not None)
            if not fits and not was_there:
                assert not done and (self.gone, self.tier.used) == (before, used), "evicted for nothing"
            if fits and not any(one.pinned_until_ns > self.now for one in self.tree.nodes()):
                assert done
            if not done:
                break
        self.tree.prune(end)
        self.safe = set()

    @rule(parts=parts_st)
    def serve(self, parts: list[tuple[int, int]]) -> None:
        found = self.tree.match(b"", pack(path_of(parts)))
        nodes = [node for node in found.nodes if node.host is not None]
        hits = [node.hits for node in nodes]
        self.tier.touch(nodes, self.now)
        assert [node.hits for node in nodes] == [n + 1 for n in hits]
        assert all(node.used_ns == self.now for node in nodes)

    @rule(slot=st.integers(0, 1), parts=parts_st)
    def hold(self, slot: int, parts: list[tuple[int, int]]) -> None:
        self.tree.hold(slot, b"", pack(path_of(parts)), self.now)

    @rule(slot=st.integers(0, 1))
    def release(self, slot: int) -> None:
        self.tree.release(slot)

    @precondition(lambda self: self.tree.n_nodes)
    @rule(data=st.data(), n_bytes=st.integers(0, 2500), is_pinned=st.booleans())
    def ensure_free(self, data: st.DataObject, n_bytes: int, is_pinned: bool) -> None:
        nodes = list(self.tree.nodes())
        keep = data.draw(st.one_of(st.none(), st.sampled_from(nodes)))
        kept = {one for one in (keep.path() if keep is not None else []) if one.host is not None}
        pinned = [one for one in nodes if one.host is not None and one.pinned_until_ns > self.now]
        kept.update(one for node in pinned for one in node.path())
        self.safe = {one.id for one in (keep.path() if keep is not None else [])}
        fits = self.tier.ensure_free(n_bytes, self.now, keep)
        self.safe = set()
        assert all(one.host is not None for one in kept), "what had to stay is gone"
        assert fits == (self.tier.used + n_bytes <= self.tier.budget)
        # Parts of pinned leaves stay whole, so with pins alone the sum says whether it could have fitted.
        assert fits == (sum(one.n_bytes for one in kept) + n_bytes <= self.tier.budget)

    @precondition(lambda self: leaves(self.tree))
    @rule(data=st.data(), n_bytes=st.integers(0, 800))
    def checkpoint(self, data: st.DataObject, n_bytes: int) -> None:
        node = data.draw(st.sampled_from(list(self.tree.nodes())))
        self.safe = {one.id for one in node.path()}
        had = node.checkpoint
        done = self.tier.put_checkpoint(node, FakeCheckpoint(node.tokens(), n_bytes), self.now)
        self.safe = set()
        assert done or node.checkpoint is had
        assert not done or (node.host is not None and node.checkpoint is not had)

    @precondition(lambda self: leaves(self.tree))
    @rule(data=st.data(), how_long=st.integers(1, 6))
    def pin(self, data: st.DataObject, how_long: int) -> None:
        data.draw(st.sampled_from(leaves(self.tree))).pinned_until_ns = self.now + how_long

    @precondition(lambda self: self.tree.n_nodes)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(list(self.tree.nodes())))
        below = node.subtree()
        used = sum(one.n_bytes for one in below)
        before = self.tier.used
        assert self.tier.drop(node, self.now) == used
        assert self.tier.used == before - used
        assert all(one.host is None and one.checkpoint is None for one in below)

    @rule(name=st.sampled_from(list(ORDERS)))
    def set_policy(self, name: str) -> None:
        before = self.tier.used, self.tree.n_nodes
        self.tier.set_policy(create(name), self.now)
        self.name = name
        assert (self.tier.used, self.tree.n_nodes) == before

    @rule()
    def rescore(self) -> None:
        self.tier.rescore()

    @rule(budget=st.sampled_from([500, 2000, 5000]))
    def resize(self, budget: int) -> None:
        pinned = sum(1 for node in self.tree.nodes() if node.pinned_until_ns > self.now)
        if pinned and budget < self.tier.budget:
            return
        self.tier.budget = budget
        assert self.tier.ensure_free(0, self.now)

    @invariant()
    def the_laws_hold(self) -> None:
        check_tier(self.tree, self.tier)
        assert set(self.tier._valid) == set(leaves(self.tree)), "a leaf that cannot go, or no leaf that can"
        self.now += 1

    def teardown(self) -> None:
        """Everything can go, and leaves nothing behind."""
        self.now += 10  # no pin holds any more
        for slot in (0, 1):
            self.tree.release(slot)
        assert self.tier.ensure_free(self.tier.budget, self.now)
        assert self.tier.used == 0 and self.tree.n_nodes == 0
        assert not self.tier._valid


class WholeMachine(TierMachine):
    """For models whose KV cannot be cut."""

    can_cut = False


TestTier = TierMachine.TestCase
TestTier.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestWholeTier = WholeMachine.TestCase
TestWholeTier.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


# -- single cases ---------------------------------------------------------------------------------------------------


def tier_of(budget: int, name: str = "lru", **options: Any) -> tuple[PrefixTree, HostTier]:
    tree = PrefixTree()
    return tree, HostTier(tree, budget, create(name), **options)


def in_host(tree: PrefixTree) -> list[list[int]]:
    """The paths that are in host memory, from the root to each leaf."""
    return sorted(unpack(leaf.tokens()) for leaf in leaves(tree))


@given(n_tokens=st.integers(1, 400), wanted=st.integers(1, 4000), token_bytes=st.integers(1, 50))
def test_a_leaf_is_cut_at_the_grain(n_tokens: int, wanted: int, token_bytes: int) -> None:
    """No more goes than must, to the next multiple of GRAIN."""
    gone: list[int] = []
    tree, tier = tier_of(n_tokens * token_bytes, on_evict=lambda node: gone.append(node.n_tokens))
    assert put_path(tree, tier, list(range(n_tokens)), 1, token_bytes=token_bytes) == n_tokens
    fits = tier.ensure_free(wanted, 2)
    assert fits == (wanted <= tier.budget)
    kept = sum(node.n_tokens for node in tree.nodes())
    most = (tier.budget - wanted) // token_bytes  # that could stay
    assert kept == (max(most // GRAIN, 0) * GRAIN if fits else n_tokens)
    assert sum(gone) == n_tokens - kept
    check_tier(tree, tier)


def test_without_cutting_the_whole_leaf_goes() -> None:
    tree, tier = tier_of(1000, can_cut=False)
    put_path(tree, tier, list(range(100)), 1)
    assert tier.ensure_free(1, 2)
    assert tier.used == 0 and tree.n_nodes == 0


def test_a_leaf_with_a_checkpoint_goes_as_a_whole() -> None:
    tree, tier = tier_of(1200)
    put_path(tree, tier, list(range(100)), 1)
    (node,) = tree.nodes()
    assert tier.put_checkpoint(node, FakeCheckpoint(node.tokens(), 200), 2)
    assert tier.used == 1200
    assert tier.ensure_free(1, 3)
    assert tier.used == 0 and tree.n_nodes == 0


def test_a_branch_goes_before_what_it_hangs_on() -> None:
    tree, tier = tier_of(10_000)
    put_path(tree, tier, list(range(50)), 1)
    put_path(tree, tier, [*range(50), *range(100, 140)], 2)
    put_path(tree, tier, [*range(50), *range(200, 240)], 3)
    assert tier.used == 1300
    assert tier.ensure_free(10_000 - 900, 4)  # the older branch; the trunk is older still, but carries the other
    assert in_host(tree) == [[*range(50), *range(200, 240)]]
    assert tier.ensure_free(10_000 - 500, 5)
    assert in_host(tree) == [list(range(50))]
    check_tier(tree, tier)


def test_what_serves_prompts_stays() -> None:
    tree, tier = tier_of(900)
    for i in range(3):
        put_path(tree, tier, [1000 * i + j for j in range(30)], i)
    tier.touch(tree.match(b"", pack(range(30))).nodes, 5)
    put_path(tree, tier, [9000 + j for j in range(30)], 6)
    assert [path[0] for path in in_host(tree)] == [0, 2000, 9000]


def test_a_prompt_that_never_fits_costs_the_others_nothing() -> None:
    gone: list[Node] = []
    tree, tier = tier_of(1000, on_evict=gone.append)
    put_path(tree, tier, list(range(60)), 1)
    assert put_path(tree, tier, list(range(1000, 1101)), 2) == 0
    # Its beginning is there; the rest does not fit beside it.
    assert put_path(tree, tier, list(range(101)), 3) == 60
    assert gone == [] and in_host(tree) == [list(range(60))]
    assert tree.n_nodes == 1


def test_what_hangs_on_nothing_is_refused() -> None:
    """The order of calls is from the root down."""
    tree, tier = tier_of(1000)
    tree.hold(0, b"", pack([1, 2]), 1)
    end = tree.hold(0, b"", pack([1, 2, 3]), 1)
    assert not tier.put(end, FakeRows.of(end), 1)
    assert not tier.put_checkpoint(end, FakeCheckpoint(end.tokens(), 1), 1)
    assert tier.used == 0 and end.host is None and end.checkpoint is None
    for node in end.path():
        assert tier.put(node, FakeRows.of(node), 1)
    assert tier.used == 30


def test_what_is_there_is_not_put_again() -> None:
    tree, tier = tier_of(100)
    node = tree.insert(b"", pack([1, 2, 3]), 1)
    first = FakeRows.of(node)
    assert tier.put(node, first, 1)
    assert tier.put(node, FakeRows.of(node), 2)
    assert node.host is first and tier.used == 30
    # A checkpoint that comes with it is kept all the same.
    assert tier.put(node, FakeRows.of(node), 3, FakeCheckpoint(node.tokens(), 70))
    assert node.host is first and tier.used == 100
    assert not tier.put(node, FakeRows.of(node), 4, FakeCheckpoint(node.tokens(), 71))
    check_tier(tree, tier)


def test_checkpoints_are_counted() -> None:
    tree, tier = tier_of(100)
    node = tree.insert(b"", pack([1, 2, 3]), 1)
    assert tier.put(node, FakeRows.of(node), 1, FakeCheckpoint(node.tokens(), 40))
    assert (tier.used, node.n_bytes) == (70, 70)
    assert tier.put_checkpoint(node, FakeCheckpoint(node.tokens(), 70), 2)  # instead of the one before
    assert tier.used == 100
    assert not tier.put_checkpoint(node, FakeCheckpoint(node.tokens(), 71), 3)
    assert tier.used == 100
    assert tier.drop(node, 4) == 100
    assert tier.used == 0 and tree.n_nodes == 0


def test_a_pin_holds_for_a_while() -> None:
    tree, tier = tier_of(600)
    for i in range(2):
        put_path(tree, tier, [100 * i + j for j in range(30)], i)
    (first,) = [leaf for leaf in leaves(tree) if leaf.key[:4] == pack([0])]
    first.pinned_until_ns = 10
    assert tier.ensure_free(300, 9)
    assert in_host(tree) == [list(range(30))]
    assert not tier.ensure_free(301, 9)
    assert tier.ensure_free(600, 10)
    assert tree.n_nodes == 0


def test_what_a_slot_holds_may_leave_host_memory() -> None:
    """The node stays in the tree, and can come back."""
    tree, tier = tier_of(900)
    put_path(tree, tier, list(range(90)), 1)
    end = tree.hold(0, b"", pack([*range(90), 7]), 2)
    assert tier.ensure_free(100, 3)
    assert tree.match(b"", pack(range(90))).n_host == 64
    assert tree.match(b"", pack(range(90))).slots == {0: 90}
    tree.release(0)
    assert [(node.start, node.end) for node in tree.nodes()] == [(0, 64)]
    assert end.parent is None
    check_tier(tree, tier)


def test_a_drop_goes_down_not_up() -> None:
    tree, tier = tier_of(10_000)
    for tail in ([1], [2], [2, 3], [2, 4]):
        put_path(tree, tier, [*range(10, 20), *tail], 1)
    (node,) = [node for node in tree.nodes() if node.key == pack([2])]
    assert tier.drop(node, 2) == 30
    assert in_host(tree) == [[*range(10, 20), 1]]
    (trunk,) = [node for node in tree.nodes() if node.start == 0]
    assert tier.drop(trunk, 3) == 110
    assert tree.n_nodes == 0 and tier.used == 0


def test_a_long_conversation_can_be_dropped() -> None:
    """One node a turn: deeper than Python recurses."""
    tree, tier = tier_of(10**9)
    for n in range(1, 1501):
        put_path(tree, tier, list(range(n)), n)
    assert tree.n_nodes == 1500
    (first,) = [node for node in tree.nodes() if node.start == 0]
    assert tier.drop(first, 2000) == 15_000
    assert tree.n_nodes == 0 and tier.used == 0


class Spy:
    """Scores by time of use, and writes down what it is asked."""

    name = "spy"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []  # (start, now)
        self.went: list[tuple[int, float]] = []  # (start, score)

    def score(self, entry: Entry, now_ns: int) -> float:
        self.asked.append((entry.start, now_ns))
        return float(entry.used_ns)

    def evicted(self, entry: Entry, score: float) -> None:
        self.went.append((entry.start, score))

    def params(self) -> Mapping[str, Any]:
        return {}


def test_when_a_policy_is_asked() -> None:
    spy = Spy()
    tree = PrefixTree()
    tier = HostTier(tree, 10_000, spy)
    put_path(tree, tier, list(range(40)), 1)
    put_path(tree, tier, list(range(60)), 2)
    assert spy.asked == [(0, 1), (40, 2)]  # both when they were stored
    tier.touch(tree.match(b"", pack(range(60))).nodes, 3)
    assert spy.asked[2:] == [(40, 3)]  # only the leaf can go
    assert tier.ensure_free(10_000 - 400, 4)
    assert spy.went == [(40, 3.0)]
    assert spy.asked[3:] == [(0, 4)]  # now the trunk can
    (trunk,) = tree.nodes()
    trunk.pinned_until_ns = 100
    for now in (5, 6, 7):
        assert not tier.ensure_free(10_000, now)
    assert spy.asked[4:] == []  # nothing happened to it: the score stays
    trunk.pinned_until_ns = 0
    assert tier.ensure_free(10_000, 8)
    assert spy.went[1:] == [(0, 3.0)]


def test_a_checkpoint_makes_a_policy_think_again() -> None:
    """A leaf takes more memory with it; a trunk is asked about when it can go."""
    spy = Spy()
    tree = PrefixTree()
    tier = HostTier(tree, 10_000, spy)
    put_path(tree, tier, list(range(40)), 1)
    put_path(tree, tier, list(range(60)), 2)
    trunk, leaf = sorted(tree.nodes(), key=lambda node: node.start)
    assert tier.put_checkpoint(leaf, FakeCheckpoint(leaf.tokens(), 7), 3)
    assert tier.put_checkpoint(trunk, FakeCheckpoint(trunk.tokens(), 7), 4)
    assert spy.asked[2:] == [(40, 3)]


def test_another_policy_takes_over_at_once() -> None:
    tree, tier = tier_of(900)
    for i in range(3):
        put_path(tree, tier, [1000 * i + j for j in range(30)], i)
    tier.touch(tree.match(b"", pack(range(30))).nodes, 5)
    tier.set_policy(create("fifo"), 6)
    assert tier.used == 900
    assert tier.ensure_free(300, 7)
    assert [path[0] for path in in_host(tree)] == [1000, 2000]  # lru would have kept it


class Backwards:
    """What was used last goes first, until it breaks."""

    name = "backwards"

    def __init__(self) -> None:
        self.is_broken = False

    def score(self, entry: Entry, now_ns: int) -> float:
        if self.is_broken:
            raise RuntimeError("I am lost")
        return -float(entry.used_ns)

    def evicted(self, entry: Entry, score: float) -> None: ...

    def params(self) -> Mapping[str, Any]:
        return {}


def test_a_broken_policy_leaves_no_scores_behind(caplog: pytest.LogCaptureFixture) -> None:
    policy = Backwards()
    guarded: EvictionPolicy = GuardedPolicy(policy, "mine")
    tree = PrefixTree()
    tier = HostTier(tree, 1200, guarded)
    for i in range(3):
        put_path(tree, tier, [1000 * i + j for j in range(30)], i)
    policy.is_broken = True
    put_path(tree, tier, [3000 + j for j in range(30)], 3)
    assert len(caplog.records) == 1
    assert tier.ensure_free(600, 4)
    assert [path[0] for path in in_host(tree)] == [2000, 3000]  # the oldest went, as lru would have it
    check_tier(tree, tier)


def test_the_heap_does_not_grow_with_use() -> None:
    tree, tier = tier_of(10_000)
    put_path(tree, tier, list(range(20)), 1)
    nodes = list(tree.nodes())
    for now in range(2, 5000):
        tier.touch(nodes, now)
    assert len(tier._heap) < 100
