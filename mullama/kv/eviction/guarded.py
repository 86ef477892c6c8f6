"""A user's eviction policy on the engine thread: what it does wrong costs it the job, and nobody a request."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from mullama.kv.eviction.lru import Lru
from mullama.kv.eviction.policy import Entry, EvictionPolicy
from mullama.logs import said
from mullama.plugins.fallback import replaced
from mullama.plugins.groups import Published, publish, shown

log = logging.getLogger("mullama.kv")

SLOW_S = 0.05  # a call that takes longer holds everybody up
MAX_SLOW = 3  # such calls in a row, and it goes
MAX_S = 1.0  # or one such call


class GuardedPolicy:
    """``policy`` until it raises or scores what is no finite number; ``lru`` from then on.

    It runs on the engine thread, where others wait for it: one that takes too long is replaced as well. Raises
    PluginError for a policy that cannot be shown.

    ``on_fallback`` is called once, from inside the call that failed: the scores given before mean nothing to lru, so
    whoever keeps them asks again (:class:`HostTier` does).
    """

    def __init__(self, policy: EvictionPolicy, spec: str) -> None:
        self.policy = policy  # the one in charge
        self.spec = spec
        self._facts = publish(policy, "KV policy", spec)
        self._slow = 0  # calls in a row that took longer than SLOW_S
        self.fallback: dict[str, Any] | None = None
        self.on_fallback: Callable[[], None] | None = None

    def score(self, entry: Entry, now_ns: int) -> float:
        policy = self.policy
        raised: BaseException | None = None
        began = time.monotonic()
        try:
            score = policy.score(entry, now_ns)
            if isinstance(score, Real) and math.isfinite(score):
                found = float(score)
                if self._was_quick("score", began):
                    return found
                return self.policy.score(entry, now_ns)
            reason = f"score() returned {shown(repr, score)}, not a finite number"
        # Foreign code: whatever it raises (or calls sys.exit with) is its fault.
        except BaseException as error:
            reason, raised = f"score() raised {said(error, most=120)}", error
        self._fall_back(reason, raised)
        return self.policy.score(entry, now_ns)

    def _was_quick(self, what: str, began: float) -> bool:
        """False: it held everybody up, and lru is in charge now. A busy machine may stop any call for a while."""
        spent = time.monotonic() - began
        self._slow = self._slow + 1 if spent > SLOW_S else 0
        if spent <= MAX_S and self._slow < MAX_SLOW:
            return True
        self._fall_back(f"{what}() took {spent:.3f} s, and everybody waits for it")
        return False

    def evicted(self, entry: Entry, score: float) -> None:
        began = time.monotonic()
        try:
            self.policy.evicted(entry, score)
        except BaseException as error:
            self._fall_back(f"evicted() raised {said(error, most=120)}", error)
        else:
            self._was_quick("evicted", began)

    @property
    def name(self) -> str:
        """Of the policy in charge, as it called itself when it was installed."""
        return self._facts.name

    def params(self) -> Mapping[str, Any]:
        """Of the policy in charge, as it published them when it was installed."""
        return dict(self._facts.params)

    def _fall_back(self, reason: str, error: BaseException | None = None) -> None:
        if self.fallback is not None:
            raise RuntimeError(f"lru, the last resort, is broken: {reason}")
        self.fallback = replaced(log, "KV policy", self.spec, Lru.name, reason, error)
        self.policy = Lru()
        self.spec = Lru.name
        self._facts = Published(Lru.name, {})
        self._slow = 0
        if self.on_fallback is not None:
            self.on_fallback()
