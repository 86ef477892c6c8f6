"""The disk tier over a real folder, without an engine: who goes when it is full."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_kv_disk import IDENTITY

from mullama.kv.eviction.lru import Lru
from mullama.kv.eviction.policy import Entry
from mullama.kv.index.payload import Rows
from mullama.kv.index.tree import Node, PrefixTree, pack
from mullama.kv.tiers import disk_tier as kvdisk
from mullama.kv.tiers.disk_store import DiskStore
from mullama.kv.tiers.disk_tier import DiskRows, DiskTier

TOKENS = 40


class Counting(Lru):
    """Lru that counts how often it is asked."""

    n_asked = 0

    def score(self, entry: Entry, now_ns: int) -> float:
        self.n_asked += 1
        return super().score(entry, now_ns)


class Disk:
    """A tier that holds ``n`` stretches of the same size, and the thread that it posts to."""

    def __init__(self, folder: Path, n: int) -> None:
        self.tree = PrefixTree()
        self.policy = Counting()
        self.gone: list[int] = []  # first tokens, in the order in which they went
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        store = DiskStore(folder, 1 << 30, IDENTITY)
        store.budget_bytes = n * store.size_of(b"", 0, TOKENS, None)
        self.tier = DiskTier(store, self.tree, lambda: self.policy, 6, self.posted.put, self._goes)

    def _goes(self, node: Node) -> None:
        self.gone.append(node.key[0])

    def write(self, first: int) -> None:
        """A prompt of its own, and what the writer has to say about it."""
        node = self.tree.insert(b"", pack([first] + [7] * (TOKENS - 1)), first)
        node.used_ns = first
        assert self.tier.put(node, Rows([bytes(6 * TOKENS)], TOKENS, 6), first)
        self.posted.get(timeout=30)()

    def held(self) -> set[int]:
        return {node.key[0] for node in self.tree.nodes() if isinstance(node.disk, DiskRows)}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path, 20)
    yield found
    found.tier.close()


def test_the_policy_s_lowest_go_first(disk: Disk) -> None:
    for first in range(1, 51):
        disk.write(first)
    assert disk.gone == list(range(1, 31)) and disk.held() == set(range(31, 51))


def test_the_policy_is_not_asked_about_all_of_them_each_time(disk: Disk) -> None:
    for first in range(1, 121):
        disk.write(first)
    assert len(disk.gone) == 100
    assert disk.policy.n_asked <= 8 * 20, "a ranking of twenty serves until it is used up"


def test_what_was_used_meanwhile_stays(disk: Disk) -> None:
    for first in range(1, 22):
        disk.write(first)
    assert disk.gone == [1]
    used = next(node for node in disk.tree.nodes() if node.key[0] == 2)
    used.used_ns = 1000
    disk.write(22)
    disk.write(23)
    assert disk.gone == [1, 3, 4]


def test_another_policy_decides_at_once(disk: Disk) -> None:
    for first in range(1, 22):
        disk.write(first)

    class Mru(Counting):
        def score(self, entry: Entry, now_ns: int) -> float:
            return -super().score(entry, now_ns)

    disk.policy = Mru()
    disk.write(22)
    assert disk.gone == [1, 21]


def test_a_ranking_ends(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """More have to go than are ranked."""
    monkeypatch.setattr(kvdisk, "RANKED", 3)
    for first in range(1, 21):
        disk.write(first)
    disk.tier.store.budget_bytes //= 2
    disk.write(21)
    assert disk.gone == list(range(1, 12)) and disk.held() == set(range(12, 22))
