"""Who makes room for a model that is wanted: within the budget before it is loaded, and where free memory lacks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from mullama.errors import ModelBusy
from mullama.logs import said
from mullama.serving.budget import Budget
from mullama.serving.model_eviction import Largest, Lru, ModelPolicy, ModelView
from mullama.serving.states import ModelState, Served

log = logging.getLogger(__name__)

VICTIM_S = 5.0  # how long a user's policy may think about who is unloaded


def _own_bytes(one: Served) -> int:
    """What is free when it is unloaded. Its mapped file is not part of that: pages of files count as free."""
    engine = one.engine
    return max(one.held_bytes - engine.info.mapped_bytes, 0) if engine is not None else 0


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


class RoomMethods:
    """Mixed into ModelManager. Event loop only."""

    budget: Budget
    _changed: asyncio.Event
    _clock: Callable[[], float]
    _is_ending: bool
    _policy: ModelPolicy
    _served: dict[str, Served]

    def all(self) -> list[Served]:
        raise NotImplementedError

    def _answer(self, served: Served) -> None:
        raise NotImplementedError

    async def _discard(self, served: Served) -> None:
        raise NotImplementedError

    def _n_leases(self, one: Served) -> int:
        raise NotImplementedError

    def _sleeper_in_the_way(self, served: Served, missing: int) -> Served | None:
        raise NotImplementedError

    async def _unload(self, served: Served, *, wait: bool = True) -> None:
        raise NotImplementedError

    async def _make_room(self, served: Served) -> None:
        """Unload others until ``served`` fits. Raises ModelBusy when it never can."""
        if self.budget.n_bytes and served.n_bytes > self.budget.n_bytes:
            raise ModelBusy(
                f"'{served.name}' needs {served.n_bytes >> 20} MiB, the budget for models is "
                f"{self.budget.n_bytes >> 20} MiB (--memory-budget)"
            )
        asked: Served | None = None
        try:
            while not self.budget.fits(served, self.all()) and served.waiters and not self._is_ending:
                self._changed.clear()
                if self.budget.left and self.budget.fits(served, self.all(), with_left=False):
                    await self._changed.wait()  # an engine that was replaced ends soon, and nobody needs to go
                    continue
                sleeper = self._sleeper_in_the_way(served, self.budget.missing(served, self.all()))
                if sleeper is not None:
                    log.info("%s: what it held asleep makes room for %s", sleeper.name, served.name)
                    await self._discard(sleeper)
                    continue
                victim = await self._victim(served)
                if victim is None:
                    continue
                if not self._n_leases(victim):
                    await self._unload(victim, wait=False)
                    continue
                # All are busy. This one takes no new requests, so that it ends; another one may end before it.
                if asked is None or asked.pinned or not asked.gives_way:
                    self._take_back(asked)
                    asked = self._ask(victim)
                await self._changed.wait()
        finally:
            self._take_back(asked)
        while len(self.budget.closing) > 1 or (self.budget.closing and not self.budget.fits_beside(served, self.all())):
            await asyncio.wait(list(self.budget.closing), return_when=asyncio.FIRST_COMPLETED)

    async def _victim(self, served: Served) -> Served | None:
        """Whom the policy names to make room for ``served``: an idle one where there is one. Raises ModelBusy.

        None: whom it named has gone while it thought.
        """
        now = self._clock()
        candidates = [
            self._view(one, now)
            for one in self._served.values()
            if one is not served and one.resident is not None and not one.pinned
        ]
        if not candidates:
            raise ModelBusy(f"there is no room for '{served.name}': every loaded model is pinned")
        candidates = [view for view in candidates if not view.in_use] or candidates
        names = [view.name for view in candidates]
        name, reason = await _named(self._policy, candidates)
        if name not in names:
            log.error(
                "the model policy %s; lru is asked instead", reason or f"named '{name}', which cannot be unloaded"
            )
            name = Lru().victim(candidates)
        victim = self._served[name]
        return victim if victim.resident is not None and not victim.pinned else None

    def _ask(self, victim: Served) -> Served:
        """Let a busy model take no new requests for now."""
        if victim.state is ModelState.READY:  # else it is being unloaded by hand already
            victim.state, victim.gives_way = ModelState.UNLOADING, True
        return victim

    def _take_back(self, asked: Served | None) -> None:
        """Its room is not needed after all, or it is gone."""
        if asked is not None and asked.gives_way:
            asked.gives_way = False
            if asked.resident is not None:
                asked.state = ModelState.READY
                self._answer(asked)

    def _view(self, one: Served, now: float) -> ModelView:
        in_use = self._n_leases(one)
        return ModelView(one.name, one.held_bytes, now - one.last_used, now - one.loaded_at, one.n_requests, in_use)

    async def _free_memory(self, served: Served, missing: int) -> bool:
        """Let one go who holds memory and does nothing, where a load has found too little of it. True: try again.

        False: there is nobody, or all of them together do not hold the ``missing`` bytes, so that they stay.
        """
        if self._is_ending or served.is_unwanted or not served.waiters:
            return False
        if self.budget.closing:
            await asyncio.wait(list(self.budget.closing), return_when=asyncio.FIRST_COMPLETED)
            return True
        others = [one for one in self._served.values() if one is not served and not one.pinned]
        idle = [one for one in others if one.state is ModelState.READY and not self._n_leases(one)]
        asleep = [one.asleep.host_bytes for one in others if one.state is ModelState.ASLEEP and one.asleep is not None]
        if missing > sum(_own_bytes(one) for one in idle) + sum(asleep):
            return False
        sleeper = self._sleeper_in_the_way(served, max(missing, 1))
        if sleeper is not None:
            log.info("%s: what it held asleep makes room for %s", sleeper.name, served.name)
            await self._discard(sleeper)
        elif idle:
            victim = await self._victim(served)
            if victim is None or self._n_leases(victim):
                return True  # things have changed while the policy thought: the load is tried again
            log.info("%s: unloaded, to make room for %s", victim.name, served.name)
            await self._unload(victim)
        else:
            return False
        return True
