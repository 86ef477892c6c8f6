"""When which request of a workload arrives: given times, and clients that wait for their answers."""

from __future__ import annotations

import heapq
from dataclasses import replace

from mullama.workload.base import TraceRequest, Workload

SECOND = 1_000_000_000


class Feed:
    """Times are ns from the start of the workload."""

    def __init__(self, workload: Workload) -> None:
        self.exhausted = 0  # clients that had sent everything before the workload stops
        self._queue: list[tuple[int, int, TraceRequest]] = []  # by time, then by index
        self._stop_ns = None if workload.stop_s is None else round(workload.stop_s * SECOND)
        self._clients = workload.clients
        self._client_of: dict[int, tuple[int, int]] = {}  # index: client, and place among its requests
        self._first = workload.first_indices()
        for index, request in enumerate(workload.requests):
            self._queue.append((round(request.at_s * SECOND), index, request))
        heapq.heapify(self._queue)
        for number in range(len(self._clients)):
            self._send(number, 0, 0)

    @property
    def next_ns(self) -> int | None:
        """When the next request arrives, as far as that is known; None: never."""
        return self._queue[0][0] if self._queue else None

    def take(self) -> tuple[int, int, TraceRequest]:
        """The next request: its time, its index, and itself as it was sent."""
        return heapq.heappop(self._queue)

    def answered(self, index: int, now_ns: int) -> None:
        """Request ``index`` was answered: its client, if it has one, sends the next."""
        found = self._client_of.pop(index, None)
        if found is not None:
            self._send(found[0], found[1] + 1, now_ns)

    def _send(self, number: int, offset: int, now_ns: int) -> None:
        client = self._clients[number]
        if offset >= len(client.requests):
            self.exhausted += self._stop_ns is not None and now_ns < self._stop_ns
            return
        request = client.requests[offset]
        think_ns = round(client.think_s * SECOND) if offset else 0
        at_ns = max(round(request.at_s * SECOND), now_ns + think_ns)
        if self._stop_ns is not None and at_ns >= self._stop_ns:
            return
        index = self._first[number] + offset
        self._client_of[index] = (number, offset)
        heapq.heappush(self._queue, (at_ns, index, replace(request, at_s=at_ns / SECOND)))
