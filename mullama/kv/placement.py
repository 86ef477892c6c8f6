"""Which slot a request takes, and which retained prefix makes room. Sans-I/O.

A decode is one ubatch only over a gap-free range of slots, and each ubatch reads all weights again. So running
sequences live on the lowest slots and retained prefixes above them: a new request takes the lowest slot that is not
running, and what it displaces moves to where there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from mullama.kv.choice import Choice, KvSource


@dataclass(slots=True, frozen=True)
class SlotView:
    """A slot: running, or retaining ``tokens`` (0: empty). ``last_used``, a step or a score: the lowest goes first."""

    running: bool
    tokens: int = 0
    last_used: float = 0.0


@dataclass(slots=True, frozen=True)
class Placement:
    """Evict ``evict`` (or None), then exchange ``exchange`` (or None), then open the request in ``slot``."""

    slot: int
    reuse: int  # tokens of the retained prefix to continue
    evict: int | None = None
    exchange: tuple[int, int] | None = None


def place(slots: Sequence[SlotView], match_slot: int, match_tokens: int) -> Placement | None:
    """Decide where a request goes that matches ``match_tokens`` of ``match_slot`` (-1: none). None: all slots run."""
    idle = [i for i, slot in enumerate(slots) if not slot.running]
    if not idle:
        return None
    target = idle[0]
    if match_slot >= 0 and match_tokens > 0:
        # Continue in place; what the target retained changes places with it.
        return Placement(target, match_tokens, exchange=None if match_slot == target else (match_slot, target))
    if slots[target].tokens == 0:
        return Placement(target, 0)
    empty = [i for i in idle if slots[i].tokens == 0]
    if empty:
        return Placement(target, 0, exchange=(target, empty[0]))
    victim = min(idle, key=lambda i: (slots[i].last_used, i))
    return Placement(target, 0, evict=victim, exchange=None if victim == target else (target, victim))


def place_unified(slots: Sequence[SlotView], match_slot: int, match_tokens: int) -> Placement | None:
    """``place`` where all slots are in one buffer: any slot is as good as any other, and nothing needs to move."""
    idle = [i for i, slot in enumerate(slots) if not slot.running]
    if not idle:
        return None
    if match_slot in idle:
        return Placement(match_slot, match_tokens)
    target = min(idle, key=lambda i: (slots[i].tokens > 0, slots[i].last_used, i))
    return Placement(target, 0, evict=target if slots[target].tokens else None)


def place_choice(
    choice: Choice,
    slots: list[SlotView],
    place: Callable[[Sequence[SlotView], int, int], Placement | None] = place,
) -> tuple[Choice, Placement | None]:
    """Where a request goes that takes its KV by ``choice``, and by which way then. Changes ``slots``."""
    if choice.source is KvSource.IN_PLACE:
        return choice, place(slots, choice.slot, choice.n_slot)
    where = place(slots, -1, 0)
    if choice.source is KvSource.COPY and where is not None and not slots[choice.slot].running:
        if where.evict == choice.slot:  # it is its turn to go: no other one has to, then
            return replace(choice, source=KvSource.IN_PLACE), place(slots, choice.slot, choice.n_slot)
        slots[choice.slot] = SlotView(running=True)  # what is copied must not make room for the copy
        where = place(slots, -1, 0)
    return choice, where


def holes(running: Sequence[bool]) -> list[tuple[int, int]]:
    """Exchanges (hole, highest running slot) that make the running slots a gap-free range of the lowest ids."""
    state = list(running)
    moves = []
    for low in range(len(state)):
        if state[low]:
            continue
        high = max((i for i, on in enumerate(state) if on), default=-1)
        if high < low:
            break
        moves.append((low, high))
        state[low], state[high] = True, False
    return moves


def n_ranges(groups: Sequence[Hashable]) -> int:
    """Ubatches of a decode of neighbouring slots: one for each range of one group."""
    return sum(i == 0 or group != groups[i - 1] for i, group in enumerate(groups))


def neighbours(groups: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Exchanges that bring the slots of each group together, in the order in which the groups come first.

    All of them or none: what one of them splits, a later one joins.
    """
    state = list(groups)
    moves = []
    for low in range(1, len(state)):
        if state[low] == state[low - 1]:
            continue
        high = max((i for i in range(low + 1, len(state)) if state[i] == state[low - 1]), default=-1)
        if high >= 0:
            moves.append((low, high))
            state[low], state[high] = state[high], state[low]
    return moves
