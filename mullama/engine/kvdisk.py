"""The disk tier: KV that host memory holds is written behind the engine's back, and found again after a restart.

The engine thread asks and is told; one writer thread blocks on the disk. What is read is verified by ``DiskStore``.
"""

from __future__ import annotations

import heapq
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from mullama.errors import StoreError
from mullama.kv.disk import DiskStore
from mullama.kv.eviction import EvictionPolicy
from mullama.kv.payload import Checkpoint, Rows
from mullama.kv.records import DiskRecord
from mullama.kv.tree import Node, Payload, PrefixTree

log = logging.getLogger("mullama.engine")

RANKED = 64  # nodes that may go before the policy is asked about all of them again
MOST_PENDING = 512 << 20  # bytes that wait for the disk; what comes then is not written


@dataclass(slots=True)
class _Shared:
    """A record and the nodes that need it."""

    record: DiskRecord
    n_nodes: int = 0


class DiskRows:
    """A node's KV in a record; nodes that are cut share it."""

    __slots__ = ("end", "shared", "start")

    def __init__(self, shared: _Shared, start: int, end: int) -> None:
        self.shared = shared
        self.start = start
        self.end = end
        shared.n_nodes += 1

    @property
    def n_bytes(self) -> int:
        return (self.end - self.start) * self.shared.record.token_bytes

    @property
    def has_checkpoint(self) -> bool:
        return self.shared.record.has_checkpoint and self.end == self.shared.record.end

    def split(self, n_tokens: int) -> tuple[DiskRows, DiskRows]:
        self.shared.n_nodes -= 1
        middle = self.start + n_tokens
        return DiskRows(self.shared, self.start, middle), DiskRows(self.shared, middle, self.end)


class DiskTier:
    """``post`` runs a function on the engine thread; every other method belongs to it."""

    def __init__(
        self,
        store: DiskStore,
        tree: PrefixTree,
        policy: Callable[[], EvictionPolicy],
        token_bytes: int,
        post: Callable[[Callable[[], None]], None],
        on_evict: Callable[[Node], None],
    ) -> None:
        self.store = store
        self.n_skipped = 0  # stretches that were not written because the disk was too slow
        self._tree = tree
        self._policy = policy
        self._token_bytes = token_bytes
        self._post = post
        self._on_evict = on_evict  # told of a node before it goes to make room
        self._pending: set[int] = set()  # ids of nodes on their way
        self._pending_bytes = 0
        self._jobs: queue.SimpleQueue[tuple[Node, bytes, bytes, int, list[bytes], bytes | None] | None] = (
            queue.SimpleQueue()
        )
        self._ranked: list[tuple[Node, int]] = []  # who goes next, the last one first, and when it was last used
        self._ranked_by: EvictionPolicy | None = None
        for record in store.scan():
            self._attach(record)
        self._make_room(0)  # the budget may be smaller than it was
        self._thread = threading.Thread(target=self._run, name="mullama-kv-disk", daemon=True)
        self._thread.start()

    def lacks(self, node: Node, with_checkpoint: bool) -> bool:
        """Whether a node's KV, or the checkpoint at its end, is neither on disk nor on its way."""
        held = node.disk
        has = isinstance(held, DiskRows) and (held.has_checkpoint or not with_checkpoint)
        return not has and node.id not in self._pending

    def keep(self, node: Node, rows: Payload | None = None, at_end: Payload | None = None) -> None:
        """Write a node's KV, unless the disk has it or it is on its way: what is given, or what host memory holds."""
        rows = node.host if rows is None else rows
        at_end = node.checkpoint if at_end is None else at_end
        if not isinstance(rows, Rows) or node.mixed or not self.lacks(node, at_end is not None):
            return
        checkpoint = at_end.data if isinstance(at_end, Checkpoint) else None
        size = self.store.size_of(node.namespace, node.start, node.end, None if checkpoint is None else len(checkpoint))
        if self._pending_bytes + size > MOST_PENDING or not self._make_room(size, node):
            self.n_skipped += 1
            return
        self._pending.add(node.id)
        self._pending_bytes += size
        self._jobs.put((node, node.namespace, node.tokens(), node.start, list(rows.chunks), checkpoint))

    def read(self, node: Node) -> tuple[Rows, Checkpoint | None] | None:
        """A node's KV, verified. None: it could not be read, and no node counts on that record any more."""
        held = node.disk
        assert isinstance(held, DiskRows)
        record = held.shared.record
        try:
            data = self.store.read(record, held.start, held.end)
            checkpoint = Checkpoint(self.store.read_checkpoint(record)) if held.has_checkpoint else None
        except StoreError as error:
            log.warning("%s", error.message)
            self._forget(held.shared)
            return None
        step = 64 * self._token_bytes
        chunks = [data[at : at + step] for at in range(0, len(data), step)] if step else []
        return Rows(chunks, node.n_tokens, self._token_bytes), checkpoint

    def drop(self, node: Node) -> int:
        """Give up a node's KV on disk, or on its way there. Returns the bytes of a file that nobody needs any more."""
        self._pending.discard(node.id)
        held = node.disk
        if not isinstance(held, DiskRows):
            return 0
        node.disk = None
        held.shared.n_nodes -= 1
        if held.shared.n_nodes > 0:
            return 0
        return held.shared.record.n_bytes if self._remove(held.shared.record) else 0

    def _remove(self, record: DiskRecord) -> bool:
        try:
            self.store.remove(record)
        except StoreError as error:
            log.warning("%s", error.message)
            return False
        return True

    def detach(self) -> None:
        """Leave the tree, which goes on without this tier; what is on its way is still written. ``close`` may follow
        on any thread."""
        self._detached = True
        for node in list(self._tree.nodes()):
            if isinstance(node.disk, DiskRows):
                node.disk = None
                self._tree.prune(node)

    def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until what was given to the writer is on disk (and known here only once ``post`` ran)."""
        done = threading.Event()
        self._flushed = done
        self._jobs.put(None)
        done.wait(timeout_s)

    def close(self) -> None:
        """Write what waits, then let go of the folder."""
        self._closing = True
        self._jobs.put(None)
        self._thread.join()
        if not self._detached:
            self._make_room(0)
        self.store.close()

    # -- the writer thread --------------------------------------------------------------------------------------

    _closing = False
    _detached = False
    _flushed: threading.Event | None = None

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                if self._flushed is not None:
                    self._flushed.set()
                if self._closing:
                    return
                continue
            node, namespace, tokens, start, chunks, checkpoint = job
            record: DiskRecord | None = None
            try:
                record = self.store.put(namespace, tokens, start, chunks, checkpoint, sync=False)
            except (StoreError, ValueError) as error:
                log.warning("KV was not written to disk: %s", error)
            size = sum(map(len, chunks)) + (len(checkpoint) if checkpoint else 0)
            self._post(self._done(node, record, size))

    def _done(self, node: Node, record: DiskRecord | None, size: int) -> Callable[[], None]:
        def on_engine_thread() -> None:
            is_wanted = node.id in self._pending  # nobody has dropped it meanwhile
            self._pending.discard(node.id)
            self._pending_bytes = max(self._pending_bytes - size, 0) if self._pending else 0
            if record is None or self._detached:
                return
            if is_wanted:
                self._attach(record)
                self._make_room(0)  # others were on their way when room was made for it
            else:
                self._remove(record)

        return on_engine_thread

    # -- records and nodes --------------------------------------------------------------------------------------

    def _attach(self, record: DiskRecord) -> None:
        """Every node on the record's path learns that the disk has it."""
        now = time.monotonic_ns()
        if record.start > 0:
            self._tree.insert(record.namespace, record.tokens[: 4 * record.start], now)
        end = self._tree.insert(record.namespace, record.tokens, now)
        shared = _Shared(record)
        if record.has_checkpoint and isinstance(end.disk, DiskRows) and not end.disk.has_checkpoint:
            self.drop(end)  # it was written before there was one
        for node in end.path():
            if node.start >= record.start and node.disk is None:
                node.disk = DiskRows(shared, node.start, node.end)
        if shared.n_nodes == 0:  # it is there twice
            self._remove(record)
        self._tree.prune(end)

    def _forget(self, shared: _Shared) -> None:
        for node in list(self._tree.nodes()):
            if isinstance(node.disk, DiskRows) and node.disk.shared is shared:
                node.disk = None
                self._tree.prune(node)

    def _make_room(self, n_bytes: int, keep: Node | None = None) -> bool:
        """Remove records, the policy's lowest first and what depends on a stretch before it; ``keep``'s path stays."""
        if n_bytes > self.store.budget_bytes:
            return False
        now = time.monotonic_ns()
        safe = set(keep.path()) if keep is not None else set()
        is_fresh = False
        while self.store.over_budget(n_bytes) > 0:
            node = self._next_to_go(now, safe)
            if node is not None:
                self._on_evict(node)
                self.drop(node)
                self._tree.prune(node)
                is_fresh = False
            elif is_fresh:
                return False
            else:
                self._rank(now, safe)
                is_fresh = True
        return True

    def _rank(self, now: int, safe: set[Node]) -> None:
        """Ask the policy about all that could go, and note who goes next: all nodes are looked at, so for some time."""
        policy = self._ranked_by = self._policy()
        leaves = (node for node in self._tree.nodes() if self._can_go(node, now, safe))
        scored = [(policy.score(node, now), node.id, node.used_ns, node) for node in leaves]
        self._ranked = [(node, used_ns) for _, _, used_ns, node in heapq.nsmallest(RANKED, scored)][::-1]

    def _next_to_go(self, now: int, safe: set[Node]) -> Node | None:
        """The lowest of those ranked that still can go and was not used since; None: rank anew."""
        if self._ranked_by is not self._policy():
            self._ranked.clear()
        while self._ranked:
            node, used_ns = self._ranked.pop()
            if node.used_ns == used_ns and self._can_go(node, now, safe):
                return node
        return None

    @staticmethod
    def _can_go(node: Node, now: int, safe: set[Node]) -> bool:
        return (
            node.disk is not None
            and node not in safe
            and node.pinned_until_ns <= now
            and all(child.disk is None for child in node.children.values())
        )
