"""Loading on demand: one model at a time, in the order in which they were wanted first."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from mullama.engine.client import EngineClient
from mullama.errors import (
    AdapterLost,
    LoadCancelled,
    MemoryTooSmall,
    ModelBusy,
    ModelNotLoaded,
    ShuttingDown,
)
from mullama.serving.model_eviction import Evictor
from mullama.serving.served_models import ServedModels
from mullama.serving.sleepers import Sleepers
from mullama.serving.states import Load, ModelState, Served

log = logging.getLogger(__name__)

#: Load a model: (name, reference, progress) -> engine. Blocks; runs in a thread. ``progress`` returns False to cancel.
Loader = Callable[[str, str, Callable[[float], bool]], EngineClient]


class Loads:
    """The queue of models that are wanted, and the task that loads or wakes them. Event loop only, but for ``close``.

    ``load`` is None where nothing is loaded here. ``estimate`` guesses the bytes that a reference will take; it blocks.
    """

    def __init__(
        self,
        models: ServedModels,
        sleepers: Sleepers,
        evictor: Evictor,
        load: Loader | None,
        estimate: Callable[[str], int | None],
    ) -> None:
        self.load = load
        self._models = models
        self._sleepers = sleepers
        self._evictor = evictor
        self._estimate = estimate
        self._wanted: list[Served] = []
        self._worker: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._arriving: list[EngineClient] = []  # loaded by a thread, and not taken over by the loop yet

    @property
    def is_idle(self) -> bool:
        return self._worker is None or self._worker.done()

    def want(self, served: Served) -> None:
        """Somebody waits for it."""
        if served not in self._wanted:
            self._wanted.append(served)
        if self.is_idle:
            self._worker = asyncio.get_running_loop().create_task(self._work())
        self._models.changed.set()

    def close(self) -> None:
        """Close what a thread has loaded and nobody will take over. Idempotent; the loop has ended."""
        with self._lock:
            self._is_closed = True
            arriving, self._arriving = self._arriving, []
        for engine in arriving:
            engine.close()

    async def _work(self) -> None:
        while self._wanted:
            served = self._wanted[0]
            try:
                if served.resident is None and served.waiters:  # else all who wanted it have left
                    await self._bring(served)
                elif served.resident is not None and served.state is ModelState.READY:
                    self._models.answer(served)
                # One that is being unloaded is wanted again when that is done: unload sees to it.
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._fail(served, error)
            finally:
                if served in self._wanted:
                    self._wanted.remove(served)
                is_down = served.state in (ModelState.UNLOADED, ModelState.ASLEEP)
                if served.waiters and is_down and not self._models.is_ending:
                    self._wanted.append(served)  # they came after the load had been given up

    async def _bring(self, served: Served) -> None:
        """Find memory and load. Raises what the loader raised."""
        if served.falling is not None:
            await asyncio.wait({served.falling.task})
            if served.resident is not None:  # it does not sleep after all
                self._models.answer(served)
                return
        if self.load is None and served.asleep is None:
            raise ModelNotLoaded(f"'{served.name}' is not loaded, and nothing here loads models", param="model")
        expected: int | None = await asyncio.to_thread(self._estimate, served.reference)
        served.n_bytes = expected or served.n_bytes
        await self._evictor.make_memory(served)
        if self._models.is_ending:
            raise ShuttingDown("the server is shutting down", retry_after=5)
        if not served.waiters:
            return  # all who wanted it have left
        served.move(ModelState.WAKING if served.asleep is not None else ModelState.LOADING)
        load = served.load = Load()
        try:
            await self._load(served, load)
        except Exception as error:
            if not load.is_unwanted:
                raise
            served.move(ModelState.ASLEEP if served.asleep is not None else ModelState.UNLOADED)
            served.error = None
            log.info("%s", error)  # who waited has been told
        finally:
            served.load = None
            load.over.set()

    async def _load(self, served: Served, load: Load) -> None:
        began = self._models.clock()
        while True:
            try:
                engine = await self._sleepers.wake(served)
                if engine is None:
                    engine = await self._load_anew(served, load)
                break
            except MemoryTooSmall as error:
                if load.is_unwanted or not await self._evictor.free_memory(served, error.missing):
                    raise
        if self._models.is_ending:
            await asyncio.to_thread(engine.close)
            raise ShuttingDown("the server is shutting down", retry_after=5)
        if load.is_unwanted:
            served.asleep = None
            await asyncio.to_thread(engine.close)
            raise LoadCancelled(f"'{served.name}' was unloaded while it was being loaded")
        self._models.install(served, engine)
        log.info("%s: loaded in %.2f s", served.name, self._models.clock() - began)
        self._models.answer(served)

    async def _load_anew(self, served: Served, load: Load) -> EngineClient:
        loader = self.load
        if loader is None:
            raise ModelNotLoaded(f"'{served.name}' could not be woken, and nothing here loads models", param="model")
        engine = await asyncio.to_thread(self._load_now, loader, served, load)
        self._arriving.remove(engine)
        return engine

    def _load_now(self, loader: Loader, served: Served, load: Load) -> EngineClient:
        """In a thread, which may outlive the loop that asked: then ``close`` closes the engine, or it is done here."""
        engine = loader(served.name, served.reference, lambda fraction: not load.is_unwanted)
        with self._lock:
            if not self._is_closed:
                self._arriving.append(engine)
                return engine
        engine.close()
        raise ShuttingDown("the server is shutting down", retry_after=5)

    def _fail(self, served: Served, error: Exception) -> None:
        if served.resident is None:
            # That there is no memory now says nothing of the model.
            is_ours = isinstance(error, ModelBusy | MemoryTooSmall | AdapterLost | ShuttingDown)
            if not is_ours:
                served.failures.note(error, self._models.clock())
            if served.asleep is not None:
                served.move(ModelState.ASLEEP)
            else:
                served.move(ModelState.UNLOADED if is_ours else ModelState.FAILED)
            served.error = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        log.warning("%s could not be loaded: %s", served.name, error)
        self._models.refuse(served, error)
