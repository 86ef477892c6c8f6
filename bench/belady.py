"""The most that a cache of a given size could have reused, had it known the future: Belady's rule on prefixes.

After Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 1966: what is needed
last goes first. Here a unit is some tokens of a prompt together with all tokens before them, so that a unit is of use
only with the units above it. The rule keeps that order by itself: who reads a unit has read the one above it just
before, so the one above is always needed sooner, and goes later. The free choice without the prefix rule is therefore
one that respects it, and no cache of whole units that respects it can do better.

A unit need not be stored when it is computed (its KV is in the context, not in the cache), so what is not needed before
everything else that is there is left out at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

NEVER = 1 << 62
TOKEN_BYTES = 4  # of the prompts here, as the prefix tree packs them


@dataclass(slots=True, frozen=True)
class Reading:
    """One request: its units from the start of the prompt. Those after ``n_read`` are computed in any case."""

    units: tuple[int, ...]
    n_read: int


class Units:
    """Numbers for units: equal numbers mean equal tokens with equal tokens before them."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self._numbers: dict[tuple[int, bytes], int] = {}

    def reading(self, prompt: bytes) -> Reading:
        """A prompt of packed tokens; its last token is always computed, and a last unit may be short."""
        step = self.unit * TOKEN_BYTES
        units = []
        above = -1
        for at in range(0, len(prompt), step):
            above = self._numbers.setdefault((above, prompt[at : at + step]), len(self._numbers))
            units.append(above)
        n_tokens = len(prompt) // TOKEN_BYTES
        return Reading(tuple(units), -(-(n_tokens - 1) // self.unit))


def next_reads(readings: Sequence[Reading]) -> list[list[int]]:
    """For every unit of every request when it is read next, as a number that grows with time; NEVER if it is not.

    Nor is it where a request computes the unit in any case before it is read: that brings it anew.
    """
    clock = sum(len(reading.units) for reading in readings)
    next_read: dict[int, int] = {}
    found: list[list[int]] = []
    for reading in reversed(readings):
        times = [0] * len(reading.units)
        for i in range(len(reading.units) - 1, -1, -1):
            clock -= 1
            unit = reading.units[i]
            times[i] = next_read.get(unit, NEVER)
            if i < reading.n_read:
                next_read[unit] = clock
            else:
                next_read.pop(unit, None)
        found.append(times)
    found.reverse()
    return found


def optimum(readings: Sequence[Reading], capacity: int) -> list[int]:
    """The units that each request finds, from the start of its prompt, in a cache of ``capacity`` units."""
    cached: dict[int, int] = {}  # unit -> when it is read next
    farthest: list[tuple[int, int]] = []  # heap of (-when, unit); entries that differ from ``cached`` count no more
    hits = []
    for reading, times in zip(readings, next_reads(readings), strict=True):
        n_found = 0
        while n_found < reading.n_read and reading.units[n_found] in cached:
            n_found += 1
        hits.append(n_found)
        for unit, when in zip(reading.units, times, strict=True):
            if when == NEVER:
                cached.pop(unit, None)
                continue
            cached[unit] = when
            heapq.heappush(farthest, (-when, unit))
            while len(cached) > capacity:
                minus_when, last = heapq.heappop(farthest)
                if cached.get(last) == -minus_when:
                    del cached[last]
    return hits
