"""Who is unloaded when another model needs the memory: a policy names one of the candidates, and the Evictor sees that
it goes, within the budget before a model is loaded, and where free memory lacks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mullama.errors import ModelBusy
from mullama.logs import said
from mullama.plugins.groups import PluginGroup
from mullama.serving.served_models import ServedModels
from mullama.serving.sleepers import Sleepers
from mullama.serving.states import ModelState, Served

log = logging.getLogger(__name__)

VICTIM_S = 5.0  # how long a user's policy may think about who is unloaded


@dataclass(frozen=True, slots=True)
class ModelView:
    """A loaded model that may be unloaded: nobody has pinned it. Times in seconds."""

    name: str
    n_bytes: int
    idle_s: float
    loaded_s: float  # since it was loaded
    n_requests: int
    in_use: int  # requests that would have to end first


class ModelPolicy(Protocol):
    """Made without arguments."""

    def victim(self, candidates: Sequence[ModelView]) -> str:
        """Name of the one to unload; there is at least one."""


class Lru:
    """The one that has been idle longest; one that is in use only where all are."""

    def victim(self, candidates: Sequence[ModelView]) -> str:
        return min(candidates, key=lambda one: (one.in_use > 0, -one.idle_s, one.name)).name


class Largest:
    """The one that frees the most memory, idle ones first."""

    def victim(self, candidates: Sequence[ModelView]) -> str:
        return min(candidates, key=lambda one: (one.in_use > 0, -one.n_bytes, -one.idle_s, one.name)).name


POLICIES = PluginGroup(
    "mullama.model_policies",
    "model policy",
    {"lru": "mullama.serving.model_eviction:Lru", "largest": "mullama.serving.model_eviction:Largest"},
)


async def _named(policy: ModelPolicy, candidates: list[ModelView]) -> tuple[str, str]:
    """Whom the policy names, or else why it names nobody. A user's is asked in a thread: it is not ours to trust."""
    if isinstance(policy, Lru | Largest):
        return policy.victim(candidates), ""

    def ask() -> tuple[str, str]:
        try:
            return str(policy.victim(candidates)), ""
        except BaseException as error:
            return "", f"raised {said(error)}"

    try:
        return await asyncio.wait_for(asyncio.to_thread(ask), VICTIM_S)
    except TimeoutError:
        return "", f"gave no answer within {VICTIM_S:g} s"


def _own_bytes(one: Served) -> int:
    """What is free when it is unloaded. Its mapped file is not part of that: pages of files count as free."""
    engine = one.engine
    return max(one.held_bytes - engine.info.mapped_bytes, 0) if engine is not None else 0


class Evictor:
    """Has models go for one that is wanted. Event loop only."""

    def __init__(self, models: ServedModels, sleepers: Sleepers, policy: ModelPolicy) -> None:
        self.policy = policy
        self._models = models
        self._sleepers = sleepers
        self._budget = models.budget

    async def make_memory(self, served: Served) -> None:
        """Unload others until the budget holds ``served``. Raises ModelBusy when it never can."""
        models, budget = self._models, self._budget
        if budget.n_bytes and served.n_bytes > budget.n_bytes:
            raise ModelBusy(
                f"'{served.name}' needs {served.n_bytes >> 20} MiB, the budget for models is "
                f"{budget.n_bytes >> 20} MiB (--memory-budget)"
            )
        asked: Served | None = None
        try:
            while not budget.fits(served, models.all()) and served.waiters and not models.is_ending:
                models.changed.clear()
                if budget.left and budget.fits(served, models.all(), with_left=False):
                    await models.changed.wait()  # an engine that was replaced ends soon, and nobody needs to go
                    continue
                if await self._discard_sleeper(served, budget.missing(served, models.all())):
                    continue
                victim = await self._victim(served)
                if victim is None:
                    continue
                if not victim.n_leases:
                    await models.unload(victim, wait=False)
                    continue
                # All are busy. This one takes no new requests, so that it ends; another one may end before it.
                if asked is None or asked.pinned or asked.state is not ModelState.YIELDING:
                    self._take_back(asked)
                    asked = victim
                    if victim.state is ModelState.READY:  # else it is being unloaded by hand already
                        victim.move(ModelState.YIELDING)
                await models.changed.wait()
        finally:
            self._take_back(asked)
        while len(budget.closing) > 1 or (budget.closing and not budget.fits_beside(served, models.all())):
            await asyncio.wait(list(budget.closing), return_when=asyncio.FIRST_COMPLETED)

    async def free_memory(self, served: Served, missing: int) -> bool:
        """Let one go who holds memory and does nothing, where a load has found too little of it. True: try again.

        False: there is nobody, or all of them together do not hold the ``missing`` bytes, so that they stay.
        """
        if self._models.is_ending or not served.waiters:
            return False
        if self._budget.closing:
            await asyncio.wait(list(self._budget.closing), return_when=asyncio.FIRST_COMPLETED)
            return True
        others = [one for one in self._models if one is not served and not one.pinned]
        idle = [one for one in others if one.is_idle]
        asleep = [one.asleep.host_bytes for one in others if one.state is ModelState.ASLEEP and one.asleep is not None]
        if missing > sum(_own_bytes(one) for one in idle) + sum(asleep):
            return False
        if await self._discard_sleeper(served, max(missing, 1)):
            return True
        if not idle:
            return False
        victim = await self._victim(served)
        if victim is not None and not victim.n_leases:  # else things have changed while the policy thought
            log.info("%s: unloaded, to make room for %s", victim.name, served.name)
            await self._models.unload(victim)
        return True

    async def _discard_sleeper(self, served: Served, missing: int) -> bool:
        sleeper = self._sleepers.in_the_way(served, missing)
        if sleeper is None:
            return False
        log.info("%s: what it held asleep makes room for %s", sleeper.name, served.name)
        await self._sleepers.discard(sleeper)
        return True

    async def _victim(self, served: Served) -> Served | None:
        """Whom the policy names to go for ``served``: an idle one where there is one. Raises ModelBusy.

        None: whom it named has gone while it thought.
        """
        now = self._models.clock()
        loaded = {one.name: one for one in self._models if one.resident is not None}
        candidates = [_view(one, now) for one in loaded.values() if one is not served and not one.pinned]
        if not candidates:
            raise ModelBusy(f"there is no room for '{served.name}': every loaded model is pinned")
        candidates = [view for view in candidates if not view.in_use] or candidates
        name, reason = await _named(self.policy, candidates)
        if name not in [view.name for view in candidates]:
            log.error(
                "the model policy %s; lru is asked instead", reason or f"named '{name}', which cannot be unloaded"
            )
            name = Lru().victim(candidates)
        victim = loaded[name]
        return victim if victim.resident is not None and not victim.pinned else None

    def _take_back(self, asked: Served | None) -> None:
        """Its memory is not needed after all, or it is gone."""
        if asked is not None and asked.state is ModelState.YIELDING:
            asked.move(ModelState.READY)
            self._models.answer(asked)


def _view(one: Served, now: float) -> ModelView:
    loaded_s = now - one.resident.loaded_at if one.resident is not None else 0.0
    return ModelView(one.name, one.held_bytes, now - one.last_used, loaded_s, one.n_requests, one.n_leases)
