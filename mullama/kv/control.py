"""The part of an engine that shows and changes its KV cache: for the web layer (async) and as ``engine.kv``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from mullama.errors import InvalidRequest, ModelBusy
from mullama.kv import report, rows
from mullama.kv.events import KvEventLog, KvTier
from mullama.kv.eviction import registry
from mullama.kv.eviction.guarded import GuardedPolicy
from mullama.kv.index.tree import namespace_of
from mullama.types import ModelInfo

if TYPE_CHECKING:
    from mullama._core import Core
    from mullama.config import ServeConfig
    from mullama.engine.requests.sequences import Sequences
    from mullama.engine.weights.change import Weights
    from mullama.kv.cache import KvCache
    from mullama.kv.tiers.disk_tier import DiskTier

T = TypeVar("T")


class KvMethods:
    """Mixed into Engine. Everything is done on the engine thread, between two steps."""

    info: ModelInfo
    config: ServeConfig
    _core: Core
    _kv: KvCache
    _seqs: Sequences
    _weights: Weights

    def call(self, function: Callable[[], T]) -> Future[T]:
        raise NotImplementedError

    def _n_waiting(self) -> int:
        raise NotImplementedError

    async def kv_snapshot(self) -> dict[str, Any]:
        """GET /internal/kv, as it is at a step boundary."""
        return await asyncio.wrap_future(self.call(self._kv_snapshot))

    def kv_snapshot_sync(self) -> dict[str, Any]:
        """The same for a thread without an event loop."""
        return self.call(self._kv_snapshot).result()

    def _kv_snapshot(self) -> dict[str, Any]:
        return report.snapshot(self.info, self._core, self._seqs, self._kv)

    @property
    def kv_events(self) -> KvEventLog:
        """What happened to cached KV (any thread may read)."""
        return self._kv.events

    @property
    def kv(self) -> KvAccess:
        """The KV cache for Python: the same as /internal/kv, and ``export``."""
        return KvAccess(self)

    async def kv_tree(self, *, limit: int = 1000, text: bool = False) -> dict[str, Any]:
        """The prefix tree, parents first, at most ``limit`` nodes; ``text``: with what they hold, long ones cut."""
        return await self._at_boundary(lambda: self._kv_tree(limit, text))

    def _kv_tree(self, limit: int, text: bool) -> dict[str, Any]:
        return report.tree(self._kv, self._seqs, limit, self._core.model.detokenize if text else None)

    async def kv_map(self) -> dict[str, Any]:
        """Which cells of llama.cpp belong to which sequence, as runs of equal cells."""
        return await self._at_boundary(lambda: report.cell_runs(self._core))

    async def kv_pin(self, tokens: SequenceOf[int], *, ttl_s: float, namespace: str = "") -> dict[str, Any]:
        """Nothing that is cached of this prefix is evicted for ``ttl_s`` seconds. Says how many tokens that are."""
        until = time.monotonic_ns() + int(ttl_s * 1e9)
        name, n = namespace_of(namespace), len(tokens)
        pinned = await self._at_boundary(lambda: report.pin(self._kv, name, tokens[:n], until))
        return {"pinned_tokens": pinned}

    async def kv_unpin(self, tokens: SequenceOf[int], *, namespace: str = "") -> dict[str, Any]:
        """Take the pin of a prefix back. Says of how many tokens."""
        found = await self._at_boundary(lambda: report.pin(self._kv, namespace_of(namespace), tokens, 0))
        return {"unpinned_tokens": found}

    async def kv_drop(
        self, tokens: SequenceOf[int] | None = None, *, namespace: str = "", tiers: SequenceOf[str] = ()
    ) -> dict[str, Any]:
        """Forget what is cached of prompts that begin with ``tokens`` (None: of all), in some ``tiers`` or in all.

        What runs keeps its own. Says what that freed.
        """
        name = namespace_of(namespace) if tokens is not None or namespace else None
        which = {KvTier(tier) for tier in tiers} or set(KvTier)
        return await self._at_boundary(lambda: self._kv_drop(name, tokens, which))

    def _kv_drop(self, namespace: bytes | None, tokens: SequenceOf[int] | None, tiers: set[KvTier]) -> dict[str, int]:
        found = report.drop(self._kv, self._seqs.running(), namespace, tokens, tiers)
        self._core.refresh_page(self._n_waiting())
        return found

    async def kv_save(self, tokens: SequenceOf[int], *, namespace: str = "") -> dict[str, Any]:
        """Answers when it is on disk. Raises StoreError when the disk does not take it; the KV stays where it was."""
        disk, name = self._need_disk(), namespace_of(namespace)
        n_failed = disk.n_failed
        is_all = False
        while not is_all:
            is_all = await self._on_disk(
                disk, lambda: disk.hand_over(lambda: report.save(self._kv, disk, name, tokens))
            )
            await asyncio.wrap_future(disk.written())
        return await self._on_disk(disk, lambda: report.saved(self._kv, disk, name, tokens, n_failed))

    async def kv_load(self, tokens: SequenceOf[int], *, namespace: str = "") -> dict[str, Any]:
        """Bring what is on disk of a prefix into host memory. Raises InvalidRequest without a disk tier."""
        disk = self._need_disk()
        return await self._on_disk(disk, lambda: report.load(self._kv, namespace_of(namespace), tokens))

    async def _on_disk(self, disk: DiskTier, function: Callable[[], T]) -> T:
        """``_at_boundary`` for what needs the disk tier, if it is still that one: it goes and comes with weights."""

        def work() -> T:
            if self._kv.disk is not disk:
                raise _handed_over()
            return function()

        return await self._at_boundary(work)

    def _need_disk(self) -> DiskTier:
        if self._kv.disk is not None:
            return self._kv.disk
        if self.config.kv_disk_dir and self._weights.is_changing:
            raise _handed_over()
        raise InvalidRequest("there is no disk tier: start the server with --kv-disk-dir DIR")

    async def set_kv_policy(self, spec: str, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Put another eviction policy in charge; nothing moves. Raises InvalidRequest: then the one before stays."""
        # A user's code runs there, and never on the event loop.
        policy = await asyncio.to_thread(lambda: GuardedPolicy(registry.create(spec, params or {}), spec))
        await self._at_boundary(lambda: self._kv.tier.set_policy(policy, time.monotonic_ns()))
        return {"policy": policy.name, "params": dict(policy.params())}

    async def _at_boundary(self, function: Callable[[], T]) -> T:
        """What the function returns when the engine thread has run it between two steps."""
        return await asyncio.wrap_future(self.call(function))

    async def drop_retained(self) -> int:
        """Drop every retained prefix; returns the number of cells freed."""
        return await asyncio.wrap_future(self.call(self._drop_retained))

    def _drop_retained(self) -> int:
        freed = self._kv.drop(self._seqs.running())
        self._core.refresh_page(self._n_waiting())
        return freed


def _handed_over() -> ModelBusy:
    return ModelBusy("the disk tier is handed to other weights in this moment; try again", retry_after=1)


class KvAccess:
    """``engine.kv``: what ``/internal/kv`` shows, for threads without a loop; each call waits for a step boundary."""

    def __init__(self, engine: KvMethods) -> None:
        self._engine = engine

    def snapshot(self) -> dict[str, Any]:
        """Layout, bytes, cells, tiers, policy, totals."""
        return self._engine.kv_snapshot_sync()

    def tree(self, *, limit: int = 1000, text: bool = False) -> dict[str, Any]:
        """The prefix tree, parents first; ``text``: with what each node holds, the middle of a long one left out."""
        return self._engine.call(lambda: self._engine._kv_tree(limit, text)).result()

    def map(self) -> dict[str, Any]:
        """Which cells belong to which sequence."""
        engine = self._engine
        return engine.call(lambda: report.cell_runs(engine._core)).result()

    def audit(self) -> list[str]:
        """Differences between the tree, the slots and llama.cpp's own cells; empty when all agree."""
        return self._engine.call(self._engine._kv.audit).result()

    def drop(self) -> int:
        """Forget every cached prefix. Returns the cells freed."""
        return self._engine.call(self._engine._drop_retained).result()

    def export(self, slot: int) -> dict[str, Any]:
        """A slot's ``tokens`` and ``layers``: each ``layer``, ``k`` and ``v`` as NumPy arrays (tokens, width).

        Heads follow one another in a row: ``k.reshape(n, heads, -1)[:, h]`` is head ``h`` of ``heads`` (None for
        quantised cells). Keys are stored after the rotation for their position (``k_has_rope``; None: in some layers,
        which ones is not known), values never are; ``rope`` says which rotation (type, dims of a head, freq_base,
        scaling), None for models without. float16 and float32 cells come as such, others as raw bytes in ggml's format
        (``type_k``, ``type_v``), where keys and values may be multiplied by a Hadamard matrix as well. Raises
        ValueError for a slot that is none.
        """
        engine = self._engine
        return engine.call(lambda: rows.export(engine._kv, slot)).result()

    def read(self, tokens: SequenceOf[int], *, cache_salt: str = "") -> dict[str, Any]:
        """The same of a prefix: of as many of its tokens as a slot or host memory holds."""
        engine, ids = self._engine, list(tokens)
        return engine.call(lambda: rows.read(engine._kv, namespace_of(cache_salt), ids)).result()

    def write(
        self, tokens: SequenceOf[int], layers: SequenceOf[Mapping[str, Any]], *, cache_salt: str = ""
    ) -> dict[str, int]:
        """Put KV of a prefix into the cache: later prompts that begin with it are computed on top of it.

        ``layers`` as ``read`` gives them; a layer, ``k`` or ``v`` that is left out stays as it is cached (under this
        salt or none). Arrays are (tokens, width), or (tokens, heads, width of a head); numbers are rounded to the
        cells' type. What else is cached under this salt and begins with the same token is forgotten, since it was
        computed otherwise: use a ``cache_salt`` of its own, and give it to the requests that are to use it. At least
        one token of a prompt must come behind the prefix. It is never written to disk. Returns ``slot`` and ``tokens``.

        Raises InvalidRequest (shapes, types, layers that are missing, models without full attention), ModelBusy (a
        running request begins so, no slot is free).
        """
        engine, ids, given = self._engine, list(tokens), list(layers)

        def put() -> int:
            return rows.write(engine._kv, engine._seqs.running(), namespace_of(cache_salt), ids, given)

        return {"slot": engine.call(put).result(), "tokens": len(ids)}
