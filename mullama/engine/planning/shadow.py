"""A shadow policy beside the one in charge, on a thread of its own: the engine sends copies and never waits.

What it would have decided and what would have come of it is worked out by ``mullama.simulation.shadow_policy``; here is
only the way there. A shadow that is slower than the engine loses observations, counted, and nothing else.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mullama.child import step_back
from mullama.scheduling import EngineState, Plan, SeqView, registry
from mullama.simulation import SimConfig
from mullama.simulation.shadow_policy import Finished, ShadowPolicy

if TYPE_CHECKING:
    from mullama.engine.requests.sequences import LiveSequence

log = logging.getLogger("mullama.engine")

BACKLOG = 256  # messages that may wait; observations beyond are dropped
WINDOW = 200  # finished requests that a prediction replays


class Shadow:
    """``add``, ``remove`` and ``observe`` from the engine thread; ``snapshot`` and ``close`` from any."""

    def __init__(self, spec: str, params: Mapping[str, Any] | None, config: SimConfig) -> None:
        """Raises what ``registry.create`` raises."""
        self.spec = spec
        self.dropped = 0
        self._params = dict(params or {})
        self._config = config
        self._shadow = ShadowPolicy(registry.create(spec, self._params), spec)
        self._finished: deque[Finished] = deque(maxlen=WINDOW)
        self._last: tuple[EngineState, str, dict[str, Any]] | None = None
        self._messages: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._predicting = False
        self._thread = threading.Thread(target=self._run, name=f"mullama-shadow-{spec}", daemon=True)
        self._thread.start()

    def add(self, view: SeqView) -> None:
        own = copy.copy(view)
        self._messages.put(lambda: self._shadow.add(own))

    def remove(self, seq: LiveSequence) -> None:
        """A sequence ended: the shadow forgets it, the next prediction remembers it."""
        view = seq.view
        self._messages.put(lambda: self._shadow.remove(view.id))
        if view.generated:
            self._finished.append(
                Finished(
                    view.arrival_ns,
                    view.prompt_tokens,
                    view.generated,
                    cached_tokens=view.cached_tokens,
                    max_tokens=view.max_tokens,
                    priority=view.priority,
                    user=view.user,
                    slo_ms=view.slo_ms,
                    ttft_ms=(seq.first_token_ns - view.arrival_ns) / 1e6 if seq.first_token_ns else None,
                )
            )

    def observe(self, state: EngineState, plan: Plan, views: Mapping[int, SeqView], spec: str, params: Any) -> None:
        """The engine acts on ``plan``; ``spec`` and ``params`` name the policy in charge."""
        self._last = state, spec, params
        if self._messages.qsize() > BACKLOG:
            self.dropped += 1
            return
        acted = Plan(dict(plan.tokens), plan.repeat, dict(plan.preempt), plan.until_ns)
        copies = [copy.copy(view) for view in views.values()]
        self._messages.put(lambda: self._shadow.observe(state, acted, copies))

    def snapshot(self) -> dict[str, Any]:
        """What it would have done so far. Asks for a new prediction, which the next snapshot shows."""
        if not self._predicting and self._finished:
            self._predicting = True
            self._messages.put(self._predict)
        return {**self._shadow.snapshot(), "dropped": self.dropped}

    def close(self) -> None:
        """End the thread; one that is stuck in the shadow's own code is left behind."""
        self._messages.put(None)
        self._thread.join(1)

    def _predict(self) -> None:
        try:
            if self._last is not None:
                state, spec, params = self._last
                self._shadow.predict(
                    list(self._finished),
                    lambda: registry.create(spec, params),
                    lambda: registry.create(self.spec, self._params),
                    state.costs,
                    self._config,
                )
        finally:
            self._predicting = False

    def _run(self) -> None:
        step_back(10)  # the engine and the event loop come first
        while (message := self._messages.get()) is not None:
            try:
                message()
            except BaseException:
                log.exception("the shadow scheduler '%s' failed", self.spec)
