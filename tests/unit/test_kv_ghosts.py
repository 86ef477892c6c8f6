"""What was cached once: the right eviction is named, and memory of them has an end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mullama.kv.index.ghosts import Ghosts
from mullama.kv.index.payload import Ghost
from mullama.kv.index.tree import pack

paths = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def test_who_needed_the_room() -> None:
    ghosts = Ghosts()
    ghosts.add(b"", pack(range(100)), 7, "carol")
    assert ghosts.find(b"", pack(range(100)), 0) == Ghost(7, "carol")
    assert ghosts.find(b"", pack(range(150)), 60) == Ghost(7, "carol"), "a longer prompt, of which 60 tokens were there"
    assert ghosts.find(b"", pack(range(100)), 100) is None, "all that was evicted is there again"
    assert ghosts.find(b"", pack(range(1, 100)), 0) is None
    assert ghosts.find(b"x", pack(range(100)), 0) is None, "another namespace"


def test_a_prompt_that_goes_another_way_was_never_cached() -> None:
    """Its KV ends where it leaves the evicted one's path, and not because of an eviction."""
    ghosts = Ghosts()
    ghosts.add(b"", pack(range(100)), 7, "carol")
    assert ghosts.find(b"", pack([*range(60), 500, 501]), 60) is None
    assert ghosts.find(b"", pack([*range(60), 500, 501]), 59) == Ghost(7, "carol")


def test_the_nearest_eviction_counts() -> None:
    ghosts = Ghosts()
    ghosts.add(b"", pack(range(100)), 7, "carol")
    ghosts.add(b"", pack(range(40)), 9, "dave")
    assert ghosts.find(b"", pack(range(100)), 10) == Ghost(9, "dave")
    assert ghosts.find(b"", pack(range(100)), 40) == Ghost(7, "carol")


def test_the_last_eviction_of_a_stretch_counts() -> None:
    ghosts = Ghosts()
    for at, name in enumerate(("ann", "ben", None)):
        ghosts.add(b"", pack(range(10)), at, name)
    assert ghosts.find(b"", pack(range(10)), 0) == Ghost(2, None)


def test_the_oldest_are_forgotten() -> None:
    ghosts = Ghosts(limit=3)
    for seed in range(5):
        ghosts.add(b"", pack([seed, 1, 2]), seed, f"r{seed}")
    found = [ghosts.find(b"", pack([seed, 1, 2]), 0) for seed in range(5)]
    assert [ghost.request if ghost else None for ghost in found] == [None, None, "r2", "r3", "r4"]


@given(st.lists(paths, max_size=60), st.integers(1, 8))
def test_memory_is_bounded_however_they_branch(added: list[list[int]], limit: int) -> None:
    """Stretches that are cut for others leave no mark behind that nobody forgets."""
    ghosts = Ghosts(limit=limit)
    for at, path in enumerate(added):
        ghosts.add(b"", pack(path), at, str(at))
        nodes = list(ghosts._tree.nodes())
        assert sum(node.host is not None for node in nodes) <= limit
        assert all(node.host is not None or node.children for node in nodes), "it leads to a mark, or is one"
        found = ghosts.find(b"", pack(path), len(path) - 1)
        assert found == Ghost(at, str(at)), "the newest is known"


@given(st.lists(paths, max_size=20), paths, st.integers(0, 11))
def test_a_reason_is_true(added: list[list[int]], asked: list[int], beyond: int) -> None:
    """Whatever is named was evicted, and reached further into this prompt than what is cached of it."""
    ghosts = Ghosts()
    for at, path in enumerate(added):
        ghosts.add(b"", pack(path), at, str(at))
    reaching = []
    for path in added:
        pairs = zip(path, asked, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(path), len(asked)))
        reaching.append(shared > beyond)
    found = ghosts.find(b"", pack(asked), beyond)
    if found is None:
        assert not any(reaching)
    else:
        assert reaching[int(str(found.request))]
