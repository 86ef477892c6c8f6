"""A user's eviction policy on the engine thread: what it does wrong costs it the job, and nobody a request."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from mullama.kv.eviction import Entry, EvictionPolicy
from mullama.kv.policies.lru import Lru
from mullama.logs import said

log = logging.getLogger("mullama.kv")


class GuardedPolicy:
    """``policy`` until it raises or scores what is no finite number; ``lru`` from then on.

    ``on_fallback`` is called once, from inside the call that failed: the scores given before mean nothing to lru, so
    whoever keeps them asks again (:class:`HostTier` does).
    """

    def __init__(self, policy: EvictionPolicy, spec: str) -> None:
        self.policy = policy  # the one in charge
        self.spec = spec
        self.name = str(getattr(policy, "name", type(policy).__name__))
        self.fallback: dict[str, Any] | None = None  # "from", "reason", "unix_time"
        self.on_fallback: Callable[[], None] | None = None

    def score(self, entry: Entry, now_ns: int) -> float:
        policy = self.policy
        raised: BaseException | None = None
        try:
            score = policy.score(entry, now_ns)
            if isinstance(score, Real) and math.isfinite(score):
                return float(score)
            reason = f"score() returned {_text(repr, score)}, not a finite number"
        # Foreign code: whatever it raises (or calls sys.exit with) is its fault.
        except (Exception, SystemExit) as error:
            reason, raised = f"score() raised {said(error, most=120)}", error
        self._fall_back(reason, raised)
        return self.policy.score(entry, now_ns)

    def evicted(self, entry: Entry, score: float) -> None:
        try:
            self.policy.evicted(entry, score)
        except (Exception, SystemExit) as error:
            self._fall_back(f"evicted() raised {said(error, most=120)}", error)

    def params(self) -> Mapping[str, Any]:
        """Of the policy in charge; empty if it cannot say."""
        try:
            return dict(self.policy.params())
        except (Exception, SystemExit):
            return {}

    def _fall_back(self, reason: str, error: BaseException | None = None) -> None:
        if self.fallback is not None:
            raise RuntimeError(f"lru, the last resort, is broken: {reason}")
        log.error("KV policy '%s' is replaced by lru: %s", self.spec, reason, exc_info=error)
        self.fallback = {"from": self.spec, "reason": reason, "unix_time": round(time.time(), 3)}
        self.policy = Lru()
        self.spec = self.name = Lru.name
        if self.on_fallback is not None:
            self.on_fallback()


def _text(how: Callable[[Any], str], value: object) -> str:
    """``repr`` or ``str`` of what foreign code made, short."""
    try:
        text = how(value)
    except Exception:
        text = f"something ({type(value).__name__})"
    return text if len(text) <= 120 else f"{text[:117]}..."
