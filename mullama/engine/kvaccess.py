"""The part of an engine that shows and changes its KV cache: for the web layer (async) and as ``engine.kv``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from mullama.engine import kvview
from mullama.errors import InvalidRequest
from mullama.kv import registry
from mullama.kv.events import KvEventLog, KvTier
from mullama.kv.guarded import GuardedPolicy
from mullama.kv.tree import namespace_of
from mullama.types import ModelInfo

if TYPE_CHECKING:
    from mullama._core import Core
    from mullama.engine.kvcache import KvCache
    from mullama.engine.sequences import Sequences

T = TypeVar("T")


class KvMethods:
    """Mixed into Engine. Everything is done on the engine thread, between two steps."""

    info: ModelInfo
    _core: Core
    _kv: KvCache
    _seqs: Sequences

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
        return kvview.snapshot(self.info, self._core, self._seqs, self._kv)

    @property
    def kv_events(self) -> KvEventLog:
        """What happened to cached KV (any thread may read)."""
        return self._kv.events

    @property
    def kv(self) -> KvAccess:
        """The KV cache for Python: the same as /internal/kv, and ``export``."""
        return KvAccess(self)

    async def kv_tree(self, *, limit: int = 1000) -> dict[str, Any]:
        return await self._at_boundary(lambda: kvview.tree(self._kv, self._seqs, limit))

    async def kv_map(self) -> dict[str, Any]:
        return await self._at_boundary(lambda: kvview.cell_runs(self._core))

    async def kv_pin(self, tokens: SequenceOf[int], *, ttl_s: float, namespace: str = "") -> dict[str, Any]:
        until = time.monotonic_ns() + int(ttl_s * 1e9)
        name, n = namespace_of(namespace), len(tokens)
        pinned = await self._at_boundary(lambda: kvview.pin(self._kv, name, tokens[:n], until))
        return {"pinned_tokens": pinned}

    async def kv_unpin(self, tokens: SequenceOf[int], *, namespace: str = "") -> dict[str, Any]:
        found = await self._at_boundary(lambda: kvview.pin(self._kv, namespace_of(namespace), tokens, 0))
        return {"unpinned_tokens": found}

    async def kv_drop(
        self, tokens: SequenceOf[int] | None = None, *, namespace: str = "", tiers: SequenceOf[str] = ()
    ) -> dict[str, Any]:
        name = namespace_of(namespace) if tokens is not None or namespace else None
        which = {KvTier(tier) for tier in tiers} or set(KvTier)
        return await self._at_boundary(lambda: self._kv_drop(name, tokens, which))

    def _kv_drop(self, namespace: bytes | None, tokens: SequenceOf[int] | None, tiers: set[KvTier]) -> dict[str, int]:
        found = kvview.drop(self._kv, self._seqs.running(), namespace, tokens, tiers)
        self._core.refresh_page(self._n_waiting())
        return found

    async def kv_save(self, tokens: SequenceOf[int], *, namespace: str = "") -> dict[str, Any]:
        self._need_disk()
        return await self._at_boundary(lambda: kvview.save(self._kv, namespace_of(namespace), tokens))

    async def kv_load(self, tokens: SequenceOf[int], *, namespace: str = "") -> dict[str, Any]:
        self._need_disk()
        return await self._at_boundary(lambda: kvview.load(self._kv, namespace_of(namespace), tokens))

    def _need_disk(self) -> None:
        if self._kv.disk is None:
            raise InvalidRequest("there is no disk tier: start the server with --kv-disk-dir DIR")

    async def set_kv_policy(self, spec: str, params: Mapping[str, Any] | None) -> dict[str, Any]:
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


class KvAccess:
    """``engine.kv``: what ``/internal/kv`` shows, for threads without a loop; each call waits for a step boundary."""

    def __init__(self, engine: KvMethods) -> None:
        self._engine = engine

    def snapshot(self) -> dict[str, Any]:
        """Layout, bytes, cells, tiers, policy, totals."""
        return self._engine.kv_snapshot_sync()

    def tree(self, *, limit: int = 1000) -> dict[str, Any]:
        """The prefix tree, parents first."""
        engine = self._engine
        return engine.call(lambda: kvview.tree(engine._kv, engine._seqs, limit)).result()

    def map(self) -> dict[str, Any]:
        """Which cells belong to which sequence."""
        engine = self._engine
        return engine.call(lambda: kvview.cell_runs(engine._core)).result()

    def audit(self) -> list[str]:
        """Differences between the tree, the slots and llama.cpp's own cells; empty when all agree."""
        return self._engine.call(self._engine._kv.audit).result()

    def drop(self) -> int:
        """Forget every cached prefix. Returns the cells freed."""
        return self._engine.call(self._engine._drop_retained).result()

    def export(self, slot: int) -> dict[str, Any]:
        """A slot's ``tokens`` and ``layers``: each ``layer``, ``k`` and ``v`` as NumPy arrays (tokens, width).

        float16 and float32 cells come as such, others as raw bytes in ggml's format (``type_k``, ``type_v``).
        Raises ValueError for a slot that is none.
        """
        engine = self._engine
        return engine.call(lambda: kvview.export(engine._kv, slot)).result()
