"""What an embedding engine does not have, in the places where other engines have it: nothing, or a refusal in words."""

from __future__ import annotations

from typing import Any, NoReturn

from mullama.engine.client import KvClient, WeightsClient
from mullama.errors import InvalidRequest, NeedsAnotherEngine
from mullama.kv.events import KvEventLog


class NoKv(KvClient):
    """Every method raises InvalidRequest; of events there are none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._events = KvEventLog(1)

    @property
    def events(self) -> KvEventLog:
        return self._events

    async def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise InvalidRequest(f"'{self._name}' makes vectors of texts: it keeps no KV", param="model")

    asnapshot = atree = amap = apin = aunpin = adrop = asave = aload = aset_policy = _refuse


class NoChanges(WeightsClient):
    """Weights that stay what they are: no adapters, no sleep; other weights get an engine of their own."""

    def __init__(self, name: str) -> None:
        self._name = name

    def loras(self) -> list[dict[str, Any]]:
        return []

    def load_lora(self, *_: Any, **__: Any) -> NoReturn:
        """Raises InvalidRequest, as all below."""
        raise self._refusal("takes no LoRA adapters")

    def unload_lora(self, *_: Any, **__: Any) -> NoReturn:
        raise self._refusal("has no LoRA adapters")

    def sleep(self, *_: Any, **__: Any) -> NoReturn:
        raise self._refusal("keeps nothing to sleep on: unload it")

    def texts_for(self, *_: Any, **__: Any) -> NoReturn:
        raise self._refusal("generates nothing that could be compared (kl)")

    def swap(self, *_: Any, **__: Any) -> NoReturn:
        """Raises NeedsAnotherEngine."""
        raise NeedsAnotherEngine(f"'{self._name}' makes vectors of texts")

    def _refusal(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"'{self._name}' makes vectors of texts and {what}", param="model")
