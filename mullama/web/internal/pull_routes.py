"""``POST /internal/models/pull``: fetch a model into the store of this server, with progress as it goes.

The work is done in a thread of its own; the event loop only hears that something changed. Clients that ask for the
same model share one pull, which ends early when the last of them has left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import falcon.asgi
import msgspec
import orjson

from mullama.config import ServeConfig
from mullama.errors import InvalidRequest, MullamaError, ShuttingDown
from mullama.models.parse import parse_spec
from mullama.models.reference import Reference
from mullama.models.resolve import in_quant
from mullama.models.sources.private_addresses import allow_private
from mullama.models.store.background_pulls import Pulls, RunningPull
from mullama.models.store.entry import Entry
from mullama.models.store.store import Store, named
from mullama.web.error_responses import as_mullama_error
from mullama.web.http.request import Receive, Request, on_disconnect
from mullama.web.openai.schemas import decode_body
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access
from mullama.web.services import Services
from mullama.web.stream.event_stream import EVENTS, PING, Bell, Silence, event_json, start_stream

GAP_SECONDS = 0.1  # at least, between two progress events of one stream


class PullBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``model`` is [NAME=]REFERENCE as on the command line."""

    model: str
    quant: str | None = None
    force: bool = False
    stream: bool | None = None


_decoder = msgspec.json.Decoder(PullBody)


class ModelPull:
    access = Access.OPERATOR
    operations = {"POST": Operation("Fetch a model into the store", body=PullBody, streams=EVENTS)}

    def __init__(self, services: Services, store: Store | None = None) -> None:
        self._services = services
        self._config: ServeConfig = services.config
        self._pulls = Pulls(store or Store())

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Fetch a model. Raises InvalidRequest (a local file, a bad name), ReferenceNotFound, StoreError, QueueFull."""
        body = await self._services.parse(req, lambda data: decode_body(_decoder, data))
        allow_private(self._config.allow_private_sources)
        reference = await self._services.offload(True, lambda: self._reference(body))
        watch = Watch(self._pulls, reference, body.force, req.receive)
        streams = body.stream if body.stream is not None else "text/event-stream" in (req.get_header("Accept") or "")
        self._services.end_at_shutdown(watch)
        if streams:
            start_stream(resp, PullStream(watch, self._services.ping_seconds))
            return
        try:
            entry = await watch.result()
            resp.data = orjson.dumps(self._pulls.store.describe(entry, watch.pull.was_there))
        finally:
            watch.close()

    def _reference(self, body: PullBody) -> Reference:
        store = self._pulls.store
        if body.quant:
            spec = in_quant(body.model, parse_spec(body.model, store.lookup), body.quant, store)
        else:
            spec = parse_spec(body.model, store.lookup, quant=self._config.quant or None)
        # SAFETY: what lies on this machine is for those who have a shell on it.
        if spec.reference.is_local:
            raise InvalidRequest(
                "model: a file of the server cannot be pulled, it is used where it lies", param="model"
            )
        return named(spec.reference, spec.name) if spec.name else spec.reference


class Watch:
    """One client's share in a pull. On the event loop."""

    def __init__(self, pulls: Pulls, reference: Reference, force: bool, receive: Receive) -> None:
        """Raises QueueFull."""
        self._changed = Bell()
        self.has_ended = False  # the client left, or the server shuts down
        self.store = pulls.store
        self.pull: RunningPull
        self._leave: Callable[[], None]
        self.pull, self._leave = pulls.start(reference, self._changed.ring, force=force)
        self._watcher = asyncio.ensure_future(on_disconnect(receive, self.end))

    def end(self) -> None:
        """The client left, or the server shuts down. Idempotent."""
        self.has_ended = True
        self._leave()
        self._changed.ring_here()

    async def wait(self) -> None:
        """Until something changed."""
        await self._changed.wait()
        self._changed.clear()

    async def result(self) -> Entry:
        """The entry, when the pull is done. Raises what the pull raised, or ShuttingDown."""
        while not self.pull.is_finished:
            if self.has_ended:
                raise ShuttingDown("the pull was given up: the client left, or the server shuts down", retry_after=1)
            await self.wait()
        return entry_of(self.pull)

    def close(self) -> None:
        """Leave the pull. Idempotent."""
        self.end()
        self._watcher.cancel()


def entry_of(pull: RunningPull) -> Entry:
    """What a finished pull brought. Raises MullamaError."""
    if pull.error is not None:
        raise as_mullama_error(pull.error)
    assert pull.entry is not None
    return pull.entry


class PullStream:
    """The body of a response: ``progress`` events, then ``done`` or ``error``. Falcon closes it in a ``finally``."""

    def __init__(self, watch: Watch, ping_seconds: float) -> None:
        self._watch = watch
        self._silence = Silence(ping_seconds)
        self._said_at = 0.0
        self._speed = Speed()
        self._is_over = False

    def __aiter__(self) -> PullStream:
        return self

    async def __anext__(self) -> bytes:
        watch = self._watch
        while not self._is_over and (watch.pull.is_finished or not watch.has_ended):
            if watch.pull.is_finished:
                self._is_over = True
                return self._ending()
            left = self._said_at + GAP_SECONDS - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
            if not await self._silence.broken_by(watch.wait()):
                return PING
            if not watch.pull.is_finished and not watch.has_ended:
                self._said_at = time.monotonic()
                return self._progress()
        raise StopAsyncIteration

    def _progress(self) -> bytes:
        state = self._watch.pull.state
        speed = self._speed.of(state.step, state.done, self._said_at)
        left = (state.total - state.done) / speed if speed and state.total is not None else None
        fields = {
            "step": state.step,
            "done": state.done,
            "total": state.total,
            "bytes_per_second": None if speed is None else round(speed),
            "seconds_left": None if left is None else round(left, 1),
        }
        return _event("progress", fields)

    def _ending(self) -> bytes:
        try:
            entry = entry_of(self._watch.pull)
        except MullamaError as error:
            return _event("error", error.to_openai())
        return _event("done", self._watch.store.describe(entry, self._watch.pull.was_there))

    async def close(self) -> None:
        """Leave the pull. Idempotent."""
        self._silence.close()
        self._watch.close()


class Speed:
    """Bytes a second over a step, smoothed."""

    def __init__(self) -> None:
        self._step = ""
        self._last: tuple[float, int] = (0.0, 0)
        self._speed: float | None = None

    def of(self, step: str, done: int, now: float) -> float | None:
        """Tell how far the step is at ``now`` (seconds); the speed, once there is one."""
        if step != self._step or done < self._last[1]:
            self._step, self._last, self._speed = step, (now, done), None
            return None
        seconds = now - self._last[0]
        if seconds > 0:
            fresh = (done - self._last[1]) / seconds
            self._speed = fresh if self._speed is None else 0.7 * self._speed + 0.3 * fresh
            self._last = (now, done)
        return self._speed


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), event_json(fields))
