"""What a scheduler sees and what it decides. Sans-I/O: no clock, thread, model or event loop.

A policy is asked for a plan only when something changed: an arrival, a finish, a cancelled request, a prefill chunk
done, a plan's ``repeat`` or ``until_ns`` reached. Between those moments the core repeats the plan without calling
Python. The same classes run in the engine, in the simulator and as shadows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from mullama.errors import PluginError
from mullama.files import counted
from mullama.plugins.groups import shown
from mullama.types import Preempt, SeqState

RUNNING = (SeqState.PREFILL, SeqState.DECODE)
QUEUED = (SeqState.WAITING, SeqState.PREEMPTED)


@dataclass(slots=True)
class SeqView:
    """One sequence as a policy sees it. The engine keeps it up to date; a policy only reads it.

    WAITING and PREEMPTED sequences hold no slot; PREFILL and DECODE ones do. A PREEMPTED sequence whose KV was saved
    goes on where it was: ``prefill_left`` is 0 when it was decoding. One whose KV was given up has to compute its
    prompt and what it had generated again: ``prefill_left`` says how much (an upper bound: some may still be there).
    """

    id: int
    state: SeqState
    prompt_tokens: int
    prefill_left: int  # tokens to compute before it decodes; while WAITING as far as is known (see cached_tokens)
    max_tokens: int
    arrival_ns: int
    generated: int = 0
    priority: int = 0  # lower is more urgent
    user: str | None = None
    slo_ms: float | None = None  # wanted time to first token
    cells: int = 0  # its tokens in the KV cache (PREEMPTED: saved in host memory)
    state_ns: int = 0  # when it came into its state
    preemptions: int = 0
    preempt: Preempt = Preempt.AUTO  # what the request says of being preempted
    cached_tokens: int = 0  # of its prompt, from the KV cache: expected while WAITING, found when it was admitted

    def expect(self, n_tokens: int) -> None:
        """While WAITING: its prompt would find so many tokens in the KV cache. For whoever keeps the view."""
        self.cached_tokens = min(n_tokens, self.prompt_tokens - 1)
        self.prefill_left = self.prompt_tokens - self.cached_tokens

    @property
    def is_queued(self) -> bool:
        """Without a slot, and wants one."""
        return self.state in QUEUED

    @property
    def is_running(self) -> bool:
        """Holds a slot."""
        return self.state in RUNNING

    @property
    def tokens_left(self) -> int:
        """Most tokens it may still generate."""
        return max(self.max_tokens - self.generated, 0)


@dataclass(slots=True, frozen=True)
class Costs:
    """What work costs on this machine now, in ns, by the engine's own measurements; 0 while unknown."""

    prefill_token_ns: float = 0.0  # one prompt token
    decode_step_ns: float = 0.0  # one step of the sequences that decode now
    swap_token_ns: float = 0.0  # saving and restoring the KV of one token


@dataclass(slots=True, frozen=True)
class EngineState:
    """The moment a plan is asked for."""

    now_ns: int
    step: int
    free_slots: int  # sequences that may leave the queue now
    max_prefill: int  # most prompt tokens one step may compute
    n_slots: int = 0
    free_cells: int = 1 << 62  # tokens of KV that may be added now, retained prefixes given up
    costs: Costs = Costs()


@dataclass(slots=True)
class Plan:
    """``tokens``: for each sequence taking part, how many tokens this step: 1 to decode, or a prefill chunk.

    ``preempt``: sequences that lose their slot first, and what becomes of their KV. A queued sequence that is given
    tokens is admitted, in the order of the mapping (one that decodes again after a swap: 1 token). A plan with chunks
    or admissions holds for one step; another is repeated ``repeat`` times (0: until something changes), and not
    beyond ``until_ns`` (0: no limit). An empty plan with ``until_ns`` leaves the engine idle until then.
    """

    tokens: dict[int, int] = field(default_factory=dict)
    repeat: int = 0
    preempt: dict[int, Preempt] = field(default_factory=dict)
    until_ns: int = 0


class Scheduler(Protocol):
    """Decides who computes what.

    Built-in policies are called on the engine thread; a user's on a planner thread, with views of its own.
    """

    name: ClassVar[str]

    def add(self, seq: SeqView) -> None:
        """A request arrived (WAITING), or is handed over by another policy (any state but DONE)."""

    def remove(self, seq_id: int) -> None:
        """It ended, whatever the reason."""

    def plan(self, state: EngineState) -> Plan:
        """Decide the next step."""

    def params(self) -> Mapping[str, Any]:
        """The policy's parameters and their values."""


MAX_REPEAT = (1 << 31) - 1
MAX_NS = (1 << 63) - 1
IDLE_LIMIT_NS = 1_000_000_000  # how long a policy may leave everything idle while work waits


def own_plan(plan: object) -> Plan:
    """The plan of foreign code as plain numbers that it cannot change any more; this runs its code for the last time.

    Raises PluginError for what is no plan, and whatever its mappings raise.
    """
    if not isinstance(plan, Plan):
        raise PluginError(f"plan() returned {type(plan).__name__}, not a Plan")
    tokens = {_whole(seq_id, "a sequence"): n for seq_id, n in dict(plan.tokens).items()}
    for seq_id, n in tokens.items():
        if type(n) is not int:
            raise PluginError(f"sequence {seq_id} cannot be given {shown(repr, n)} tokens: a whole number is needed")
    preempt = {_whole(seq_id, "a sequence"): _preempt(seq_id, how) for seq_id, how in dict(plan.preempt).items()}
    return Plan(tokens, _whole(plan.repeat, "repeat"), preempt, _whole(plan.until_ns, "until_ns"))


def _whole(value: object, what: str) -> int:
    if type(value) is not int:
        raise PluginError(f"the plan says {shown(repr, value)} for {what}: a whole number is needed")
    return value


def _preempt(seq_id: object, how: object) -> Preempt:
    if type(how) is Preempt:
        return how
    if type(how) is str and how in tuple(Preempt):
        return Preempt(how)
    raise PluginError(f"sequence {seq_id} can be preempted by {', '.join(Preempt)}, the plan says {shown(repr, how)}")


def wanting(n: int) -> str:
    """How many sequences want to compute, in words."""
    return f"{counted(n, 'sequence')} {'wants' if n == 1 else 'want'} to compute"


class Progress:
    """Whether the plans of a policy get anywhere."""

    def __init__(self) -> None:
        self._idle_since = 0

    def check(self, plan: Plan, now_ns: int, n_wanting: int) -> None:
        """After each plan. Raises PluginError for an empty one that wants no time to pass, or too many in a row."""
        if plan.tokens or not n_wanting:
            self._idle_since = 0
            return
        self._idle_since = self._idle_since or now_ns
        if plan.until_ns <= now_ns:
            raise PluginError(f"the plan is empty while {wanting(n_wanting)}")
        if now_ns - self._idle_since > IDLE_LIMIT_NS:
            raise PluginError(f"no progress for {IDLE_LIMIT_NS / 1e9:g} s while {wanting(n_wanting)}")


def check_plan(plan: Plan, known: Mapping[int, SeqView], state: EngineState) -> None:
    """Raise PluginError, saying what is wrong, unless the engine can carry out ``plan``, of a user an ``own_plan``."""
    for name, value, most in (("repeat", plan.repeat, MAX_REPEAT), ("until_ns", plan.until_ns, MAX_NS)):
        if type(value) is not int or not 0 <= value <= most:
            raise PluginError(f"the plan's {name} is {shown(repr, value)}; it must be a whole number from 0 to {most}")
    admitted = 0
    prefill = 0
    for seq_id, how in plan.preempt.items():
        seq = known.get(seq_id)
        if seq is None:
            raise PluginError(f"the plan preempts sequence {seq_id}, which does not exist")
        if not seq.is_running:
            raise PluginError(f"the plan preempts sequence {seq_id}, which is {seq.state} and holds no slot")
        if seq_id in plan.tokens:
            raise PluginError(f"the plan preempts sequence {seq_id} and gives it tokens")
        if how not in tuple(Preempt):
            raise PluginError(f"sequence {seq_id} can be preempted by {', '.join(Preempt)}, the plan says {how!r}")
    for seq_id, n in plan.tokens.items():
        seq = known.get(seq_id)
        if seq is None:
            raise PluginError(f"the plan names sequence {seq_id}, which does not exist")
        if type(n) is not int:
            raise PluginError(f"sequence {seq_id} cannot be given {n!r} tokens: a whole number is needed")
        if seq.state is SeqState.DECODE or (seq.state is SeqState.PREEMPTED and seq.prefill_left == 0):
            if n != 1:
                raise PluginError(f"sequence {seq_id} decodes: one token a step, the plan says {n}")
        elif seq.is_queued or seq.state is SeqState.PREFILL:
            if not 1 <= n <= seq.prefill_left:
                raise PluginError(f"sequence {seq_id} has {seq.prefill_left} prompt tokens left, the plan says {n}")
            prefill += n
        else:
            raise PluginError(f"sequence {seq_id} is {seq.state} and cannot compute")
        admitted += seq.is_queued
    free_slots = state.free_slots + len(plan.preempt)
    if admitted > free_slots:
        raise PluginError(f"the plan admits {admitted} sequences, {free_slots} slots are free")
    if prefill > state.max_prefill:
        raise PluginError(f"the plan computes {prefill} prompt tokens, {state.max_prefill} are allowed")
