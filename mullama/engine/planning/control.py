"""``engine.planning``: the scheduling policy in charge, the one that runs as a shadow, and the engine's turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from mullama.engine.client import PlanningClient
from mullama.engine.parts import EngineParts
from mullama.engine.planning import report
from mullama.engine.planning.turn_share import set_share, share_of
from mullama.errors import ModelBusy
from mullama.plugins.groups import Published, publish
from mullama.scheduling import Scheduler, registry

if TYPE_CHECKING:
    from mullama.engine.planning.shadow import Shadow

T = TypeVar("T")


def _make(spec: str, params: Mapping[str, Any] | None) -> tuple[Scheduler, Published]:
    """A policy and what it says of itself: its code runs here, and not where others wait."""
    policy = registry.create(spec, params)
    return policy, publish(policy, "scheduler", spec)


class PlanningControl(PlanningClient):
    """Changes are made on the engine thread, between two steps. The ``a`` methods are what PlanningClient says."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._policy = parts.policy

    @property
    def host_tokens(self) -> int:
        """Tokens of prefixes that fit into host memory (``--kv-host-bytes``)."""
        return self._parts.kv.host.budget // max(self._parts.token_bytes, 1)

    def snapshot(self) -> dict[str, Any]:
        """GET /internal/scheduler. Any thread: it does not wait."""
        return report.scheduler(self._parts)

    def set_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Put another policy in charge from the next step on; no request and no cached token is lost.

        ``spec`` is a name or ``FILE.py:CLASS``. Returns policy, params and the number of sequences handed over.
        Raises InvalidRequest, naming the valid ones, for an unknown policy or parameter: the running one stays.
        """
        policy, facts = _make(spec, params)
        return self._call(lambda: self._set_policy(policy, spec, facts)).result()

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        policy, facts = await asyncio.to_thread(_make, spec, params)
        return await asyncio.wrap_future(self._call(lambda: self._set_policy(policy, spec, facts)))

    async def aconfigure(self, params: Mapping[str, Any]) -> dict[str, Any]:
        spec = self._policy.spec
        wanted = {**self._policy.params(), **params}
        if registry.is_foreign(spec, self._policy.params()) or registry.is_foreign(spec, wanted):
            return await self.aset_policy(spec, wanted)  # a user's may be thinking: one made anew takes over
        return await asyncio.wrap_future(self._call(lambda: self._configure(params)))

    def set_shadow(self, spec: str | None, params: Mapping[str, Any] | None = None) -> None:
        """Run a policy as a shadow from now on instead of the one before; None: none. Raises InvalidRequest."""
        shadow = None if spec is None else self.make_shadow(spec, params)
        try:
            old = self._call(lambda: self._policy.set_shadow(shadow)).result()
        except BaseException:
            old = shadow
            raise
        finally:
            if old is not None:
                old.close()

    async def aset_shadow(self, spec: str | None, params: Mapping[str, Any] | None = None) -> None:
        await asyncio.to_thread(self.set_shadow, spec, params)

    def make_shadow(self, spec: str, params: Mapping[str, Any] | None) -> Shadow:
        """One that observes nothing yet. Raises InvalidRequest."""
        from mullama.engine.planning.shadow import Shadow
        from mullama.simulation import SimConfig

        core, parts = self._parts.core, self._parts
        config = SimConfig(
            core.n_slots,
            parts.info.n_ctx,
            core.n_batch,
            kv_tokens=parts.kv_tokens,
            host_tokens=self.host_tokens,
        )
        return Shadow(spec, params, config)

    def _call(self, function: Callable[[], T]) -> Future[T]:
        return self._parts.commands.call(function)

    def _set_policy(self, policy: Scheduler, spec: str, facts: Published) -> dict[str, Any]:
        own_thread = registry.is_foreign(spec, facts.params)
        n = self._policy.change(policy, spec, own_thread=own_thread, facts=facts)
        return {"policy": self._policy.name, "params": self._policy.params(), "handed_over": n}

    def _configure(self, params: Mapping[str, Any]) -> dict[str, Any]:
        configure = getattr(self._policy.policy, "configure", None)
        if configure is None or registry.is_foreign(self._policy.spec, self._policy.params()):
            raise ModelBusy("another policy has been put in charge meanwhile", param="params", retry_after=1)
        configure(**params)
        self._policy.republish()
        return {"policy": self._policy.name, "params": self._policy.params(), "handed_over": len(self._parts.seqs.live)}

    def share(self) -> tuple[str, dict[str, Any]]:
        """The arbiter's policy, and what this engine has of the cores (see PlanningClient)."""
        return share_of(self._parts.core)

    def set_share(self, *, weight: float = 1.0, priority: int = 0) -> None:
        """What this engine may expect beside others. Raises InvalidRequest."""
        set_share(self._parts.core, weight=weight, priority=priority)

    def set_arbiter_policy(self, policy: str) -> None:
        """How the engines of this process take turns. Raises InvalidRequest."""
        self._parts.core.turns.policy = policy
