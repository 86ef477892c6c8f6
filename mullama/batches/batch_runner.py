"""Runs batches: line by line, a few at a time, behind everybody who waits for an answer. Event loop only.

Laws:

1. A line that is done is written before it counts; a batch that is begun again leaves out what is written.
2. The server's end interrupts batches, and the next one goes on with them: nobody waits for their lines.
3. A full disk holds a batch up and loses nothing: its answers wait until they can be written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from mullama.batches.batch_files import UNFINISHED, Batch, Line, Status, check_lines, finished_lines, read_line
from mullama.batches.file_store import PART, FileStore, StoredFile, write_whole
from mullama.errors import FilesError, InvalidRequest, MullamaError, NotFound, QueueFull

log = logging.getLogger(__name__)

MAX_UNFINISHED = 64  # batches of one tenant
MAX_FINISHED = 1000  # that are remembered
#: What a request is told to be in a batch, for policies that know priorities: lower is more urgent.
PRIORITY = b'"priority":2147483647'
LOOK_S = 0.02  # between two looks for room
RETRY_S = 30.0  # at most, before a line that was refused for the moment, or a write, is tried again
AHEAD = 64  # lines read at a time

_decoder = msgspec.json.Decoder(Batch)


@dataclass(slots=True, frozen=True)
class Answer:
    """``body`` is JSON. ``retry_after``: seconds, of one that asks to come again."""

    status: int
    body: bytes
    request_id: str
    retry_after: float | None = None


#: Asks for a tenant: (tenant, endpoint, body) to what a client would have been answered.
Ask = Callable[[str | None, str, bytes], Awaitable[Answer]]


class Gate:
    """Lets a few lines through at a time, as long as ``has_room`` (given how many there are) says so; in turns."""

    def __init__(self, has_room: Callable[[int], bool]) -> None:
        self._has_room = has_room
        self._turn = asyncio.Lock()
        self.n = 0

    async def enter(self, is_over: Callable[[], bool]) -> bool:
        """Wait for room; False: it is over, and nobody entered."""
        async with self._turn:
            while not is_over():
                if self._has_room(self.n):
                    self.n += 1
                    return True
                await asyncio.sleep(LOOK_S)
        return False

    def leave(self) -> None:
        self.n -= 1


@dataclass(slots=True, eq=False)
class Run:
    """A batch that goes on."""

    batch: Batch
    task: asyncio.Task[None] | None = None
    lines: set[asyncio.Task[None]] = field(default_factory=set)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_cancelled: bool = False


class BatchRunner:
    def __init__(self, store: FileStore, ask: Ask, has_room: Callable[[int], bool]) -> None:
        self.store = store
        self._ask = ask
        self._has_room = has_room
        self._gate: Gate | None = None
        self._batches: dict[str, Batch] | None = None
        self._runs: dict[str, Run] = {}
        self._opening = asyncio.Lock()
        self._is_stopping = False

    # -- what there is

    async def open(self) -> dict[str, Batch]:
        """All batches, with those going on that a server left unfinished. Raises FilesError."""
        async with self._opening:
            if self._batches is None:
                self._batches = await asyncio.to_thread(self._read)
                for batch in self._batches.values():
                    if batch.status in UNFINISHED:
                        self._begin(batch)
        return self._batches

    async def resume(self) -> None:
        """At the start of a server: go on with what another one left, if there is anything."""
        if self.store.is_there:
            try:
                await self.open()
            except FilesError as error:
                log.warning("batches do not go on: %s", error.message)

    def _read(self) -> dict[str, Batch]:
        found = {}
        for path in sorted(self.store.open().glob("batch_*.json")):
            try:
                batch = _decoder.decode(path.read_bytes())
            except (OSError, msgspec.MsgspecError) as error:
                log.warning("%s is not read: %s", path, error)
                continue
            found[batch.id] = batch
        return found

    async def get(self, batch_id: str, tenant: str | None) -> Batch:
        """Raises NotFound, also for another tenant's, and FilesError."""
        batch = (await self.open()).get(batch_id)
        if batch is None or batch.tenant != tenant:
            raise NotFound(f"there is no batch '{batch_id[:80]}'", param="batch_id")
        return batch

    async def of_tenant(self, tenant: str | None) -> list[Batch]:
        """The oldest first. Raises FilesError."""
        found = [one for one in (await self.open()).values() if one.tenant == tenant]
        return sorted(found, key=lambda one: one.created_at)

    # -- new ones, and their end

    async def create(
        self,
        tenant: str | None,
        endpoint: str,
        file_id: str,
        window: str,
        window_s: float,
        metadata: dict[str, str] | None,
    ) -> Batch:
        """Raises NotFound for the file, QueueFull, FilesError."""
        batches = await self.open()
        if sum(one.tenant == tenant and one.status in UNFINISHED for one in batches.values()) >= MAX_UNFINISHED:
            raise QueueFull(f"{MAX_UNFINISHED} batches are unfinished already", retry_after=60)
        self.store.get(file_id, tenant)
        for old in [one for one in await self.of_tenant(tenant) if one.status not in UNFINISHED][:-MAX_FINISHED]:
            await asyncio.to_thread(self._path(old, ".json").unlink, missing_ok=True)
            batches.pop(old.id, None)
        now = int(time.time())
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            tenant=tenant,
            endpoint=endpoint,
            input_file_id=file_id,
            completion_window=window,
            created_at=now,
            expires_at=now + int(window_s),
            metadata=metadata,
        )
        await asyncio.to_thread(self._save, batch)
        batches[batch.id] = batch
        self._begin(batch)
        return batch

    async def cancel(self, batch_id: str, tenant: str | None) -> Batch:
        """Raises NotFound, FilesError, and InvalidRequest for one that has ended."""
        batch = await self.get(batch_id, tenant)
        run = self._runs.get(batch.id)
        if run is None or batch.status not in UNFINISHED:
            raise InvalidRequest(f"the batch is {batch.status}; there is nothing to cancel", param="batch_id")
        if batch.status != "finalizing" and not run.is_cancelled:
            run.is_cancelled = True
            await self._move(batch, "cancelling")
            for line in list(run.lines):
                line.cancel()
        return batch

    def stop(self) -> None:
        """The server ends: what runs is given up, and stays unfinished. Idempotent."""
        self._is_stopping = True
        for run in list(self._runs.values()):
            for task in (run.task, *run.lines):
                if task is not None:
                    task.cancel()

    async def stopped(self) -> None:
        """Wait until what ``stop`` has cancelled is over."""
        tasks = [task for run in self._runs.values() for task in (run.task, *run.lines) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.store.close)

    # -- one batch

    def _begin(self, batch: Batch) -> None:
        if self._is_stopping:
            return
        run = self._runs[batch.id] = Run(batch, is_cancelled=batch.status == "cancelling")
        run.task = asyncio.get_running_loop().create_task(self._run(run))

    async def _run(self, run: Run) -> None:
        batch = run.batch
        try:
            await self._work(run)
        except Exception as error:
            is_told = isinstance(error, MullamaError)
            log.warning("batch %s has failed: %s", batch.id, error, exc_info=not is_told)
            message = str(error) if is_told else "internal error; the server's log has the details"
            batch.errors.append({"code": "server_error", "message": message, "param": None, "line": None})
            await self._keep_results(batch)
            await self._move(batch, "failed")
        finally:
            self._runs.pop(batch.id, None)

    async def _work(self, run: Run) -> None:
        batch = run.batch
        path = self.store.path_of(self.store.get(batch.input_file_id, batch.tenant))
        if batch.status == "validating":
            batch.total, batch.errors = await asyncio.to_thread(check_lines, path, batch.endpoint)
            await self._move(batch, "failed" if batch.errors else "in_progress")
            if batch.errors:
                return
        done = await asyncio.to_thread(self._done, batch)
        if batch.status in ("in_progress", "cancelling"):
            try:
                await self._feed(run, path, done)
                await asyncio.gather(*run.lines, return_exceptions=True)
            finally:
                for line in run.lines:
                    line.cancel()
        if self._is_stopping:
            return
        end: Status = "cancelled" if run.is_cancelled else "completed"
        if not run.is_cancelled and batch.completed + batch.failed < batch.total:
            end = "expired"
            await self._expire(run, path)
        if end == "completed":
            await self._move(batch, "finalizing")
        await self._keep_results(batch)
        await self._move(batch, end)

    async def _feed(self, run: Run, path: Path, done: set[str]) -> None:
        """Begin a task for each line, as there is room."""
        batch = run.batch
        self._gate = self._gate or Gate(self._has_room)
        with path.open("rb") as file:
            while lines := await asyncio.to_thread(_read_lines, file):
                for line in lines:
                    if line.custom_id in done:
                        continue
                    if not await self._gate.enter(lambda: run.is_cancelled or time.time() >= batch.expires_at):
                        return
                    task = asyncio.get_running_loop().create_task(self._answer(run, line))
                    run.lines.add(task)
                    task.add_done_callback(partial(self._answered, run))

    def _answered(self, run: Run, task: asyncio.Task[None]) -> None:
        run.lines.discard(task)
        if self._gate is not None:
            self._gate.leave()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a line of batch %s has failed", run.batch.id, exc_info=error)

    async def _answer(self, run: Run, line: Line) -> None:
        batch, pause = run.batch, 1.0
        while True:
            answer = await self._ask(batch.tenant, batch.endpoint, _with_priority(bytes(line.body)))
            if answer.status not in (429, 503):
                break
            await asyncio.sleep(min(answer.retry_after or pause, RETRY_S))
            pause = min(2 * pause, RETRY_S)
        response = {"status_code": answer.status, "request_id": answer.request_id, "body": msgspec.Raw(answer.body)}
        await self._write(run, line.custom_id, response, None)

    async def _expire(self, run: Run, path: Path) -> None:
        """What is not answered by now never will be, and its error says so."""
        done = await asyncio.to_thread(self._done, run.batch)
        error = {"code": "batch_expired", "message": "the batch's time was over before this request was answered"}
        with path.open("rb") as file:
            while lines := await asyncio.to_thread(_read_lines, file):
                for line in lines:
                    if line.custom_id not in done:
                        await self._write(run, line.custom_id, None, error)

    # -- on disk

    def _path(self, batch: Batch, what: str) -> Path:
        return self.store.open() / f"{batch.id}{what}"

    def _save(self, batch: Batch) -> None:
        try:
            write_whole(self._path(batch, ".json"), msgspec.json.encode(batch))
        except OSError as error:
            raise FilesError(f"cannot keep the batch: {error.strerror}") from error

    async def _move(self, batch: Batch, status: Status) -> None:
        """Another state, here and on disk; a disk that is full is waited for."""
        batch.move(status)
        await self._insist(partial(self._save, batch))

    def _done(self, batch: Batch) -> set[str]:
        """The lines that are written, and counted. Raises OSError."""
        answers = set(finished_lines(self._path(batch, f".output{PART}")))
        errors = set(finished_lines(self._path(batch, f".errors{PART}")))
        batch.completed, batch.failed = len(answers), len(errors)
        return answers | errors

    async def _write(
        self, run: Run, custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None
    ) -> None:
        batch = run.batch
        is_good = response is not None and response["status_code"] < 400
        entry = {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        data = msgspec.json.encode(entry) + b"\n"
        async with run.writing:
            path = self._path(batch, f".output{PART}" if is_good else f".errors{PART}")
            await self._insist(partial(_append, path, data))
            batch.completed += is_good
            batch.failed += not is_good

    async def _keep_results(self, batch: Batch) -> None:
        """What grew line by line becomes files of the tenant."""

        def keep(what: str) -> StoredFile | None:
            part = self._path(batch, f".{what}{PART}")
            return (
                self.store.keep(part, batch.tenant, f"{batch.id}_{what}.jsonl", "batch_output")
                if part.exists()
                else None
            )

        for what, name in (("output", "output_file_id"), ("errors", "error_file_id")):
            kept = await self._insist(partial(keep, what))
            if kept is not None:
                setattr(batch, name, kept.id)

    async def _insist(self, write: Callable[[], Any]) -> Any:
        """Do it in a thread, again and again until the disk takes it."""
        pause = 1.0
        while True:
            try:
                return await asyncio.to_thread(write)
            except (FilesError, OSError) as error:
                log.warning("a batch waits for the disk: %s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_S)


def _read_lines(file: BinaryIO) -> list[Line]:
    """The next lines, which were checked before."""
    while lines := list(islice(file, AHEAD)):
        found = [read_line(data) for data in lines if data.strip()]
        if found:
            return found
    return []


def _append(path: Path, data: bytes) -> None:
    """Add a whole line or nothing. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            n = file.write(data)
            if n != len(data):
                raise OSError(28, "no room for the whole line")
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _with_priority(body: bytes) -> bytes:
    """The same object with a priority behind everybody's; it comes last, and so it counts."""
    inside = body.strip()[1:-1].strip()
    return b"{" + inside + (b"," if inside else b"") + PRIORITY + b"}"
