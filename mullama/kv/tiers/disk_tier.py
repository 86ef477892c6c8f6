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
from concurrent.futures import Future
from dataclasses import dataclass

from mullama.errors import StoreError
from mullama.kv.eviction.policy import EvictionPolicy
from mullama.kv.index.payload import Checkpoint, Rows
from mullama.kv.index.tree import TOKEN_BYTES, Node, Payload, PrefixTree
from mullama.kv.tiers.disk_records import CHUNK_TOKENS, DiskRecord
from mullama.kv.tiers.disk_store import DiskStore

log = logging.getLogger("mullama.engine")

RANKED = 64  # nodes that may go before the policy is asked about all of them again
MAX_PENDING = 512 << 20  # bytes that wait for the disk; what comes then is not written


@dataclass(slots=True)
class _Shared:
    """A record and the nodes that need it."""

    record: DiskRecord
    n_nodes: int = 0


@dataclass(slots=True, frozen=True)
class _Job:
    """A node's KV on its way to the disk."""

    node: Node
    namespace: bytes
    tokens: bytes
    start: int
    chunks: list[bytes]
    checkpoint: bytes | None


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
        self.n_behind = 0  # stretches that were not written because the disk was too slow
        self.n_too_large = 0  # and because its budget has no room for them
        self.n_failed = 0  # stretches that the disk did not take
        self.last_error: StoreError | None = None  # why the latest of them was not written
        self.is_failing = False  # whether what was tried last failed
        self._tree = tree
        self._policy = policy
        self._token_bytes = token_bytes
        self._post = post
        self._on_evict = on_evict  # told of a node before it goes to make room
        self._pending: set[int] = set()  # ids of nodes on their way
        self._pending_bytes = 0
        self._jobs: queue.SimpleQueue[_Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._told = (0.0, "")  # when the log was told of a failure, and of which
        self._ranked: list[tuple[Node, int]] = []  # who goes next, the last one first, and when it was last used
        self._ranked_by: EvictionPolicy | None = None
        for record in store.scan():
            self._attach(record)
        self.ensure_free(0, time.monotonic_ns())  # the budget may be smaller than it was
        self._is_detached = False  # from the tree
        self._is_over = False  # the writer has ended: what comes is answered by who brings it
        self._thread = threading.Thread(target=self._run, name="mullama-kv-disk", daemon=True)
        self._thread.start()

    @property
    def budget(self) -> int:
        return self.store.budget_bytes

    @property
    def used(self) -> int:
        return self.store.bytes_used

    def lacks(self, node: Node, with_checkpoint: bool) -> bool:
        """Whether a node's KV, or the checkpoint at its end, is neither on disk nor on its way."""
        held = node.disk
        has = isinstance(held, DiskRows) and (held.has_checkpoint or not with_checkpoint)
        return not has and node.id not in self._pending

    @property
    def n_not_written(self) -> int:
        """Stretches that are not on disk though they should be."""
        return self.n_behind + self.n_too_large + self.n_failed

    def put(self, node: Node, payload: Payload | None, now_ns: int, at_end: Payload | None = None) -> bool:
        """Hand a node's KV, with the checkpoint at its end, to the writer, unless the disk has it or it is on its way.

        False: it will not be written.
        """
        if not isinstance(payload, Rows) or node.mixed:
            return False
        if not self.lacks(node, at_end is not None):
            return True
        checkpoint = at_end.data if isinstance(at_end, Checkpoint) else None
        size = self.store.size_of(node.namespace, node.start, node.end, None if checkpoint is None else len(checkpoint))
        if self._pending and self._pending_bytes + size > MAX_PENDING:
            self.n_behind += 1
            return False
        if not self.ensure_free(size, now_ns, node):
            self.n_too_large += 1
            return False
        self._pending.add(node.id)
        self._pending_bytes += size
        self._jobs.put(_Job(node, node.namespace, node.tokens(), node.start, list(payload.chunks), checkpoint))
        return True

    def error_since(self, n_failed: int) -> StoreError | None:
        """Why something was not written since ``n_failed`` was read."""
        return self.last_error if self.n_failed > n_failed else None

    def hand_over(self, work: Callable[[], object]) -> bool:
        """Run what calls ``put``. False: the writer has too much to do; run it again when all is ``written``."""
        before = self.n_behind
        work()
        is_all, self.n_behind = self.n_behind == before, before
        return is_all

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
        step = CHUNK_TOKENS * self._token_bytes
        chunks = [data[at : at + step] for at in range(0, len(data), step)] if step else []
        return Rows(chunks, node.n_tokens, self._token_bytes), checkpoint

    def drop(self, node: Node, now_ns: int = 0) -> int:
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
        self._is_detached = True
        for node in list(self._tree.nodes()):
            if isinstance(node.disk, DiskRows):
                node.disk = None
                self._tree.prune(node)

    def written(self) -> Future[None]:
        """Done when all that was handed over so far is on disk, or was not taken. Any thread.

        What became of it is known here only then, once what the writer has posted by then has run.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # who waits may leave; the writer need not know
        self._jobs.put(lambda: future.set_result(None))
        if self._is_over:
            self._answer_waiting()
        return future

    def close(self) -> None:
        """Write what waits, then let go of the folder."""
        self._jobs.put(None)
        self._thread.join()
        self._is_over = True
        self._answer_waiting()
        if not self._is_detached:
            self.ensure_free(0, time.monotonic_ns())
        self.store.close()

    # -- the writer thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            if not isinstance(job, _Job):
                job()
                continue
            result: DiskRecord | StoreError
            try:
                # NOTE: not synced. A full disk is told by write(2) or close(2); a crash of the machine may cost it.
                result = self.store.put(job.namespace, job.tokens, job.start, job.chunks, job.checkpoint, sync=False)
            except StoreError as error:
                result = error
            except Exception as error:  # of this thread nobody else would hear
                log.exception("the writer of KV failed")
                result = StoreError(f"cannot keep KV on disk: {error}")
            if isinstance(result, StoreError):
                self._tell(result)
            self._post(self._done(job, result))

    def _tell(self, error: StoreError) -> None:
        """Log a failure: a disk that stays full fails with every request, and is told of once a minute."""
        when, what = self._told
        now = time.monotonic()
        if error.message != what or now - when >= 60:
            self._told = (now, error.message)
            log.warning("KV was not written to disk: %s", error.message)

    def _answer_waiting(self) -> None:
        """Who waits for the writer, which has ended, waits no longer."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None and not isinstance(job, _Job):
                job()

    def _done(self, job: _Job, result: DiskRecord | StoreError) -> Callable[[], None]:
        node, size = job.node, sum(map(len, job.chunks)) + len(job.checkpoint or b"")

        def on_engine_thread() -> None:
            is_wanted = node.id in self._pending  # nobody has dropped it meanwhile
            self._pending.discard(node.id)
            self._pending_bytes = max(self._pending_bytes - size, 0) if self._pending else 0
            if isinstance(result, StoreError):
                self.n_failed += 1
                self.last_error, self.is_failing = result, True
                return
            record, self.is_failing = result, False
            if self._is_detached:
                return
            if is_wanted:
                self._attach(record)
                self.ensure_free(0, time.monotonic_ns())  # others were on their way when it was fitted in
            else:
                self._remove(record)

        return on_engine_thread

    # -- records and nodes --------------------------------------------------------------------------------------

    def _attach(self, record: DiskRecord) -> None:
        """Every node on the record's path learns that the disk has it."""
        now = time.monotonic_ns()
        if record.start > 0:
            self._tree.insert(record.namespace, record.tokens[: TOKEN_BYTES * record.start], now)
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

    def ensure_free(self, n_bytes: int, now_ns: int, keep: Node | None = None) -> bool:
        """Remove records until ``n_bytes`` more fit, the policy's lowest first; ``keep`` and what is above it stay.

        False: they do not fit.
        """
        if n_bytes > self.budget:
            return False
        safe = set(keep.path()) if keep is not None else set()
        is_fresh = False
        while self.store.over_budget(n_bytes) > 0:
            node = self._next_to_go(now_ns, safe)
            if node is not None:
                self._on_evict(node)
                self.drop(node)
                self._tree.prune(node)
                is_fresh = False
            elif is_fresh:
                return False
            else:
                self._rank(now_ns, safe)
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
