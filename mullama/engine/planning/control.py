"""The part of an engine that shows and changes its scheduling policy, the one that runs as a shadow, and its turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from mullama import abi
from mullama.engine.planning import report as snapshot
from mullama.errors import ModelBusy
from mullama.plugins.groups import Published, publish
from mullama.scheduling import Scheduler, registry
from mullama.types import ModelInfo

if TYPE_CHECKING:
    from mullama._core import Core
    from mullama.engine.planning.policy_host import PolicyHost
    from mullama.engine.planning.shadow import Shadow
    from mullama.engine.requests.sequences import Sequences
    from mullama.kv.cache import KvCache

T = TypeVar("T")


def _make(spec: str, params: Mapping[str, Any] | None) -> tuple[Scheduler, Published]:
    """A policy and what it says of itself: its code runs here, and not where others wait."""
    policy = registry.create(spec, params)
    return policy, publish(policy, "scheduler", spec)


class PolicyMethods:
    """Mixed into Engine. Changes are made on the engine thread, between two steps."""

    info: ModelInfo
    _core: Core
    _kv: KvCache
    _kv_tokens: int
    _token_bytes: int
    _page: abi.Reader
    _policy: PolicyHost
    _seqs: Sequences

    def call(self, function: Callable[[], T]) -> Future[T]:
        raise NotImplementedError

    @property
    def kv_host_tokens(self) -> int:
        """Tokens of prefixes that fit into host memory (``--kv-host-bytes``)."""
        return self._kv.tier.budget // max(self._token_bytes, 1)

    def scheduler_snapshot(self) -> dict[str, Any]:
        """GET /internal/scheduler."""
        return snapshot.scheduler(self.info, self._policy, list(self._seqs.live.values()), self._page, self._core)

    async def set_scheduler(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Put another policy in charge from the next step on; no request and no cached token is lost.

        ``spec`` is a name or ``FILE.py:CLASS``. Returns policy, params and the number of sequences handed over.
        Raises InvalidRequest, naming the valid ones, for an unknown policy or parameter: the running one stays.
        """
        policy, facts = await asyncio.to_thread(_make, spec, params)
        return await asyncio.wrap_future(self.call(lambda: self._set_scheduler(policy, spec, facts)))

    def set_scheduler_sync(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """``set_scheduler`` for a thread without an event loop."""
        policy, facts = _make(spec, params)
        return self.call(lambda: self._set_scheduler(policy, spec, facts)).result()

    async def configure_scheduler(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Change parameters of the policy in charge. Raises InvalidRequest; then nothing is changed."""
        spec = self._policy.spec
        wanted = {**self._policy.params(), **params}
        if registry.is_foreign(spec, self._policy.params()) or registry.is_foreign(spec, wanted):
            return await self.set_scheduler(spec, wanted)  # a user's may be thinking: one made anew takes over
        return await asyncio.wrap_future(self.call(lambda: self._configure_scheduler(params)))

    async def set_shadow(self, spec: str | None, params: Mapping[str, Any] | None = None) -> None:
        """Run a policy as a shadow from now on instead of the one before; None: none. Raises InvalidRequest."""
        await asyncio.to_thread(self.set_shadow_sync, spec, params)

    def set_shadow_sync(self, spec: str | None, params: Mapping[str, Any] | None = None) -> None:
        """``set_shadow`` for a thread without an event loop."""
        shadow = None if spec is None else self._make_shadow(spec, params)
        try:
            old = self.call(lambda: self._policy.set_shadow(shadow)).result()
        except BaseException:
            old = shadow
            raise
        finally:
            if old is not None:
                old.close()

    def _make_shadow(self, spec: str, params: Mapping[str, Any] | None) -> Shadow:
        from mullama.engine.planning.shadow import Shadow
        from mullama.simulation import SimConfig

        core = self._core
        config = SimConfig(
            core.n_slots,
            self.info.n_ctx,
            core.n_batch,
            kv_tokens=self._kv_tokens,
            host_tokens=self.kv_host_tokens,
        )
        return Shadow(spec, params, config)

    def _set_scheduler(self, policy: Any, spec: str, facts: Published) -> dict[str, Any]:
        own_thread = registry.is_foreign(spec, facts.params)
        n = self._policy.swap(policy, spec, own_thread=own_thread, facts=facts)
        return {"policy": self._policy.name, "params": self._policy.params(), "handed_over": n}

    def _configure_scheduler(self, params: Mapping[str, Any]) -> dict[str, Any]:
        configure = getattr(self._policy.policy, "configure", None)
        if configure is None or registry.is_foreign(self._policy.spec, self._policy.params()):
            raise ModelBusy("another policy has been put in charge meanwhile", param="params", retry_after=1)
        configure(**params)
        self._policy.republish()
        return {"policy": self._policy.name, "params": self._policy.params(), "handed_over": len(self._seqs.live)}

    def arbiter_share(self) -> tuple[str, dict[str, Any]]:
        """The arbiter's policy, and what this engine has of the cores (see EngineClient)."""
        turns = self._core.turns
        seat = turns.seats().get(self._core.seat, {})
        share = {
            "weight": seat.get("weight", 1.0),
            "priority": seat.get("priority", 0),
            "turns": seat.get("turns", 0),
            "computed_ms": round(seat.get("used_ns", 0) / 1e6, 3),
            "waited_ms": round(seat.get("wait_ns", 0) / 1e6, 3),
            "is_waiting": seat.get("is_waiting", False),
        }
        return turns.policy, share

    def set_share(self, *, weight: float = 1.0, priority: int = 0) -> None:
        """What this engine may expect beside others. Raises InvalidRequest."""
        self._core.turns.set_share(self._core.seat, weight=weight, priority=priority)

    def set_arbiter_policy(self, policy: str) -> None:
        """How the engines of this process take turns. Raises InvalidRequest."""
        self._core.turns.policy = policy
