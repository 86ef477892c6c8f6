"""The KV cache of an engine: puts a prompt's prefix into a slot, keeps what slots give up.

The tree (kv/index/tree.py) says where every prefix lives, the tier which of it stays in host memory, the finder
(find.py) which way is cheapest; here it is carried out. Everything belongs to the engine thread.

The law: whenever no method runs, each slot that holds tokens is named in the tree by exactly these tokens (a running
one also by those of its prompt that are still to compute), and ``audit`` says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mullama.kv.choice import MIN_GAIN, Choice, KvSource
from mullama.kv.events import KvEventKind, KvTier
from mullama.kv.eviction.policy import EvictionPolicy
from mullama.kv.find import Found, KvFinder, Piece
from mullama.kv.history import KvHistory
from mullama.kv.index.payload import Checkpoint, Rows
from mullama.kv.index.tree import TOKEN_BYTES, Match, Node, PrefixTree, unpack
from mullama.kv.native import Cells, Core
from mullama.kv.placement import Placement, SlotView, place, place_choice, place_unified
from mullama.kv.tiers.base import Tiers
from mullama.kv.tiers.disk_tier import DiskTier
from mullama.kv.tiers.host_tier import GRAIN, MIN_STORED, HostTier

log = logging.getLogger("mullama.engine")


@dataclass(slots=True, frozen=True)
class Allocation:
    """A slot that is ready for a request."""

    slot: int
    reuse: int  # tokens of the prompt that it holds
    source: KvSource  # where they came from
    lost: int  # cached tokens of others that no tier holds any more, for this request
    match: Match  # what was known of the prompt


class KvCache:
    """One a Core. ``exchange(a, b)`` makes two slots change places, with all that the engine knows of them."""

    def __init__(
        self,
        core: Core,
        cells: Cells,
        host_bytes: int,
        policy: EvictionPolicy,
        *,
        exchange: Callable[[int, int], None],
    ) -> None:
        self.core = core
        self.cells = cells
        self.tree = PrefixTree()
        self.host = HostTier(
            self.tree,
            host_bytes if cells.can_store else 0,
            policy,
            can_cut=not cells.needs_checkpoint,
            on_evict=self._leaves_host,
        )
        self.tiers = Tiers(self.host)
        self.finder = KvFinder(core, cells, self.tree, self.tiers)
        self.history = KvHistory(core.note_evicted)
        self.hits: dict[KvSource, int] = dict.fromkeys(KvSource, 0)  # tokens reused, by where they came from
        self.version = 0  # changes with every change of the tree
        self._place = place_unified if core.unified else place
        self._exchange: Callable[[int, int], None] | None = exchange

    @property
    def disk(self) -> DiskTier | None:
        return self.tiers.disk

    def attach_disk(self, tier: DiskTier | None) -> None:
        """Keep KV on disk from now on as well."""
        self.tiers.disk = tier

    def detach_disk(self) -> DiskTier | None:
        """Go on without the disk tier, which the caller closes; what is on its way there is still written."""
        tier, self.tiers.disk = self.disk, None
        if tier is not None:
            tier.detach()
        self.version += 1
        return tier

    def close(self, *, keep: bool = True) -> None:
        """Let the engine go, so that nothing waits for the garbage collector. The engine thread has ended.

        ``keep``: what slots hold goes to disk; not that of an engine that failed, whose cells nobody vouches for.
        """
        self._exchange = None
        if self.disk is not None:
            for slot in range(self.core.n_slots if keep and not self.core.is_vacant else 0):
                if self.core.retained(slot)[0]:
                    self.store(slot)
            self.disk.close()
            self.tiers.disk = None

    # -- into a slot --------------------------------------------------------------------------------------------

    def allocate(
        self, namespace: bytes, key: bytes, limit: int, running: Sequence[bool], request: str | None
    ) -> Allocation:
        """Make a slot ready for a prompt, with as many of its first ``limit`` tokens as is cheapest.

        A slot must be free or retained. The caller opens the request in it and then calls ``opened``.
        """
        self.history.begin(request, namespace)
        found = self.finder.find(namespace, key, limit)
        choice, where = place_choice(found.choice, self._views(running), self._place)
        slot = self._take(where)
        n = self._fill(slot, choice, found, key)
        return Allocation(slot, n, choice.source if n > 0 else KvSource.NONE, self.history.lost, found.match)

    def allocate_empty(self, namespace: bytes, running: Sequence[bool], request: str | None) -> Allocation:
        """An empty slot, for a sequence that brings its own KV."""
        self.history.begin(request, namespace)
        slot = self._take(self._place(self._views(running), -1, 0))
        if self.core.retained(slot)[0]:
            self.vacate(slot)
        return Allocation(slot, 0, KvSource.NONE, self.history.lost, Match())

    def _take(self, where: Placement | None) -> int:
        """Evict and exchange what a placement says. Returns its slot."""
        assert where is not None, "the plan was checked against the free slots"
        if where.evict is not None:
            self.vacate(where.evict)
        if where.exchange is not None:
            assert self._exchange is not None
            self._exchange(*where.exchange)
        return where.slot

    def borders(self, match: Match, reuse: int, n_prompt: int) -> list[int]:
        """Positions of a prompt where a checkpoint is worth its bytes, for models that need them.

        Where the prompt leaves another one's path, the next one may do so as well; and before its last token, for the
        same prompt again. A chunk of the prefill has to end there.
        """
        if not self.cells.needs_checkpoint or not self.tiers.has_any:
            return []
        wanted = {match.n_tokens, n_prompt - 1}
        return sorted(at for at in wanted if reuse + MIN_GAIN <= at < n_prompt)

    def _fill(self, slot: int, choice: Choice, found: Found, key: bytes) -> int:
        """Bring the chosen prefix into the slot; returns the tokens that it holds then."""
        core, cells = self.core, self.cells
        n_past, _ = core.slot_fill(slot)
        if choice.source is KvSource.NONE:
            n = 0
        elif choice.source is KvSource.IN_PLACE:
            n = min(choice.n_slot, n_past)  # an exchange may have lost it
        else:
            n = 0
            if n_past:
                self.vacate(slot)
                n_past = 0
            if choice.source is KvSource.COPY and cells.copy(choice.slot, slot, choice.n_slot):
                n = choice.n_slot
        if n_past > n:  # what is behind the prefix makes room
            self.store(slot)
            self._note_lost(slot, n)
            if n:
                n = cells.trim(slot, n)
            else:
                core.evict(slot, 0)
            if n and cells.needs_checkpoint:
                self.store(slot)  # here two prompts part, so the next one may do so as well
        pieces = [piece for piece in found.pieces if piece.start >= n]
        if choice.n_tokens > n and pieces and pieces[0].start == n:
            n = self._restore(slot, key, pieces)
        return n

    def _restore(self, slot: int, key: bytes, pieces: Sequence[Piece]) -> int:
        """Put what the tiers gave behind what the slot holds; returns the tokens that it holds then."""
        start, end = pieces[0].start, pieces[-1].end
        tokens = unpack(key[TOKEN_BYTES * start : TOKEN_BYTES * end])
        chunks = [chunk for piece in pieces for chunk in piece.chunks]
        if not self.cells.extend(slot, tokens, chunks, checkpoint=pieces[-1].checkpoint):
            log.warning("slot %d did not take the saved KV of [%d, %d): it is computed", slot, start, end)
        return self.core.slot_fill(slot)[0]

    def opened(self, slot: int, namespace: bytes, key: bytes, reuse: int, source: KvSource) -> None:
        """A sequence of these tokens lives in the slot now; ``reuse`` of them were there."""
        now = time.monotonic_ns()
        node = self.tree.hold(slot, namespace, key, now)
        self.version += 1
        self.hits[source] += reuse
        if reuse:
            self.host.touch([one for one in node.path() if one.start < reuse], now)
            origin = {KvSource.HOST: KvTier.HOST, KvSource.DISK: KvTier.DISK}.get(source, KvTier.DEVICE)
            self.history.note(KvEventKind.REUSED, KvTier.DEVICE, 0, reuse, node, source=origin, slot=slot)

    def resumed(self, slot: int, namespace: bytes, tokens: bytes, *, mixed: bool = False) -> None:
        """A preempted sequence, prompt and answer so far, lives in the slot again (``mixed``: see Node)."""
        end = self.tree.hold(slot, namespace, tokens, time.monotonic_ns())
        if mixed:
            for node in end.path():
                node.mixed = True
        self.version += 1

    # -- out of a slot ------------------------------------------------------------------------------------------

    def closed(self, slot: int, namespace: bytes, request: str | None) -> None:
        """The slot's request ended or lost it; what the slot still retains is a prefix like any other."""
        self.history.begin(request, namespace)
        n_past, _ = self.core.slot_fill(slot)
        self.version += 1
        if n_past == 0:
            self.tree.release(slot)
            return
        tokens = self.core.packed(slot)
        now = time.monotonic_ns()
        node = self.tree.hold(slot, namespace, tokens, now)
        per_token = self.finder.costs().prefill_token
        for one in node.path():
            one.cost_ns = one.cost_ns or one.n_tokens * per_token
        node.used_ns = now
        if self.disk is not None:
            self.store(slot)  # a process that is killed has written it by then
        self.history.note(KvEventKind.STORED, KvTier.DEVICE, 0, n_past, node, slot=slot)

    def released(self, slot: int) -> None:
        """The slot holds nothing any more (its request was cancelled, or its KV went with it)."""
        end = self.tree.end_of(slot)
        if end is None:
            return
        gone = next((node.start for node in end.path() if node.slots == {slot} and not node.is_stored), None)
        if gone is not None:
            self.history.note(KvEventKind.DROPPED, KvTier.DEVICE, gone, end.end, end, slot=slot, gone=True)
        self.tree.release(slot)
        self.version += 1

    def exchanged(self, a: int, b: int) -> None:
        """Two slots have changed places."""
        self.tree.exchange(a, b)
        for slot in (a, b):
            end = self.tree.end_of(slot)
            if end is not None:
                self.history.note(KvEventKind.MOVED, KvTier.DEVICE, 0, end.end, end, slot=slot)

    def vacate(self, slot: int) -> int:
        """Free a retained slot, saving what it holds to host memory where that is possible. Returns the cells freed."""
        self.store(slot)
        return self._free(slot)

    def _free(self, slot: int) -> int:
        self._note_lost(slot, 0)
        freed = self.core.evict(slot, 0)
        self.tree.release(slot)
        self.version += 1
        return freed

    def store(self, slot: int, *, upto: int | None = None) -> int:
        """Copy what a slot holds, and the tiers do not, there. Returns the tokens of it that are there now."""
        end = self.tree.end_of(slot)
        n_past, _ = self.core.slot_fill(slot)
        upto = n_past if upto is None else min(upto, n_past)
        if end is None or not self.tiers.has_any or upto < MIN_STORED:
            return 0
        now, host, disk = time.monotonic_ns(), self.host, self.disk
        todo = end.path()[::-1]
        needs_checkpoint = self.cells.needs_checkpoint and upto == n_past
        if self.cells.needs_checkpoint and not needs_checkpoint:
            return 0
        saved = 0
        while todo:
            node = todo.pop()
            if node.start >= upto:
                break
            if node.end > upto:
                node = self.tree.split(node, upto - node.start)
            head = self._head_for_host(node)
            if head:
                todo.append(node)  # what is left of it
                node = self.tree.split(node, head)
            at_end = needs_checkpoint and node.end == upto
            rows = checkpoint = None
            if at_end and node.checkpoint is None:
                checkpoint = Checkpoint(self.cells.checkpoint(slot))
            if node.host is not None:
                if checkpoint is not None:
                    host.put_checkpoint(node, checkpoint, now)
            elif host.budget > 0 or (disk is not None and disk.lacks(node, at_end)):
                rows = Rows(self.cells.save(slot, node.start, node.end), node.n_tokens, self.cells.token_bytes)
                node.cost_ns = node.cost_ns or node.n_tokens * self.finder.costs().prefill_token
                if host.put(node, rows, now, checkpoint):
                    self.history.note(KvEventKind.STORED, KvTier.HOST, node.start, node.end, node, source=KvTier.DEVICE)
                elif disk is None:
                    break
            if disk is not None:
                disk.put(node, rows or node.host, now, checkpoint or node.checkpoint)
            saved = node.end
        self.version += 1
        return saved

    def _head_for_host(self, node: Node) -> int:
        """Tokens of a node that host memory could hold where it could not hold all of it; 0: it can, or hardly any."""
        token_bytes = self.cells.token_bytes
        if node.host is not None or self.host.budget <= 0 or self.cells.needs_checkpoint:
            return 0
        most = self.host.budget_below(node.parent) // token_bytes // GRAIN * GRAIN
        return most if most < node.n_tokens else 0

    def checkpoint(self, slot: int, request: str | None) -> None:
        """A request's prompt has got to where a checkpoint is worth its bytes (see ``borders``)."""
        self._begin_in(slot, request)
        self.store(slot)

    def stopping(self, slot: int, request: str | None) -> None:
        """A running request is about to be cancelled and its cells freed: what is computed of its prompt is saved.

        Else a reply that somebody stops would cost the chat all its history, which the request had taken over.
        """
        self._begin_in(slot, request)
        if not self.cells.needs_checkpoint:  # there it would be of no use: the end of the prompt is behind
            self.store(slot)

    def evict_retained(self, n_tokens: int, running: Sequence[bool], request: str | None = None) -> int:
        """Free retained slots, in the policy's order, until ``n_tokens`` cells are free. Returns those freed."""
        self.history.begin(request)
        freed = 0
        for slot in self._retained(running):
            if freed >= n_tokens:
                break
            freed += self.vacate(slot)
        return freed

    def store_retained(self, running: Sequence[bool]) -> None:
        """Copy what the retained slots hold to the tiers, in the policy's order: who is last stays longest."""
        self.history.begin(None)
        for slot in self._retained(running):
            self.store(slot)

    def store_ahead(self, running: Sequence[bool], max_bytes: int) -> int:
        """Copy what the next new prompt will push out of its slot to host memory, while nobody waits for it.

        Only where that makes nothing else go, and takes no more than ``max_bytes``: whoever comes meanwhile does not
        wait long. Returns the tokens of it that are there now; 0: there was nothing to do.
        """
        free = self.host.budget - self.host.used
        if free <= 0 or self.cells.needs_checkpoint or self.core.is_vacant:
            return 0
        if any(not runs and not self.core.retained(slot)[0] for slot, runs in enumerate(running)):
            return 0  # it will take a slot that is empty
        slot = next(iter(self._retained(running)), None)
        end = self.tree.end_of(slot) if slot is not None else None
        if slot is None or end is None:
            return 0
        missing = sum(node.n_tokens for node in end.path() if node.host is None) * self.cells.token_bytes
        if not 0 < missing <= min(free, max_bytes):
            return 0
        self.history.begin(None)
        return self.store(slot)

    def free_retained(self, running: Sequence[bool], *, only_stored: bool) -> None:
        """Free the retained slots and copy nothing. ``only_stored``: those whose KV is in the tiers to the end."""
        self.history.begin(None)
        for slot in self._retained(running):
            end = self.tree.end_of(slot)
            if not only_stored or (end is not None and all(node.is_stored for node in end.path())):
                self._free(slot)

    def _retained(self, running: Sequence[bool]) -> list[int]:
        """The slots that hold a prefix and nothing else, in the order in which they make room."""
        views = self._views(running)
        kept = sorted((view.last_used, slot) for slot, view in enumerate(views) if not view.running and view.tokens)
        return [slot for _, slot in kept]

    def _views(self, running: Sequence[bool]) -> list[SlotView]:
        """The slots for ``place``: the one with the lowest ``last_used`` makes room."""
        now, views = time.monotonic_ns(), []
        retained, end_of, score_of, is_pinned = (
            self.core.retained, self.tree.end_of, self.host.policy.score, self.finder.is_pinned,
        )  # fmt: skip
        for slot, runs in enumerate(running):
            tokens, _ = retained(slot)
            end = end_of(slot)
            score = score_of(end, now) if tokens and end is not None else 0.0
            if is_pinned(slot, now):
                score = float("inf")
            views.append(SlotView(runs, tokens, score))
        return views

    # -- what is lost -------------------------------------------------------------------------------------------

    def _begin_in(self, slot: int, request: str | None) -> None:
        end = self.tree.end_of(slot)
        self.history.begin(request, end.namespace if end is not None else b"")

    def _note_lost(self, slot: int, keep: int) -> None:
        """The slot will give up its tokens from ``keep`` on: those that nobody else holds are lost."""
        end = self.tree.end_of(slot)
        if end is None:
            return
        n_past, _ = self.core.slot_fill(slot)
        lost_from = None
        lost = 0
        for node in end.path():
            start, stop = max(node.start, keep), min(node.end, n_past)
            if start < stop and node.slots == {slot} and not node.is_stored:
                lost += stop - start
                lost_from = start if lost_from is None else lost_from
        if lost_from is not None:
            self.history.lose(end, lost, lost_from, KvTier.DEVICE)

    def _leaves_host(self, node: Node) -> None:
        """Host memory gives up a node's KV to make room."""
        if not node.slots and node.disk is None:
            self.history.lose(node, node.n_tokens, node.start, KvTier.HOST)
        else:
            self.history.note(KvEventKind.EVICTED, KvTier.HOST, node.start, node.end, node)

    def leaves_disk(self, node: Node) -> None:
        """The disk tier gives up a node's KV to make room."""
        if node.host is None and not node.slots:
            self.history.lose(node, node.n_tokens, node.start, KvTier.DISK)

    # -- looking after it ---------------------------------------------------------------------------------------

    def forget(self, slot: int) -> int:
        """Free a retained slot and save nothing, because somebody asked for it. Returns the cells freed."""
        self.history.begin(None)
        freed = self.core.evict(slot, 0)
        self.released(slot)
        return freed

    def drop(self, running: Sequence[bool]) -> int:
        """Forget everything that no running sequence needs. Returns the cells freed."""
        freed = 0
        for slot, runs in enumerate(running):
            if not runs and self.core.retained(slot)[0]:
                freed += self.forget(slot)
        self.drop_host()
        return freed

    def forget_all(self) -> None:
        """Give up everything that no running sequence holds, on every tier but the disk: it is of other weights."""
        self.drop([False] * self.core.n_slots)

    def note_mixed(self) -> None:
        """The KV there is was computed by other weights than those that use it from now on."""
        for node in self.tree.nodes():
            node.mixed = True

    def drop_host(self) -> int:
        """Empty host memory. Returns the bytes freed."""
        before = self.host.used
        self.drop_nodes([node for node in self.tree.nodes() if node.host is not None], {KvTier.HOST})
        return before - self.host.used

    def drop_nodes(self, nodes: Sequence[Node], tiers: set[KvTier]) -> int:
        """Give up what these nodes, and all below them, have in the tiers. Returns the bytes freed on disk."""
        now, on_disk = time.monotonic_ns(), 0
        self.history.begin(None)
        for node in sorted(nodes, key=lambda one: -one.start):
            path = node.tokens()
            held = node.is_stored
            if KvTier.HOST in tiers:
                self.host.drop(node, now)
            if KvTier.DISK in tiers and self.disk is not None:
                on_disk += self.disk.drop(node, now)
            if held and not node.is_stored:
                end = len(path) // TOKEN_BYTES
                self.history.note(
                    KvEventKind.DROPPED, KvTier.HOST, node.start, end, node, gone=not node.slots, path=path
                )
            self.tree.prune(node)
        self.version += 1
        return on_disk
