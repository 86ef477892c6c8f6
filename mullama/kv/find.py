"""Where a prompt's prefix is, and the cheapest way to it: what the tree, the slots and the tiers know.

Everything belongs to the engine thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mullama import abi
from mullama.kv.choice import Choice, Foreseen, KvCosts, SlotFill, SlotOffer, choose, foreseen, tail_weight
from mullama.kv.index.payload import Checkpoint, Rows
from mullama.kv.index.tree import TOKEN_BYTES, Match, PrefixTree
from mullama.kv.native import Cells, Core
from mullama.kv.tiers.base import Tiers


@dataclass(slots=True)  # PERF: not frozen, which takes four times as long to make
class Piece:
    """KV of the tokens [start, end) out of a tier, with the checkpoint at its end."""

    start: int
    end: int
    chunks: list[bytes]
    checkpoint: bytes | None


@dataclass(slots=True)
class Found:
    """A prompt looked up: what to take, what the tree knew, and what the tiers give of it, in order."""

    choice: Choice
    match: Match
    pieces: list[Piece]


class KvFinder:
    """Looks prompts up, and changes nothing but that what is read from disk is in host memory then."""

    def __init__(self, core: Core, cells: Cells, tree: PrefixTree, tiers: Tiers) -> None:
        self._core = core
        self._cells = cells
        self._tree = tree
        self._tiers = tiers

    def find(self, namespace: bytes, key: bytes, limit: int) -> Found:
        """The cheapest way to the first ``limit`` tokens of ``key``, and what the tiers hold of it; changes nothing."""
        while True:
            match = self._tree.match(namespace, key[: TOKEN_BYTES * limit])
            choice = self._choose(match, limit)
            pieces = self._pieces(match, choice)
            if pieces is not None:
                return Found(choice, match, pieces)

    def _choose(self, match: Match, limit: int) -> Choice:
        states = self._core.states()
        n_stored, n_host = self._stored(match, limit)
        costs, token_bytes = self.costs(), self._cells.token_bytes
        return choose(
            limit,
            self._offers(match, states, limit),
            n_stored,
            n_host,
            costs=costs,
            token_bytes=token_bytes,
            can_extend=not self._cells.needs_checkpoint,
            tail_weight=tail_weight(costs, token_bytes, has_host=self._tiers.host.budget > 0),
        )

    def costs(self) -> KvCosts:
        """As measured so far; guesses before."""
        core = self._core
        counted = core.kv_costs()
        per_token = core.governor.cost(core.n_batch) / core.n_batch
        guess = KvCosts()
        return KvCosts(
            prefill_token=per_token or guess.prefill_token,
            save_byte=counted["save"] or guess.save_byte,
            restore_byte=counted["restore"] or guess.restore_byte,
            copy_byte=0.0 if core.unified else counted["copy"] or guess.copy_byte,
        )

    def _offers(self, match: Match, states: Sequence[int], limit: int) -> Iterable[SlotOffer]:
        cells, now = self._cells, time.monotonic_ns()
        for slot, shared in match.slots.items():
            n_past, _ = self._core.slot_fill(slot)
            n = min(shared, n_past, limit)
            if n < 1:
                continue
            running = states[slot] != abi.RETAINED
            can_copy = n == n_past if cells.needs_checkpoint else cells.has_rows
            end = self._tree.end_of(slot)
            saved = end.end if end is not None and end.is_stored else 0
            yield SlotOffer(
                slot,
                n,
                running,
                can_cut=not running and cells.can_cut(slot, n) and not (n < n_past and self.is_pinned(slot, now, n)),
                tail_unsaved=0 if saved >= n_past else n_past - n,
                can_copy=can_copy,
            )

    def _stored(self, match: Match, limit: int) -> tuple[int, int]:
        """Tokens that can be had from the tiers, and from host memory alone."""
        if not self._cells.needs_checkpoint:
            return min(match.n_stored, limit), min(match.n_host, limit)
        ends = [node.end for node in match.checkpoints if node.end <= min(match.n_stored, limit)]
        n = ends[-1] if ends else 0
        return n, min(n, match.n_host)

    def _pieces(self, match: Match, choice: Choice) -> list[Piece] | None:
        """The rows [n_slot, n_tokens) of a choice, node by node. None: the disk broke a promise; choose again."""
        found: list[Piece] = []
        now, host, disk = time.monotonic_ns(), self._tiers.host, self._tiers.disk
        for node in match.nodes:
            start, end = max(node.start, choice.n_slot), min(node.end, choice.n_tokens)
            if start >= end:
                continue
            is_last = end == node.end == choice.n_tokens
            rows, at_end = node.host, node.checkpoint
            if rows is None or (self._cells.needs_checkpoint and is_last and at_end is None):
                assert disk is not None, "the choice counted on it"
                read = disk.read(node)
                if read is None:
                    return None
                rows, at_end = read
                if node.host is None:
                    host.put(node, rows, now, at_end)
                elif at_end is not None:
                    host.put_checkpoint(node, at_end, now)
            assert isinstance(rows, Rows)
            checkpoint = at_end.data if is_last and isinstance(at_end, Checkpoint) else None
            found.append(Piece(start, end, rows.part(start - node.start, end - node.start), checkpoint))
        return found

    def expected(self, namespace: bytes, key: bytes, limit: int) -> Foreseen:
        """What a prompt could reuse of its first ``limit`` tokens, now and a little later."""
        match = self._tree.match(namespace, key[: TOKEN_BYTES * limit])
        n_stored, _ = self._stored(match, limit)
        fills = []
        for slot, shared in match.slots.items():
            n_past, n_tokens = self._core.slot_fill(slot)
            if self._cells.needs_checkpoint:
                n_tokens = n_past  # nobody goes on in the middle of a running prompt
                if not self._cells.can_cut(slot, min(shared, n_past, limit)):
                    shared = 0
            fills.append(SlotFill(slot, shared, n_past, n_tokens))
        return foreseen(n_stored, fills, limit)

    def is_pinned(self, slot: int, now_ns: int, beyond: int = 0) -> bool:
        """Whether something pinned would be lost with a slot's tokens from ``beyond`` on."""
        end = self._tree.end_of(slot)
        return end is not None and any(
            node.pinned_until_ns > now_ns and node.end > beyond and node.slots == {slot} and not node.is_stored
            for node in end.path()
        )
