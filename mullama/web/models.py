"""The registry of served models: the name clients use -> its engine, in the order they were given."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from mullama.engine.client import EngineClient
from mullama.errors import ConfigError, ModelNotFound


class Models:
    """Served models in order; the first one answers requests that name no model.

    Reads may come from any thread; ``add`` belongs to the start of the server.
    """

    def __init__(self, engines: Iterable[tuple[str, EngineClient]] = ()) -> None:
        self._engines: dict[str, EngineClient] = {}
        for name, engine in engines:
            self.add(name, engine)

    def __len__(self) -> int:
        return len(self._engines)

    def add(self, name: str, engine: EngineClient) -> None:
        """Serve ``engine`` as ``name``. Raises ConfigError when the name is taken."""
        if name in self._engines:
            raise ConfigError(f"two models are served as '{name}'; give one another name with NAME=REFERENCE")
        self._engines[name] = engine

    def items(self) -> list[tuple[str, EngineClient]]:
        return list(self._engines.items())

    def resolve(self, name: str | None) -> tuple[str, EngineClient]:
        """The served name and engine of ``name``, or the first model when it is None. Raises ModelNotFound."""
        if name is None:
            for first in self._engines.items():
                return first
            raise ModelNotFound("no model is served", param="model")
        for candidate in (name, name.lower()):
            engine = self._engines.get(candidate)
            if engine is not None:
                return candidate, engine
        served = ", ".join(self._engines) or "none"
        raise ModelNotFound(f"the model '{name}' is not served here; served models: {served}", param="model")

    @property
    def ready(self) -> bool:
        """At least one model, and every one of them is loaded and makes progress."""
        return bool(self._engines) and all(engine.is_ready() for engine in self._engines.values())

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests on every engine and wait up to ``seconds``. True: no request was cut."""
        return all(await asyncio.gather(*(engine.drain(seconds) for engine in self._engines.values())))

    def close(self) -> None:
        """Stop every engine. Idempotent."""
        for engine in self._engines.values():
            engine.close()
