"""``engine.kv``: what ``/internal/kv`` shows and changes, for threads and, by the names with an ``a``, for event loops.

It lives here and not with the cache, which knows nothing of step boundaries, of requests or of other weights.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, TypeVar

from mullama.engine.client import KvClient
from mullama.engine.parts import EngineParts
from mullama.errors import InvalidRequest, ModelBusy
from mullama.kv import audit, control, report, rows
from mullama.kv.events import KvEventLog, KvTier
from mullama.kv.eviction import registry
from mullama.kv.eviction.guarded import GuardedPolicy
from mullama.kv.index.tree import namespace_of
from mullama.kv.tiers.disk_tier import DiskTier

T = TypeVar("T")


class KvControl(KvClient):
    """Everything is done on the engine thread between two steps; the plain methods wait there for that, on any other.

    The ``a`` methods are what KvClient says.
    """

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._kv = parts.kv

    def _wait_for(self, function: Callable[[], T]) -> T:
        return self._parts.commands.call(function).result()

    async def _at_boundary(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._parts.commands.call(function))

    # -- for threads ----------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Layout, bytes, cells, tiers, policy, totals."""
        return self._wait_for(self._snapshot)

    def tree(self, *, limit: int = 1000, text: bool = False) -> dict[str, Any]:
        """The prefix tree, parents first; ``text``: with what each node holds, the middle of a long one left out."""
        return self._wait_for(lambda: self._tree(limit, text))

    def map(self) -> dict[str, Any]:
        """Which cells belong to which sequence."""
        return self._wait_for(lambda: report.cell_runs(self._parts.core))

    def audit(self) -> list[str]:
        """Differences between the tree, the slots and llama.cpp's own cells; empty when all agree."""
        return self._wait_for(lambda: audit.differences(self._kv))

    def drop(self) -> int:
        """Forget every cached prefix. Returns the cells freed."""
        return self._wait_for(self._drop_all)

    def export(self, slot: int) -> dict[str, Any]:
        """A slot's ``tokens`` and ``layers``: each ``layer``, ``k`` and ``v`` as NumPy arrays (tokens, width).

        Heads follow one another in a row: ``k.reshape(n, heads, -1)[:, h]`` is head ``h`` of ``heads`` (None for
        quantised cells). Keys are stored after the rotation for their position (``k_has_rope``; None: in some layers,
        which ones is not known), values never are; ``rope`` says which rotation (type, dims of a head, freq_base,
        scaling), None for models without. float16 and float32 cells come as such, others as raw bytes in ggml's format
        (``type_k``, ``type_v``), where keys and values may be multiplied by a Hadamard matrix as well. Raises
        ValueError for a slot that is none.
        """
        return self._wait_for(lambda: rows.export(self._kv, slot))

    def read(self, tokens: SequenceOf[int], *, cache_salt: str = "") -> dict[str, Any]:
        """The same of a prefix: of as many of its tokens as a slot or host memory holds."""
        ids = list(tokens)
        return self._wait_for(lambda: rows.read(self._kv, namespace_of(cache_salt), ids))

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
        ids, given = list(tokens), list(layers)

        def put() -> int:
            return rows.write(self._kv, self._parts.seqs.running(), namespace_of(cache_salt), ids, given)

        return {"slot": self._wait_for(put), "tokens": len(ids)}

    # -- for event loops --------------------------------------------------------------------------------------

    @property
    def events(self) -> KvEventLog:
        """What happened to cached KV (any thread may read)."""
        return self._kv.history.events

    async def asnapshot(self) -> dict[str, Any]:
        return await self._at_boundary(self._snapshot)

    async def atree(self, *, limit: int = 1000, text: bool = False) -> dict[str, Any]:
        return await self._at_boundary(lambda: self._tree(limit, text))

    async def amap(self) -> dict[str, Any]:
        return await self._at_boundary(lambda: report.cell_runs(self._parts.core))

    async def apin(self, tokens: SequenceOf[int], *, ttl_s: float, namespace: str = "") -> dict[str, Any]:
        until = time.monotonic_ns() + int(ttl_s * 1e9)
        pinned = await self._at_boundary(lambda: control.pin(self._kv, namespace_of(namespace), tokens, until))
        return {"pinned_tokens": pinned}

    async def aunpin(self, tokens: SequenceOf[int], *, namespace: str = "") -> dict[str, Any]:
        found = await self._at_boundary(lambda: control.pin(self._kv, namespace_of(namespace), tokens, 0))
        return {"unpinned_tokens": found}

    async def adrop(
        self, tokens: SequenceOf[int] | None = None, *, namespace: str = "", tiers: SequenceOf[str] = ()
    ) -> dict[str, Any]:
        name = namespace_of(namespace) if tokens is not None or namespace else None
        which = {KvTier(tier) for tier in tiers} or set(KvTier)
        return await self._at_boundary(lambda: self._drop(name, tokens, which))

    async def asave(self, tokens: SequenceOf[int], *, namespace: str = "") -> dict[str, Any]:
        """Answers when it is on disk. Raises StoreError when the disk does not take it; the KV stays where it was."""
        disk, name = self._need_disk(), namespace_of(namespace)
        n_failed = disk.n_failed
        is_all = False
        while not is_all:
            is_all = await self._on_disk(
                disk, lambda: disk.hand_over(lambda: control.save(self._kv, disk, name, tokens))
            )
            await asyncio.wrap_future(disk.written())
        return await self._on_disk(disk, lambda: control.saved(self._kv, disk, name, tokens, n_failed))

    async def aload(self, tokens: SequenceOf[int], *, namespace: str = "") -> dict[str, Any]:
        disk = self._need_disk()
        return await self._on_disk(disk, lambda: control.load(self._kv, namespace_of(namespace), tokens))

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        # A user's code runs there, and never on the event loop.
        policy = await asyncio.to_thread(lambda: GuardedPolicy(registry.create(spec, params or {}), spec))
        await self._at_boundary(lambda: self._kv.host.set_policy(policy, time.monotonic_ns()))
        return {"policy": policy.name, "params": dict(policy.params())}

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
        if self._parts.config.kv_disk_dir and self._parts.weights.is_changing:
            raise _handed_over()
        raise InvalidRequest("there is no disk tier: start the server with --kv-disk-dir DIR")

    # -- the engine thread ------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Any]:
        seqs = self._parts.seqs
        n_parked = sum(seq.parked is not None for seq in seqs.live.values())
        return report.snapshot(self._parts.info.name, self._kv, seqs.owners(), n_parked)

    def _tree(self, limit: int, text: bool) -> dict[str, Any]:
        return report.tree(
            self._kv, self._parts.seqs.owners(), limit, self._parts.core.model.detokenize if text else None
        )

    def _drop(self, namespace: bytes | None, tokens: SequenceOf[int] | None, tiers: set[KvTier]) -> dict[str, int]:
        found = control.drop(self._kv, self._parts.seqs.running(), namespace, tokens, tiers)
        self._parts.core.refresh_page(self._parts.n_waiting)
        return found

    def _drop_all(self) -> int:
        freed = self._kv.drop(self._parts.seqs.running())
        self._parts.core.refresh_page(self._parts.n_waiting)
        return freed


def _handed_over() -> ModelBusy:
    return ModelBusy("the disk tier is handed to other weights in this moment; try again", retry_after=1)
