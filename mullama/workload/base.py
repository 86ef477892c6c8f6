"""The records everything here is made of: a request of a trace, a workload of them, an outcome. Plain data; times in
seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class TraceRequest:
    """One request of a workload: when it arrives and how long it is."""

    at_s: float  # arrival, from the start of the trace
    prompt_tokens: int
    output_tokens: int  # tokens it generates, exactly
    priority: int = 0
    user: str | None = None
    slo_ms: float | None = None
    group: str = ""  # class of the workload, such as "urgent"; reports are also split by it
    blocks: tuple[int, ...] = ()  # ids of its prefix blocks: equal ids at equal places hold equal tokens
    block_tokens: int = 0  # tokens of one block


@dataclass(slots=True, frozen=True)
class Outcome:
    """What became of request ``index`` of a trace, played on the real engine or in the simulator.

    Times are seconds from the start of the trace; ``token_s`` holds the time at which each token was generated
    (several may share one), so that TTFT and ITL are derived and never stored twice.
    """

    index: int
    request: TraceRequest
    token_s: tuple[float, ...] = ()
    finished_s: float = 0.0
    cached_tokens: int = 0  # prompt tokens that were not computed
    preemptions: int = 0
    error: str | None = None  # why it failed; such a request has no TTFT


@dataclass(slots=True, frozen=True)
class Client:
    """A closed-loop client: sends its requests in turn, each ``think_s`` after the one before was answered.

    Here ``at_s`` is the earliest time at which a request is sent; 0 leaves it to the answers.
    """

    requests: tuple[TraceRequest, ...]
    think_s: float = 0.0


@dataclass(slots=True, frozen=True)
class Workload:
    """What is played: requests that arrive whatever becomes of the others, and clients that wait for their answers.

    Every request has an index, which outcomes, prompts and recordings use: the open-loop ones come first, in order of
    arrival, then those of the first client, and so on.
    """

    requests: tuple[TraceRequest, ...] = ()  # open loop, by arrival
    clients: tuple[Client, ...] = ()
    stop_s: float | None = None  # clients send nothing from then on; tokens are counted up to then
    spec: str = ""  # what it was made from
    seed: int = 0

    def all_requests(self) -> list[TraceRequest]:
        """Every request in the order of its index."""
        return [*self.requests, *(request for client in self.clients for request in client.requests)]

    def first_indices(self) -> list[int]:
        """The index of each client's first request."""
        firsts, index = [], len(self.requests)
        for client in self.clients:
            firsts.append(index)
            index += len(client.requests)
        return firsts

    def longest(self) -> tuple[int, int]:
        """Index and tokens (prompt and output) of the longest request. ValueError for an empty workload."""
        needs = [request.prompt_tokens + request.output_tokens for request in self.all_requests()]
        return needs.index(max(needs)), max(needs)
