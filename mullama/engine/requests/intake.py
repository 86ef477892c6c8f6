"""The way in: what a request may ask is checked, and it is queued for the engine thread. Any thread."""

from __future__ import annotations

import time

from mullama._core import Sampling
from mullama.engine.parts import EngineParts
from mullama.engine.requests.generation import BaseGeneration
from mullama.engine.requests.sequences import LiveSequence
from mullama.engine.weights.loras import namespace_of_chosen
from mullama.errors import ContextLengthExceeded, InvalidRequest, ModelNotLoaded, QueueFull
from mullama.kv.index.tree import pack
from mullama.scheduling import SeqView
from mullama.types import LoraUse, Request, SamplingParams, SeqState


class Intake:
    """Checks requests and queues them."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts

    def prepare(self, sampling: SamplingParams) -> Sampling:
        """What is dear about opening a request, done ahead (see EngineClient.prepare)."""
        return Sampling(self._parts.model, sampling)

    def check(self, request: Request) -> Sampling:
        """Its sampling parameters, worked out. Raises InvalidRequest, ContextLengthExceeded."""
        info, n = self._parts.info, len(request.prompt)
        if n == 0:
            raise InvalidRequest("the prompt is empty: it must have at least one token", param="prompt")
        if n > info.n_ctx - 1:
            raise self.too_long(n)
        if min(request.prompt) < 0 or max(request.prompt) >= info.n_vocab:
            raise InvalidRequest(f"a token id is outside the vocabulary (0 to {info.n_vocab - 1})", param="prompt")
        if request.context_shift and not info.can_shift:
            raise InvalidRequest(f"'{info.name}' cannot shift its context", param="context_policy")
        _check_fields(request)
        if isinstance(request.prepared, Sampling) and request.prepared.model is self._parts.model:
            return request.prepared
        return self.prepare(request.sampling)

    def too_long(self, n: int, *, at_least: bool = False) -> ContextLengthExceeded:
        """What is raised for a prompt of ``n`` tokens."""
        most = self._parts.info.n_ctx
        return ContextLengthExceeded(
            f"the prompt has {'at least ' if at_least else ''}{n} tokens; one request may use {most}, "
            "completion included",
            param="prompt",
            n_tokens=n,
        )

    def enqueue(self, request: Request, generation: BaseGeneration) -> None:
        """Hand a request to the engine thread. Raises what EngineClient.submit says."""
        parts, commands = self._parts, self._parts.commands
        prepared = self.check(request)
        view = SeqView(
            id=generation.handle,
            state=SeqState.WAITING,
            prompt_tokens=len(request.prompt),
            prefill_left=len(request.prompt),
            max_tokens=self._max_tokens(request),
            arrival_ns=request.arrival_ns or time.monotonic_ns(),
            priority=request.priority,
            user=request.user,
            slo_ms=request.slo_ms,
            preempt=request.preempt,
            state_ns=time.monotonic_ns(),
        )
        seq = LiveSequence(view, request, key=pack(request.prompt), prepared=prepared)
        with commands.lock:
            commands.check_alive()
            if parts.takes_none:
                raise ModelNotLoaded(f"'{parts.info.name}' is asleep; wake it first", param="model")
            # A request that a slot is free for does not wait.
            n_waiting = parts.n_waiting
            if n_waiting >= parts.config.max_queue + parts.seqs.slots.count(0):
                raise QueueFull(
                    f"{n_waiting} requests are waiting, the limit is {parts.config.max_queue}", retry_after=1
                )
            seq.adapters = chosen = parts.loras.choose(request.lora)
            seq.namespace = namespace_of_chosen(request.cache_salt, chosen)
            parts.n_posted += 1
            uses = tuple(LoraUse(one.id, scale) for one, scale in chosen)
            parts.reader.add(generation, request.sampling.stop, uses)
            commands.post(lambda: self._add(seq))

    def _max_tokens(self, request: Request) -> int:
        """Tokens that a request may generate: what its context holds; one that shifts, what it asks for, or a context's
        worth where it does not say."""
        asked, n_ctx = request.sampling.max_tokens, self._parts.info.n_ctx
        if request.context_shift:
            return asked or n_ctx
        left = n_ctx - len(request.prompt)
        return min(asked or left, left)

    def _add(self, seq: LiveSequence) -> None:
        """Engine thread."""
        parts = self._parts
        with parts.commands.lock:
            parts.n_posted -= 1
            parts.seqs.add(seq)
        parts.policy.arrived(seq.view)


def _check_fields(request: Request) -> None:
    """What a policy and the page are told of a request. Raises InvalidRequest."""
    priority, user, slo_ms = request.priority, request.user, request.slo_ms
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(1 << 31) <= priority < 1 << 31:
        raise InvalidRequest(
            f"priority must be a whole number from {-(1 << 31)} to {(1 << 31) - 1}, got {priority!r}", param="priority"
        )
    if user is not None and not isinstance(user, str):
        raise InvalidRequest(f"user must be a text, got {user!r}", param="user")
    if slo_ms is not None and (isinstance(slo_ms, bool) or not isinstance(slo_ms, int | float) or not slo_ms > 0):
        raise InvalidRequest(f"slo_ms must be a number of milliseconds above 0, got {slo_ms!r}", param="slo_ms")
