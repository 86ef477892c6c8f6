"""A user's policy on a thread of its own, with views of its own: whatever it does, the engine goes on.

The engine sends what changed and the question; the answer is fetched with a time limit. Nothing is shared: the policy's
SeqViews are copies that this thread brings up to date before each plan.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

from mullama.errors import PluginError
from mullama.logs import said
from mullama.plugins.groups import Published, publish
from mullama.scheduling import EngineState, Plan, Scheduler, SeqView, own_plan

log = logging.getLogger("mullama.engine")

_CHANGING = ("state", "prefill_left", "generated", "cells", "state_ns", "preemptions", "cached_tokens")
PUBLISH_S = 1.0  # between two looks at a policy's parameters, which it may change itself
assert {*_CHANGING} <= {f.name for f in fields(SeqView)}
_facts = attrgetter("id", *_CHANGING)


class Orphaned(BaseException):
    """Raised inside a policy that did not answer in time, to end its thread."""


class Planner:
    """One question at a time: ``ask``, then ``answer`` until there is one. All calls from the engine thread."""

    def __init__(self, policy: Scheduler, label: str) -> None:
        self._policy = policy
        self._label = label
        self._views: dict[int, SeqView] = {}  # the policy's own; touched by the planner thread only
        self._questions: queue.SimpleQueue[tuple[list[Any], list[Any], EngineState] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Plan | str] = queue.SimpleQueue()
        self.published: Published | None = None  # what the policy says of itself, where that has changed
        self._published_at = time.monotonic()
        self._news: list[SeqView | int] = []  # arrivals and ends since the last question
        self.asked_ns = 0  # 0: no question is open
        self._thread = threading.Thread(target=self._run, name=f"mullama-planner-{label}", daemon=True)
        self._thread.start()

    def add(self, view: SeqView) -> None:
        self._news.append(replace(view))

    def remove(self, seq_id: int) -> None:
        self._news.append(seq_id)

    def ask(self, state: EngineState, views: Iterable[SeqView]) -> None:
        """Send the question; the one before must have been answered."""
        news, self._news = self._news, []
        self.asked_ns = state.now_ns
        self._questions.put((news, [_facts(view) for view in views], state))

    def answer(self, timeout_s: float) -> Plan | str | None:
        """The plan, or why there is none, in words; None when it has not answered within ``timeout_s``."""
        try:
            found = self._answers.get(timeout=timeout_s) if timeout_s > 0 else self._answers.get_nowait()
        except queue.Empty:
            return None
        self.asked_ns = 0
        return found

    def close(self) -> None:
        """Let the thread end. One that is stuck in Python code is ended by an exception; the engine never waits."""
        self._questions.put(None)
        if self.asked_ns and self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(Orphaned))

    def _run(self) -> None:
        try:
            while (question := self._questions.get()) is not None:
                self._answers.put(self._answered(*question))
                if time.monotonic() - self._published_at >= PUBLISH_S:
                    self.published = publish(self._policy, "scheduler", self._label)
                    self._published_at = time.monotonic()
        except Orphaned:
            return
        except PluginError as error:
            self._answers.put(error.message)  # to the next question

    def _answered(self, *question: Any) -> Plan | str:
        """Whatever it raises is its fault, SystemExit as well: the engine decides what becomes of it."""
        try:
            return self._plan(*question)
        except Orphaned:
            raise
        except PluginError as error:
            return error.message
        except BaseException as error:
            log.error("scheduler '%s' raised", self._label, exc_info=error)  # here: its words are its code as well
            return f"plan() raised {said(error)}"

    def _plan(self, news: list[SeqView | int], facts: list[tuple[Any, ...]], state: EngineState) -> Plan:
        for item in news:
            if isinstance(item, SeqView):
                self._views[item.id] = item
                self._policy.add(item)
            else:
                self._views.pop(item, None)
                self._policy.remove(item)
        for seq_id, *values in facts:
            view = self._views[seq_id]
            for name, value in zip(_CHANGING, values, strict=True):
                setattr(view, name, value)
        return own_plan(self._policy.plan(state))
