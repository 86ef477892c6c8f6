"""The slots of the simulated engine: which sequence is where, what the others retain, what a request finds there."""

from __future__ import annotations

from dataclasses import dataclass

from mullama.kv.placement import SlotView, holes, place


@dataclass(slots=True, frozen=True)
class Content:
    """What the tokens of a sequence are, as far as prefixes go: blocks that others may share, then its own."""

    owner: int
    prompt_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0

    def common(self, other: Content) -> int:
        """Leading tokens that two sequences have in common; for the same sequence, all (they count as endless)."""
        if self.owner == other.owner:
            return 1 << 62
        whole = min(self.block_tokens, other.block_tokens)
        n = 0
        for ours, theirs in zip(self.blocks, other.blocks, strict=False):
            if ours != theirs:
                break
            n += whole
            if self.block_tokens != other.block_tokens:
                break  # the shorter block is the beginning of the longer one
        return min(n, self.prompt_tokens, other.prompt_tokens)


@dataclass(slots=True)
class Slot:
    """Running ``handle`` (0: none), or retaining ``cells`` tokens (0: empty) since step ``last_used``.

    ``cells`` is kept up to date here for retained prefixes only; those of a running sequence are in its view.
    """

    handle: int = 0
    content: Content | None = None
    cells: int = 0
    last_used: int = 0


class Slots:
    """The same placement as the engine's (mullama/kv/placement.py)."""

    def __init__(self, n_slots: int) -> None:
        self.slots = [Slot() for _ in range(n_slots)]
        self.n_running = 0

    @property
    def free(self) -> int:
        return len(self.slots) - self.n_running

    def retained(self) -> int:
        """Tokens of retained prefixes."""
        return sum(slot.cells for slot in self.slots if not slot.handle)

    def match(self, content: Content, n_tokens: int) -> tuple[int, int]:
        """The slot whose prefix saves most of ``n_tokens``, and how many; (-1, 0): none. One is always computed."""
        best, best_n = -1, 0
        for i, slot in enumerate(self.slots):
            if slot.handle or slot.content is None:
                continue
            n = min(slot.content.common(content), slot.cells, n_tokens - 1)
            if n > best_n:
                best, best_n = i, n
        return best, best_n

    def place(self, content: Content | None, n_tokens: int) -> tuple[int, int, int, int]:
        """Make a slot ready for a sequence: (slot, tokens it finds there, retained tokens given up, tokens moved).

        Without ``content`` nothing is looked for.
        """
        match = self.match(content, n_tokens) if content is not None else (-1, 0)
        where = place([SlotView(slot.handle != 0, slot.cells, slot.last_used) for slot in self.slots], *match)
        assert where is not None, "the plan was checked against the free slots"
        evicted = self.evict(where.evict) if where.evict is not None else 0
        moved = 0
        if where.exchange is not None:
            a, b = where.exchange
            moved = self.slots[a].cells + self.slots[b].cells
            self.exchange(a, b)
        return where.slot, min(where.reuse, self.slots[where.slot].cells), evicted, moved

    def occupy(self, slot: int, handle: int, content: Content) -> None:
        self.slots[slot] = Slot(handle, content)
        self.n_running += 1

    def release(self, slot: int, retain: int, step: int) -> None:
        """The sequence leaves its slot, which retains so many tokens of it."""
        self.n_running -= 1
        self.slots[slot] = Slot(0, self.slots[slot].content, retain, step) if retain else Slot()

    def evict(self, slot: int) -> int:
        """Drop what a slot retains. Returns its tokens."""
        cells = self.slots[slot].cells
        self.slots[slot] = Slot()
        return cells

    def evict_oldest(self, n_tokens: int) -> int:
        """Drop retained prefixes, the least recently used first, until ``n_tokens`` are free. Returns those freed."""
        kept = sorted((slot.last_used, i) for i, slot in enumerate(self.slots) if not slot.handle and slot.cells)
        freed = 0
        for _, i in kept:
            if freed >= n_tokens:
                break
            freed += self.evict(i)
        return freed

    def exchange(self, a: int, b: int) -> None:
        self.slots[a], self.slots[b] = self.slots[b], self.slots[a]

    def holes(self) -> list[tuple[int, int]]:
        """Exchanges that would make the running slots a gap-free range (see mullama.kv.placement.holes)."""
        if all(slot.handle for slot in self.slots[: self.n_running]):
            return []
        return holes([slot.handle != 0 for slot in self.slots])
