"""Whose texts are computed next: clients in turn, requests of a client in turn, nobody left waiting."""

from __future__ import annotations

from concurrent.futures import Future

from hypothesis import given
from hypothesis import strategies as st

from mullama.engine.embedding.fair_queue import FairQueue, Job
from mullama.types import EmbeddingRequest


def job(client: str, *lengths: int) -> Job:
    return Job(EmbeddingRequest(id=client, prompts=[[1] * n for n in lengths], client=client), Future())


def names(taken: list[tuple[Job, int]]) -> list[tuple[str, int]]:
    return [(one.request.client, i) for one, i in taken]


def test_a_single_text_goes_with_the_next_ubatch_whatever_waits() -> None:
    queue = FairQueue()
    queue.add(job("many", *[10] * 2000))
    assert len(queue.take(100, 64)) == 10
    queue.add(job("one", 10))
    assert ("one", 0) in names(queue.take(100, 64))


def test_clients_and_the_requests_of_a_client_take_turns() -> None:
    queue = FairQueue()
    first, second, other = job("a", 1, 1, 1), job("a", 1), job("b", 1, 1, 1)
    for one in (first, second, other):
        queue.add(one)
    taken = queue.take(6, 64)
    assert [one for one, _ in taken] == [first, other, second, other, first, other]
    assert names(queue.take(6, 64)) == [("a", 2)] and not queue


def test_a_text_that_does_not_fit_begins_the_next_ubatch() -> None:
    queue = FairQueue()
    queue.add(job("a", 6, 1))
    queue.add(job("b", 6))
    queue.add(job("c", 3))
    assert names(queue.take(10, 64)) == [("a", 0), ("c", 0), ("a", 1)]
    assert names(queue.take(10, 64)) == [("b", 0)]


def test_one_that_is_longer_than_a_ubatch_comes_alone() -> None:
    queue = FairQueue()
    queue.add(job("a", 50))
    queue.add(job("b", 1))
    assert names(queue.take(10, 64)) == [("a", 0)]
    assert names(queue.take(10, 64)) == [("b", 0)]


def test_at_most_so_many_texts() -> None:
    queue = FairQueue()
    queue.add(job("a", *[1] * 10))
    assert len(queue.take(100, 4)) == 4


def test_what_is_removed_is_not_taken() -> None:
    queue = FairQueue()
    one, other = job("a", 1), job("a", 1)
    queue.add(one)
    queue.add(other)
    queue.remove(one)
    queue.remove(one)
    assert [taken for taken, _ in queue.take(10, 4)] == [other] and not list(queue)


Sizes = list[tuple[str, list[int]]]
requests = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 40), min_size=1, max_size=8)), min_size=1, max_size=8
)


@given(requests, st.integers(1, 60), st.integers(1, 9))
def test_every_text_is_taken_once_within_the_limits(sizes: Sizes, most: int, n: int) -> None:
    queue = FairQueue()
    jobs = [job(client, *lengths) for client, lengths in sizes]
    for one in jobs:
        queue.add(one)
    seen: list[tuple[Job, int]] = []
    while queue:
        before = list(queue)
        taken = queue.take(most, n)
        assert 0 < len(taken) <= n
        assert sum(len(one.request.prompts[i]) for one, i in taken) <= most or len(taken) == 1
        assert taken[0][0] is before[0]  # who waits longest is served first
        seen += taken
    assert len(seen) == len(set(seen)) == sum(len(one.request.prompts) for one in jobs)
