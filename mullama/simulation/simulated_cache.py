"""The simulated KV cache: which prefix is where, what a request finds there. The twin of mullama/kv/cache.py.

The prefix tree, the host tier, the placement and the choice of the cheapest way are the engine's own; here KV is only
counted. Slots are those of full attention: any prefix of theirs can be cut, copied and saved.
"""

from __future__ import annotations

from array import array
from typing import Self

from mullama.kv.choice import Choice, Foreseen, KvCosts, KvSource, SlotFill, SlotOffer, choose, foreseen, tail_weight
from mullama.kv.eviction.lru import Lru
from mullama.kv.index.tree import TOKEN_BYTES, Match, Node, PrefixTree
from mullama.kv.placement import Placement, SlotView, holes, place, place_choice
from mullama.kv.tiers.host_tier import GRAIN, MIN_STORED, HostTier
from mullama.simulation.cost_model.costs import CostModel
from mullama.simulation.records import Counters, SimConfig, SimSequence
from mullama.workload.base import TraceRequest


class Texts:
    """The tokens of requests, as far as prefixes go: those of their blocks, which others may share, then their own."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}  # any id: a small one

    def prompt(self, index: int, request: TraceRequest) -> bytes:
        """The prompt of request ``index``, as the prefix tree takes it."""
        size, parts, left = request.block_tokens, [], request.prompt_tokens
        for block in request.blocks:
            if left <= 0 or size <= 0:
                break
            number = 2 * self._blocks.setdefault(block, len(self._blocks)) + 1
            parts.append(_run(number, -number, min(size, left)))
            left -= size
        if left > 0:
            parts.append(own(index, left))
        return b"".join(parts)


def own(index: int, n_tokens: int) -> bytes:
    """Tokens that no other request has."""
    number = 2 * index + 2
    return _run(number, -number, n_tokens)


def _run(first: int, others: int, n_tokens: int) -> bytes:
    return array("i", (first,)).tobytes() + array("i", (others,)).tobytes() * (n_tokens - 1)


class Counted:
    """KV of so many tokens; its bytes are its tokens."""

    __slots__ = ("n_bytes",)

    def __init__(self, n_tokens: int) -> None:
        self.n_bytes = n_tokens

    def split(self, n_tokens: int) -> tuple[Self, Self]:
        return type(self)(n_tokens), type(self)(self.n_bytes - n_tokens)


class Cache:
    """Methods that take time return it in ns, last. ``now`` is the simulated time, of which the order counts."""

    def __init__(self, config: SimConfig, costs: CostModel, counters: Counters) -> None:
        self.tree = PrefixTree()
        self.host = HostTier(self.tree, config.host_tokens, Lru(), on_evict=self._leaves_host)
        self.version = 0  # changes with every change of the tree
        self.running: list[SimSequence | None] = [None] * config.n_slots
        self._retained = [0] * config.n_slots  # tokens of the prefix that a slot retains
        self._costs = costs
        self._counters = counters
        prefill_ns = costs.prefill_ns(config.n_batch, 0) / config.n_batch
        self._choice = KvCosts(
            prefill_token=prefill_ns or 1.0,
            save_byte=costs.save_token_ns or 1.0,
            restore_byte=costs.restore_token_ns or 1.0,
            copy_byte=costs.save_token_ns + costs.restore_token_ns or 1.0,
        )

    @property
    def free(self) -> int:
        return self.running.count(None)

    def retained(self) -> int:
        """Tokens of retained prefixes."""
        return sum(self._retained)

    def retained_in(self, slot: int) -> int:
        """Tokens of the prefix that a slot retains."""
        return self._retained[slot]

    # -- asking ---------------------------------------------------------------------------------------------------

    def expected(self, key: bytes, limit: int) -> Foreseen:
        """What a prompt could reuse of its first ``limit`` tokens, now and a little later."""
        match = self.tree.match(b"", key[: TOKEN_BYTES * limit])
        fills = (SlotFill(slot, shared, *self._fill_of(slot)) for slot, shared in match.slots.items())
        return foreseen(min(match.n_host, limit), fills, limit)

    def _fill_of(self, slot: int) -> tuple[int, int]:
        """Tokens in a slot's cells, and tokens known of what it holds."""
        seq = self.running[slot]
        if seq is None:
            return self._retained[slot], self._retained[slot]
        return seq.view.cells, seq.n_tokens

    def _choose(self, match: Match, limit: int) -> Choice:
        n_host = min(match.n_host, limit)
        return choose(
            limit,
            self._offers(match, limit),
            n_host,
            n_host,
            costs=self._choice,
            token_bytes=1,
            can_extend=True,
            tail_weight=tail_weight(self._choice, 1, has_host=self.host.budget > 0),
        )

    def _offers(self, match: Match, limit: int) -> list[SlotOffer]:
        found = []
        for slot, shared in match.slots.items():
            n_past, _ = self._fill_of(slot)
            n = min(shared, n_past, limit)
            if n < 1:
                continue
            runs = self.running[slot] is not None
            end = self.tree.end_of(slot)
            saved = end.end if end is not None and end.host is not None else 0
            tail = 0 if saved >= n_past else n_past - n
            found.append(SlotOffer(slot, n, runs, can_cut=not runs, tail_unsaved=tail, can_copy=True))
        return found

    # -- into a slot ----------------------------------------------------------------------------------------------

    def allocate(self, key: bytes, limit: int, now: int) -> tuple[int, int, int]:
        """Make a slot ready for a prompt: (slot, tokens of it that are there, ns)."""
        match = self.tree.match(b"", key[: TOKEN_BYTES * limit])
        choice, where = place_choice(self._choose(match, limit), self._views())
        slot, ns = self._take(where, now)
        reuse, more = self._fill(slot, choice, now)
        return slot, reuse, ns + more

    def allocate_empty(self, now: int) -> tuple[int, int]:
        """An empty slot for a sequence that brings its own KV: (slot, ns)."""
        slot, ns = self._take(place(self._views(), -1, 0), now)
        return slot, ns + (self.vacate(slot, now)[1] if self._retained[slot] else 0)

    def _views(self) -> list[SlotView]:
        views = []
        for slot, seq in enumerate(self.running):
            end = self.tree.end_of(slot)
            score = float(end.used_ns) if end is not None and self._retained[slot] else 0.0
            views.append(SlotView(seq is not None, self._retained[slot], score))
        return views

    def _take(self, where: Placement | None, now: int) -> tuple[int, int]:
        assert where is not None, "the plan was checked against the free slots"
        ns = 0
        if where.evict is not None:
            ns += self.vacate(where.evict, now)[1]
        if where.exchange is not None:
            ns += self._costs.move_ns(sum(self._retained[slot] for slot in where.exchange))
            self.exchange(*where.exchange)
        return where.slot, ns

    def _fill(self, slot: int, choice: Choice, now: int) -> tuple[int, int]:
        """Bring the chosen prefix into the slot: (tokens that it holds then, ns)."""
        ns, n_past, n = 0, self._retained[slot], 0
        if choice.source is KvSource.IN_PLACE:
            n = min(choice.n_slot, n_past)
        else:
            if n_past:
                ns += self.vacate(slot, now)[1]
                n_past = 0
            if choice.source is KvSource.COPY:
                n = choice.n_slot
                ns += self._costs.move_ns(n)
        if n_past > n:  # what is behind the prefix makes room
            ns += self._store(slot, now)
            self._note_lost(slot, n)
        ns += round(max(choice.n_tokens - n, 0) * self._costs.restore_token_ns)
        return max(choice.n_tokens, n), ns

    def occupy(self, slot: int, seq: SimSequence, key: bytes, now: int, *, served: int = 0) -> None:
        """The sequence lives in the slot now. ``key``: its known tokens, the first ``served`` of them from others."""
        self._retained[slot] = 0
        self.running[slot] = seq
        node = self.tree.hold(slot, b"", key, now)
        self.version += 1
        if served:
            self.host.touch([one for one in node.path() if one.start < served], now)

    # -- out of a slot --------------------------------------------------------------------------------------------

    def leave(self, slot: int, key: bytes, now: int) -> None:
        """The sequence leaves its slot, which retains the KV of ``key`` (empty: nothing)."""
        self.running[slot] = None
        self._retained[slot] = len(key) // TOKEN_BYTES
        self.version += 1
        if not key:
            self.tree.release(slot)
            return
        self.tree.hold(slot, b"", key, now).used_ns = now

    def vacate(self, slot: int, now: int) -> tuple[int, int]:
        """Free a retained slot, saving what it holds to host memory: (cells freed, ns)."""
        ns = self._store(slot, now)
        self._note_lost(slot, 0)
        freed, self._retained[slot] = self._retained[slot], 0
        self.tree.release(slot)
        self.version += 1
        return freed, ns

    def evict_retained(self, n_tokens: int, now: int) -> tuple[int, int]:
        """Free retained slots, the least recently used first, until ``n_tokens`` cells are free: (cells freed, ns)."""
        kept = sorted((view.last_used, slot) for slot, view in enumerate(self._views()) if view.tokens)
        freed = spent = 0
        for _, slot in kept:
            if freed >= n_tokens:
                break
            n, ns = self.vacate(slot, now)
            freed, spent = freed + n, spent + ns
        return freed, spent

    def _store(self, slot: int, now: int) -> int:
        """Copy what a slot holds, and host memory does not, there. Returns ns."""
        end, n_past = self.tree.end_of(slot), self._retained[slot]
        if end is None or self.host.budget <= 0 or n_past < MIN_STORED:
            return 0
        saved, todo = 0, end.path()[::-1]
        while todo:
            node = todo.pop()
            if node.start >= n_past:
                break
            if node.end > n_past:
                node = self.tree.split(node, n_past - node.start)
            if node.host is not None:
                continue
            most = self.host.budget_below(node.parent) // GRAIN * GRAIN
            if 0 < most < node.n_tokens:
                todo.append(node)  # what is left of it
                node = self.tree.split(node, most)
            if not self.host.put(node, Counted(node.n_tokens), now):
                break
            saved += node.n_tokens
        self.version += 1
        return round(saved * self._costs.save_token_ns)

    def _note_lost(self, slot: int, keep: int) -> None:
        """The slot will give up its tokens from ``keep`` on: those that nobody else holds are lost."""
        end, n_past = self.tree.end_of(slot), self._retained[slot]
        for node in end.path() if end is not None else ():
            n = min(node.end, n_past) - max(node.start, keep)
            if n > 0 and node.slots == {slot} and node.host is None:
                self._counters.evicted_tokens += n

    def _leaves_host(self, node: Node) -> None:
        if not node.slots:
            self._counters.evicted_tokens += node.n_tokens

    # -- places ---------------------------------------------------------------------------------------------------

    def exchange(self, a: int, b: int) -> None:
        """Two slots change places."""
        self._retained[a], self._retained[b] = self._retained[b], self._retained[a]
        self.running[a], self.running[b] = self.running[b], self.running[a]
        for slot in (a, b):
            if (seq := self.running[slot]) is not None:
                seq.slot = slot
        self.tree.exchange(a, b)

    def waits_for(self, key: bytes, limit: int, tokens: dict[int, int]) -> bool:
        """Whether a running request, which gets ``tokens``, computes the prefix that this prompt needs."""
        expected = self.expected(key, limit)
        seq = self.running[expected.slot] if expected.later > 0 else None
        return seq is not None and seq.view.id in tokens

    def holes(self) -> list[tuple[int, int]]:
        """Exchanges that would make the running slots a gap-free range (see mullama.kv.placement.holes)."""
        runs = [seq is not None for seq in self.running]
        return [] if all(runs[: sum(runs)]) else holes(runs)
