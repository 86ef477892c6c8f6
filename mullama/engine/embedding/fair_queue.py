"""Whose texts are computed next. No clock, no thread.

Clients take turns, and so do the requests of one client: each gives one text to the next ubatch, until that is full. So
a request of two thousand texts holds nobody up for longer than the ubatch that is being computed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from mullama.types import EmbeddingRequest


@dataclass(slots=True, eq=False)
class Job:
    """A request, who waits for it, and what has become of its texts."""

    request: EmbeddingRequest
    future: asyncio.Future[list[bytes]] | Future[list[bytes]]
    since_ns: int = 0
    vectors: list[bytes] = field(default_factory=list)
    n_taken: int = 0
    n_done: int = 0
    error: Exception | None = None
    is_over: bool = False  # ended, or nobody waits for it any more

    def __post_init__(self) -> None:
        self.vectors = [b""] * len(self.request.prompts)

    def resolve(self) -> None:
        """Tell who waits; of an asyncio future on its loop."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.vectors)


class FairQueue:
    """Engine thread only."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[Job]] = {}  # those that have texts left, whose turn is next first

    def __len__(self) -> int:
        """Requests with texts that nobody has taken."""
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Job]:
        for jobs in self._clients.values():
            yield from jobs

    def add(self, job: Job) -> None:
        self._clients.setdefault(job.request.client, deque()).append(job)

    def remove(self, job: Job) -> None:
        """Harmless when it is not there."""
        jobs = self._clients.get(job.request.client)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._clients[job.request.client]

    def take(self, n_tokens: int, n_prompts: int) -> list[tuple[Job, int]]:
        """The next ubatch, as (request, number of its text): at most ``n_prompts``, of ``n_tokens`` together.

        A text with more tokens than that comes alone. One that does not fit any more begins the next ubatch.
        """
        found: list[tuple[Job, int]] = []
        left = n_tokens
        late: list[str] = []  # clients whose next text did not fit
        while self._clients and len(found) < n_prompts:
            client = next((name for name in self._clients if name not in late), None)
            if client is None:
                break
            jobs = self._clients[client]
            job = jobs[0]
            n = len(job.request.prompts[job.n_taken])
            if n > left and found:
                late.append(client)
                continue
            found.append((job, job.n_taken))
            left -= n
            job.n_taken += 1
            jobs.popleft()
            if job.n_taken < len(job.request.prompts):
                jobs.append(job)
            del self._clients[client]  # behind the others
            if jobs:
                self._clients[client] = jobs
            if left <= 0:
                break
        return found
