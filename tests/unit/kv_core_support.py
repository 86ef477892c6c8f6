"""A core without llama.cpp, for the KV cache, and an engine on top: KV tells of which tokens it was computed.

The row of a token is a hash of all tokens up to it, and so is a state; so KV that is put where it does not belong is
found by :meth:`FakeCore.audit`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mullama import abi
from mullama.kv import audit
from mullama.kv.cache import Allocation, KvCache
from mullama.kv.eviction.guarded import GuardedPolicy
from mullama.kv.eviction.registry import create
from mullama.kv.index.payload import Checkpoint, Rows
from mullama.kv.index.tree import pack, unpack

CHUNK = 64  # tokens of one bytes object, as the core cuts them
ROW = 8  # bytes


def rows_of(tokens: Sequence[int]) -> list[bytes]:
    """The row of each token, as a model would compute it."""
    hashed, found = hashlib.blake2b(b"row", digest_size=ROW), []
    for token in tokens:
        hashed.update(pack([token]))
        found.append(hashed.digest())
    return found


def state_of(tokens: Sequence[int]) -> bytes:
    """What of the KV of these tokens cannot be cut."""
    return b"state" + hashlib.blake2b(pack(list(tokens)), digest_size=16).digest()


@dataclass
class Slot:
    state: int = abi.FREE
    tokens: list[int] = field(default_factory=list)  # known
    rows: list[bytes] = field(default_factory=list)  # in its cells, one a token
    checkpoint: bytes = state_of([])  # its state

    @property
    def n_past(self) -> int:
        return len(self.rows)

    @property
    def is_open(self) -> bool:
        return self.state not in (abi.FREE, abi.RETAINED)


class FakeGovernor:
    def cost(self, tokens: int) -> float:
        return 1e6 * tokens


class FakeModel:
    n_vocab = 1 << 20

    def facts(self) -> dict[str, Any]:
        return {"architecture": "fake", "rope": "none", "n_embd": 4}

    def metadata(self) -> dict[str, str]:
        return {"fake.attention.head_count": "1"}


class FakeCore:
    """What ``mullama.kv.native.Core`` asks for, and what an engine does to its slots."""

    def __init__(self, n_slots: int, *, n_ctx: int = 4096, unified: bool = False) -> None:
        self.n_slots = n_slots
        self.n_ctx = n_ctx
        self.n_batch = 512
        self.unified = unified
        self.is_vacant = False
        self.governor = FakeGovernor()
        self.model = FakeModel()
        self.slots = [Slot() for _ in range(n_slots)]
        self.costs = {"save": 0.0, "restore": 0.0, "copy": 0.0}  # ns a byte; 0: not measured yet
        self.n_evicted = 0  # tokens that the cache reported as lost

    # -- what the cache asks

    def states(self) -> list[int]:
        return [slot.state for slot in self.slots]

    def retained(self, slot: int) -> tuple[int, int]:
        one = self.slots[slot]
        return (one.n_past, 0) if one.state == abi.RETAINED else (0, 0)

    def slot_fill(self, slot: int) -> tuple[int, int]:
        return self.slots[slot].n_past, len(self.slots[slot].tokens)

    def shifted(self, slot: int) -> int:
        return 0

    def packed(self, slot: int) -> bytes:
        return pack(self.slots[slot].tokens[: self.slots[slot].n_past])

    def evict(self, slot: int, lost: int = -1) -> int:
        n = self.retained(slot)[0]
        if n:
            self.slots[slot] = Slot()
            self.n_evicted += n if lost < 0 else lost
        return n

    def note_evicted(self, tokens: int) -> None:
        self.n_evicted += tokens

    def kv_costs(self) -> dict[str, float]:
        return self.costs

    def cells(self) -> dict[str, Any]:
        used = [slot.n_past for slot in self.slots]
        return {"caches": 1, "used": used, "window": used, "size": self.n_ctx, "total_used": sum(used),
                "recurrent": 0}  # fmt: skip

    def cell_runs(self, slot: int, cache: int = 0) -> list[tuple[int, int, int]]:
        n = self.slots[slot].n_past
        return [(0, n, slot), (n, self.n_ctx - n, -1)] if n else [(0, self.n_ctx, -1)]

    def counters_dict(self) -> dict[str, int]:
        return {"kv_hit_tokens": 0, "kv_miss_tokens": 0, "kv_evict_tokens": self.n_evicted}

    def parked_bytes(self) -> int:
        return 0

    def audit(self) -> list[str]:
        """KV that is not that of its slot's tokens."""
        found = []
        for number, slot in enumerate(self.slots):
            computed = slot.tokens[: slot.n_past]
            if slot.n_past > len(slot.tokens) or slot.rows != rows_of(computed):
                found.append(f"slot {number}: its rows are not those of its tokens")
            if slot.checkpoint != state_of(computed):
                found.append(f"slot {number}: its state is not that of its tokens")
            if slot.state == abi.FREE and slot.tokens:
                found.append(f"slot {number} is free and holds {len(slot.tokens)} tokens")
        return found

    # -- what an engine does

    def open(self, slot: int, prompt: Sequence[int], *, reuse: int) -> None:
        """Start a request on top of what the slot retains."""
        one = self.slots[slot]
        assert not one.is_open and one.tokens[:reuse] == list(prompt[:reuse]) and reuse == one.n_past < len(prompt)
        one.state, one.tokens = abi.PREFILL, list(prompt)

    def compute(self, slot: int, n_tokens: int) -> None:
        """So many more tokens of the prompt."""
        one = self.slots[slot]
        end = min(one.n_past + n_tokens, len(one.tokens))
        one.rows = rows_of(one.tokens[:end])
        one.checkpoint = state_of(one.tokens[:end])
        one.state = abi.DECODE if end == len(one.tokens) else abi.PREFILL

    def generate(self, slot: int, token: int) -> None:
        """A token is sampled, and computed."""
        self.slots[slot].tokens.append(token)
        self.compute(slot, 1)

    def leave(self, slot: int, *, retain: bool) -> None:
        """The request ends or is taken out."""
        one = self.slots[slot]
        assert one.is_open
        if retain and one.n_past:
            one.tokens, one.state = one.tokens[: one.n_past], abi.RETAINED
        else:
            self.slots[slot] = Slot()

    def exchange(self, a: int, b: int) -> None:
        self.slots[a], self.slots[b] = self.slots[b], self.slots[a]


class FakeCells:
    """What ``mullama.kv.native.Cells`` asks for. ``kind``: attention "full", with a "window", or "recurrent"."""

    WINDOW = 48

    def __init__(self, core: FakeCore, kind: str = "full") -> None:
        self.core = core
        self.kind = kind
        self.has_rows = kind != "recurrent"
        self.token_bytes = ROW if self.has_rows else 0
        self.needs_checkpoint = kind != "full"
        self.can_store = True
        self.refuses = False  # whether nothing gets into a slot any more
        self.n_saved = 0  # tokens
        self.n_restored = 0

    def save(self, slot: int, p0: int, p1: int) -> list[bytes]:
        assert 0 <= p0 < p1 <= self.core.slots[slot].n_past
        self.n_saved += p1 - p0
        if not self.has_rows:
            return []
        rows = self.core.slots[slot].rows[p0:p1]
        return [b"".join(rows[at : at + CHUNK]) for at in range(0, len(rows), CHUNK)]

    def extend(
        self, slot: int, tokens: Sequence[int], chunks: Sequence[bytes], *, checkpoint: bytes | None = None
    ) -> bool:
        one, data = self.core.slots[slot], b"".join(chunks)
        assert not one.is_open and len(data) == len(tokens) * self.token_bytes
        assert all(len(chunk) % ROW == 0 for chunk in chunks)
        assert (checkpoint is not None) == self.needs_checkpoint
        if self.refuses:
            return False
        one.tokens = one.tokens[: one.n_past] + list(tokens)
        rows = [data[at : at + ROW] for at in range(0, len(data), ROW)] if self.has_rows else rows_of(one.tokens)
        one.rows = one.rows + rows if self.has_rows else rows
        one.checkpoint = state_of(one.tokens) if checkpoint is None else checkpoint
        one.state = abi.RETAINED
        self.n_restored += len(tokens)
        return True

    def copy(self, src: int, dst: int, n: int) -> bool:
        one = self.core.slots[src]
        assert src != dst and self.core.slots[dst].state == abi.FREE and 0 < n <= one.n_past
        assert n == one.n_past or not self.needs_checkpoint
        if self.refuses:
            return False
        self.core.slots[dst] = Slot(abi.RETAINED, one.tokens[:n], one.rows[:n], state_of(one.tokens[:n]))
        return True

    def can_cut(self, slot: int, n: int) -> bool:
        n_past = self.core.slots[slot].n_past
        if not 0 < n <= n_past:
            return False
        return n == n_past or self.kind == "full" or (self.kind == "window" and n_past <= self.WINDOW)

    def trim(self, slot: int, n: int) -> int:
        one = self.core.slots[slot]
        assert one.state == abi.RETAINED
        if not self.can_cut(slot, n):
            self.core.slots[slot] = one = Slot()
        one.tokens, one.rows = one.tokens[:n], one.rows[:n]
        one.checkpoint = state_of(one.tokens)
        return one.n_past

    def checkpoint(self, slot: int) -> bytes:
        return self.core.slots[slot].checkpoint if self.needs_checkpoint else b""

    def layers(self) -> list[dict[str, Any]]:
        half = ROW // 2
        return [{"layer": 0, "type_k": "f16", "type_v": "f16", "k": (0, half), "v": (half, half)}]


class FakeEngine:
    """Requests on a KV cache over the fakes: what ``Sequences`` does, one call after the other."""

    def __init__(
        self, kind: str = "full", *, n_slots: int = 3, host_bytes: int = 1 << 20, unified: bool = False,
        policy: str = "lru",
    ) -> None:  # fmt: skip
        self.core = FakeCore(n_slots, unified=unified)
        self.cells = FakeCells(self.core, kind)
        self.kv = KvCache(
            self.core, self.cells, host_bytes, GuardedPolicy(create(policy), policy), exchange=self.exchange
        )
        self.running = [False] * n_slots
        self.namespaces = [b""] * n_slots
        self.borders: list[list[int]] = [[] for _ in range(n_slots)]

    def exchange(self, a: int, b: int) -> None:
        self.core.exchange(a, b)
        self.kv.exchanged(a, b)
        for by_slot in (self.running, self.namespaces, self.borders):
            by_slot[a], by_slot[b] = by_slot[b], by_slot[a]  # type: ignore[assignment]

    def admit(self, prompt: Sequence[int], *, namespace: bytes = b"", name: str | None = "a") -> Allocation:
        key = pack(list(prompt))
        place = self.kv.allocate(namespace, key, len(prompt) - 1, self.running, name)
        self.core.open(place.slot, prompt, reuse=place.reuse)
        self.kv.opened(place.slot, namespace, key, place.reuse, place.source)
        self.borders[place.slot] = self.kv.borders(place.match, place.reuse, len(prompt))
        self.running[place.slot], self.namespaces[place.slot] = True, namespace
        return place

    def compute(self, slot: int, n_tokens: int) -> None:
        """A chunk of the prompt, or as many chunks as its borders make of it."""
        one = self.core.slots[slot]
        end = min(one.n_past + n_tokens, len(one.tokens))
        while one.n_past < end:
            upto = min([end, *self.borders[slot][:1]])
            self.core.compute(slot, upto - one.n_past)
            if upto in self.borders[slot]:
                self.borders[slot].remove(upto)
                self.kv.checkpoint(slot, "a")

    def finish(self, slot: int) -> None:
        """It ends, or is preempted without its KV: either way the slot retains what is computed."""
        self.core.leave(slot, retain=True)
        self.kv.closed(slot, self.namespaces[slot], "a")
        self.running[slot] = False

    def cancel(self, slot: int) -> None:
        self.kv.stopping(slot, "a")
        self.core.leave(slot, retain=False)
        self.kv.released(slot)
        self.running[slot] = False

    def resume(self, tokens: Sequence[int], namespace: bytes = b"") -> Allocation:
        """A preempted request comes back: prompt and answer so far."""
        key = pack(list(tokens))
        place = self.kv.allocate(namespace, key, len(tokens) - 1, self.running, "a")
        self.core.open(place.slot, tokens, reuse=place.reuse)
        self.kv.resumed(place.slot, namespace, key)
        self.borders[place.slot] = []
        self.running[place.slot], self.namespaces[place.slot] = True, namespace
        return place

    def ask(self, prompt: Sequence[int], n_answer: int = 8, **more: Any) -> Allocation:
        """A request from beginning to end; its answer is made of the last token of the prompt."""
        place = self.admit(prompt, **more)
        self.compute(place.slot, len(prompt))
        for i in range(n_answer):
            self.core.generate(place.slot, prompt[-1] + i + 1)
        self.finish(place.slot)
        return place

    def check(self) -> None:
        """Everything agrees, and all KV that is kept is that of the tokens under which it is kept."""
        kv = self.kv
        assert audit.differences(kv) == []
        assert kv.host.used <= kv.host.budget
        for slot, runs in enumerate(self.running):
            assert runs == self.core.slots[slot].is_open
            assert self.core.slots[slot].tokens or kv.tree.end_of(slot) is None, f"slot {slot} holds nothing"
        for node in kv.tree.nodes():
            path = unpack(node.tokens())
            assert node.children or not node.is_bare
            if node.host is not None:
                assert isinstance(node.host, Rows)
                expected = rows_of(path)[node.start :] if self.cells.has_rows else []
                assert b"".join(node.host.chunks) == b"".join(expected), f"{node}: KV of other tokens"
            if node.checkpoint is not None:
                assert isinstance(node.checkpoint, Checkpoint)
                assert node.host is not None and node.checkpoint.data == state_of(path), f"{node}: another state"
