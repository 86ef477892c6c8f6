"""What a simulation is told, what it keeps of a request, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from mullama.errors import ConfigError
from mullama.scheduling import SeqView
from mullama.types import SeqState
from mullama.workload.base import Outcome, TraceRequest

EVER = 1 << 62


@dataclass(slots=True, frozen=True)
class SimConfig:
    """The engine's sizes, as ``serve`` takes them."""

    n_slots: int = 8
    n_ctx: int = 4096
    n_batch: int = 512
    kv_tokens: int = 0  # KV of all running requests; 0: slots times context
    swap_tokens: int = EVER  # KV of preempted requests kept in host memory
    host_tokens: int = 1 << 16  # KV of prefixes kept in host memory when slots give them up (--kv-host-bytes)
    sampled: bool = False  # tokens cost what the default samplers cost; otherwise what greedy ones do
    batch_steps: bool = True  # equal steps at once: the same result, sooner

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that no engine has."""
        least_one = min(self.n_slots, self.n_ctx, self.n_batch)
        if least_one < 1 or min(self.kv_tokens, self.swap_tokens, self.host_tokens) < 0:
            raise ConfigError("slots, context and batch size must be at least 1, KV, swap and host tokens at least 0")


@dataclass(slots=True, frozen=True)
class Override:
    """What is known better of a request than its trace says; None: nothing."""

    cached_tokens: int | None = None  # prompt tokens that it finds in the cache
    max_tokens: int | None = None  # what it allowed, where it generated less


@dataclass(slots=True)
class SimSequence:
    """A request on its way: what the policy sees, and where it lives."""

    view: SeqView
    index: int
    request: TraceRequest
    found: int | None  # prompt tokens it is known to find in the cache; None: what matches
    key: bytes = b""  # its prompt as the prefix tree takes it; empty: nobody needed it yet
    slot: int = -1
    saved: bool = False  # while PREEMPTED: its KV is in host memory
    computed: int = 0  # tokens it had in the KV cache when it was preempted
    token_ns: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens it will still generate."""
        return self.request.output_tokens - self.view.generated

    @property
    def done(self) -> bool:
        return self.view.generated >= self.request.output_tokens

    @property
    def n_tokens(self) -> int:
        """Tokens known of it: its prompt and what it generated."""
        return self.view.prompt_tokens + self.view.generated

    def move(self, state: SeqState, now: int) -> None:
        self.view.state = state
        self.view.state_ns = now


@dataclass(slots=True)
class Counters:
    """Of one simulated run. Times in ns."""

    steps: int = 0
    plans: int = 0
    replans: int = 0  # plans that gave other tokens than the one before
    ubatches: int = 0
    rebuilds: int = 0
    preemptions: int = 0
    moves: int = 0  # sequences that changed their slot
    swapped_tokens: int = 0  # saved or restored
    recomputed_tokens: int = 0
    evicted_tokens: int = 0
    busy_ns: int = 0
    total_ns: int = 0


@dataclass(slots=True)
class Simulated:
    """One run. ``exhausted``: clients that had sent everything before the workload stops."""

    outcomes: list[Outcome] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    exhausted: int = 0
