"""The generations behind one HTTP request: submitted together, watched, collected or streamed, always cleaned up.

A client that goes away cancels all of them at once. Falcon notices a disconnect only when something is sent or
received, so every group has a watcher: a task that sits in ASGI ``receive``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mullama.engine.client import AsyncGeneration
from mullama.errors import ClientLeft
from mullama.serving.states import Lease
from mullama.types import Delta, Finish, FinishReason, LoraUse, Request
from mullama.web.chat.answer import Answer
from mullama.web.error_responses import finish_error, internal_error
from mullama.web.http.request import Receive, until_disconnect
from mullama.web.keys.rate_limits import Reservation
from mullama.web.openai.fingerprint import fingerprint_of
from mullama.web.openai.schemas import Options
from mullama.web.security import salt_of
from mullama.web.services import Services

log = logging.getLogger(__name__)

TURN_S = 0.002  # that a request has of the event loop at a time

#: A choice and its next text, or None when that choice has ended.
Event = tuple[int, Delta | None]


@dataclass(slots=True, frozen=True)
class Reply:
    """One finished choice."""

    text: str
    finish: Finish
    answer: Answer | None = None  # what was read in the text; None: it is all content

    @property
    def content(self) -> str:
        return self.text if self.answer is None else self.answer.content


class Group:
    """One generation a choice; choice ``prompt * n + i`` is the i-th of its prompt.

    Construct on the event loop, then ``submit``. Call ``close`` in a ``finally``, whatever happened.
    """

    def __init__(
        self,
        services: Services,
        lease: Lease,
        *,
        request_id: str,
        model: str,
        endpoint: str,
        prompts: Sequence[Sequence[int]],
        options: Options,
        arrival_ns: int,
        context_shift: bool = False,
        lora: tuple[LoraUse, ...] = (),
        translate: Callable[[Any], list[int]] | None = None,
        prepared: Any = None,
        reservation: Reservation | None = None,
    ) -> None:
        """Takes over the lease. Nothing is computed before ``submit``."""
        self.id = request_id
        self.model = model
        self.n = options.n
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.disconnected = False
        self.generations: list[AsyncGeneration] = []
        self.answers: list[Answer] | None = None  # one a choice; None: the text of each is its content
        #: What the profile log says of the request beside its profile.
        self.labels: dict[str, Any] = {
            "model": model,
            "endpoint": endpoint,
            "stream": options.stream,
            "user": options.user,
        }
        self._services = services
        self._watcher: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._closed = False
        self._lease = lease
        self._reservation = reservation
        services.n_open += 1
        is_shared = services.config.cache_shared_by_keys
        salt = salt_of(None if is_shared else options.tenant, options.cache_salt)
        num_choices = len(prompts) * options.n
        self._requests = (
            Request(
                id=request_id if num_choices == 1 else f"{request_id}-{index}",
                prompt=prompts[index // options.n],
                sampling=options.of_choice(index % options.n),
                arrival_ns=arrival_ns,
                priority=options.priority,
                user=options.user,
                slo_ms=options.slo_ms,
                preempt=options.preempt,
                cache_salt=salt,
                tenant=options.tenant,
                shares_cache=is_shared and options.tenant is not None,
                context_shift=context_shift,
                lora=lora,
                translate=translate,
                prepared=prepared,
            )
            for index in range(num_choices)
        )

    async def submit(self) -> None:
        """Submit every choice, or none: raises what ``EngineClient.submit`` raises, and is closed then.

        A thousand choices take a while, and others go on meanwhile.
        """
        engine, began = self._lease.engine, time.monotonic()
        try:
            for request in self._requests:
                self.generations.append(engine.submit(request))
                if time.monotonic() - began > TURN_S:
                    await asyncio.sleep(0)
                    began = time.monotonic()
        except BaseException:
            self.close()
            raise

    @property
    def fingerprint(self) -> str:
        """What the answer says of the weights, the build and the ways of computing that it comes from."""
        return fingerprint_of(self._lease.engine.info)

    def watch(self, receive: Receive) -> None:
        """Cancel everything once ``receive`` reports that the client is gone."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        await until_disconnect(receive)
        # NOTE: uvicorn reports the end of the response the same way; cancelling what has ended does no harm.
        self.disconnected = True
        self._services.n_left += any(generation.finish is None for generation in self.generations)
        self.cancel()

    def cancel(self) -> None:
        for generation in self.generations:
            if generation.finish is None:
                generation.cancel()

    async def collect(self) -> list[Reply]:
        """Wait for every choice. Raises the first error among them."""
        replies = []
        # Reading one after the other is enough: what the others produce meanwhile piles up and comes merged.
        for index, generation in enumerate(self.generations):
            text = "".join([delta.text async for delta in generation])
            finish = self.finished(generation)
            answer = None if self.answers is None else self.answers[index]
            if answer is not None:
                await answer.read(text)
                await answer.read(None)
            replies.append(Reply(text, finish, answer))
        return replies

    def finished(self, generation: AsyncGeneration) -> Finish:
        """The finish of a generation that has stopped. Raises its error."""
        finish = generation.finish
        if finish is None:
            log.error("generation %s stopped without a finish", generation.id)
            raise internal_error()
        error = finish_error(finish)
        if error is not None and self.disconnected and finish.reason is FinishReason.CANCELLED:
            raise ClientLeft("the client left before it was answered")
        if error is not None:
            raise error
        return finish

    def close(self) -> None:
        """Stop the watcher, cancel what still runs, log the profiles. Idempotent, never waits."""
        if self._closed:
            return
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
        self.cancel()
        self._lease.release()
        self._services.n_open -= 1
        late = [generation for generation in self.generations if generation.finish is None]
        if late:
            self._settling = asyncio.get_running_loop().create_task(self._settle(late))
            self._services.keep(self._settling)
        else:
            self._end()

    async def _settle(self, late: list[AsyncGeneration]) -> None:
        """A cancelled generation has its profile one step later."""
        for generation in late:
            async for _ in generation:
                pass
        self._end()

    def _end(self) -> None:
        """Every choice has ended."""
        if self._reservation is not None:
            profiles = [finish.profile for finish in self.finishes]
            used = sum(profile.completion_tokens for profile in profiles)
            # Of those that nobody began with, the prompt costs nothing.
            self._reservation.settle(used + sum(self.prompt_lengths) if any(one.steps for one in profiles) else 0)
        self._write_profiles()

    def _write_profiles(self) -> None:
        profile_log = self._services.profile_log
        for generation in self.generations if profile_log is not None else ():
            if profile_log is not None and generation.finish is not None:
                profile_log.write({"id": generation.id, **self.labels}, generation.finish)

    @property
    def finishes(self) -> list[Finish]:
        """Of the choices that have ended."""
        return [generation.finish for generation in self.generations if generation.finish is not None]

    def when_ended(self, then: Callable[[], None]) -> None:
        """Call ``then`` once the closed group's last choice has ended: now, or one step later."""
        if self._settling is None or self._settling.done():
            then()
        else:
            self._settling.add_done_callback(lambda _: then())


class Single:
    """The events of a group with one choice. PERF: no task, no queue."""

    queued: Sequence[Event] = ()

    def __init__(self, generation: AsyncGeneration) -> None:
        self._next = generation.__anext__

    async def next(self) -> list[Event]:
        try:
            return [(0, await self._next())]
        except StopAsyncIteration:
            return [(0, None)]

    def close(self) -> None:
        pass


class Merged:
    """The events of several generations, in the order they arrive; ``next`` hands over all that are there.

    A task a generation moves its deltas to a bounded list; when the client is slow the tasks wait and the
    generations merge what comes. Cancelling ``next`` loses nothing. ``queued`` is what ``next`` would hand over.
    """

    def __init__(self, generations: Sequence[AsyncGeneration]) -> None:
        self.queued: list[Event] = []
        self._limit = 2 * len(generations)
        self._failure: BaseException | None = None
        self._some = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        loop = asyncio.get_running_loop()
        self._pumps = [loop.create_task(self._pump(i, generation)) for i, generation in enumerate(generations)]
        for pump in self._pumps:
            pump.add_done_callback(self._pump_done)

    async def _pump(self, index: int, generation: AsyncGeneration) -> None:
        async for delta in generation:
            self._put((index, delta))
            if not self._room.is_set():
                await self._room.wait()
        self._put((index, None))

    def _pump_done(self, pump: asyncio.Task[None]) -> None:
        if not pump.cancelled() and pump.exception() is not None:
            self._failure = pump.exception()
            self._some.set()

    def _put(self, event: Event) -> None:
        self.queued.append(event)
        self._some.set()
        if len(self.queued) >= self._limit:
            self._room.clear()

    async def next(self) -> list[Event]:
        """Raises what a generation raised."""
        await self._some.wait()
        if self._failure is not None:
            raise self._failure
        events, self.queued = self.queued, []
        self._some.clear()
        self._room.set()
        return events

    def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()


def events_of(group: Group) -> Single | Merged:
    generations = group.generations
    return Single(generations[0]) if len(generations) == 1 else Merged(generations)
