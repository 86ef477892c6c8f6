"""The LoRA adapters of an engine: loaded beside the weights, chosen by requests, unloaded when nobody uses them.

A request names adapters when it is submitted, and has them until it ends. Loading and unloading happen while others
are answered, one at a time, and never while the weights are being changed. Other weights get the same adapters, and
requests go on with theirs: ``twins`` and ``take_over``, or ``unload_all`` and ``load_all`` where the old weights go
first.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mullama._core import Adapter, Core, Model
from mullama.errors import (
    AdapterBusy,
    AdapterLost,
    AdapterMismatch,
    AdapterNotFound,
    BadModelFile,
    ConfigError,
    InvalidRequest,
    ModelBusy,
    ModelLoadError,
    no_adapter,
)
from mullama.files import counted
from mullama.home import expand
from mullama.kv.index.namespaces import adapters_key
from mullama.kv.index.tree import namespace_of
from mullama.models.files.lora_file import AdapterFacts, check_adapter
from mullama.models.store.digests import digest_of
from mullama.types import LoraUse

if TYPE_CHECKING:
    from mullama.engine.weights.in_charge import Weights

log = logging.getLogger("mullama.engine")

MAX_SCALE = 1000.0
MAX_IN_REQUEST = 16
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
ID_RULE = "1 to 64 letters, digits, dots, colons, dashes and underscores, the first a letter or a digit"


@dataclass(slots=True, eq=False)
class LoadedLora:
    """An adapter on the model. ``n_requests`` is changed under the engine's lock."""

    id: str
    path: Path
    scale: float  # where a request names none
    facts: AdapterFacts
    native: Adapter
    n_requests: int = 0  # that have not ended

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "path": str(self.path),
            "scale": self.scale,
            "name": self.facts.name,
            "rank": self.facts.rank,
            "alpha": self.facts.alpha,
            "n_matrices": self.facts.n_matrices,
            "sha256": self.facts.digest,
            "size_bytes": self.native.n_bytes,
            "requests": self.n_requests,
        }


#: What computes a sequence beside the weights.
Chosen = tuple[tuple[LoadedLora, float], ...]

#: Adapters with what they are on another model.
Twins = list[tuple[LoadedLora, Adapter]]


def check_id(text: str) -> str:
    """Raises InvalidRequest for what is no id of an adapter."""
    if not ID.fullmatch(text):
        raise InvalidRequest(f"id: '{text[:80]}' is not the id of an adapter; it must be {ID_RULE}", param="id")
    return text


def check_scale(scale: float, param: str = "scale") -> float:
    """Raises InvalidRequest for a scale that no adapter has."""
    if isinstance(scale, bool) or not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise InvalidRequest(
            f"{param}: the scale of an adapter must be a number of {-MAX_SCALE:g} to {MAX_SCALE:g}", param=param
        )
    return float(scale)


def id_of(path: Path) -> str:
    """The id that an adapter gets from its file's name."""
    return re.sub(r"[^A-Za-z0-9._:-]+", "-", path.stem).lstrip("._:-")[:64] or "adapter"


class Loras:
    """By id. ``lock`` is the engine's: what is submitted under it comes before what is called afterwards."""

    def __init__(self, core: Core, weights: Weights, lock: threading.Condition) -> None:
        self._core = core
        self._weights = weights
        self._lock = lock
        self._one = threading.Lock()  # a load or an unload at a time
        self._loaded: dict[str, LoadedLora] = {}
        self._closed = False

    def all(self) -> list[LoadedLora]:
        with self._lock:
            return list(self._loaded.values())

    # -- requests -------------------------------------------------------------------------------------------------

    def choose(self, uses: tuple[LoraUse, ...]) -> Chosen:
        """What a request names, in use until ``ended``; under the engine's lock. Raises InvalidRequest."""
        if len(uses) > MAX_IN_REQUEST:
            raise InvalidRequest(f"lora: at most {MAX_IN_REQUEST} adapters can be used at once", param="lora")
        chosen: dict[str, tuple[LoadedLora, float]] = {}
        for use in uses:
            one = self._loaded.get(use.id)
            if one is None:
                raise InvalidRequest(f"lora: {no_adapter(use.id, self._loaded)}", param="lora")
            if use.id in chosen:
                raise InvalidRequest(f"lora: the adapter '{use.id}' is named twice", param="lora")
            chosen[use.id] = (one, one.scale if use.scale is None else check_scale(use.scale, "lora"))
        for one, _ in chosen.values():
            one.n_requests += 1
        return tuple(chosen.values())

    def ended(self, chosen: Chosen) -> None:
        """A sequence needs its adapters no more."""
        if chosen:
            with self._lock:
                for one, _ in chosen:
                    one.n_requests -= 1

    # -- changes of the weights; who makes one has them (Weights.held) -------------------------------------------------

    def check_on(self, path: str | Path) -> None:
        """See that all can be laid on the model of another file, too. Blocks.

        Raises ModelBusy for one that is not of such a model, BadModelFile for one that has gone or changed.
        """
        for one in self.all():
            try:
                facts = check_adapter(one.path, path)
            except AdapterMismatch as error:
                raise ModelBusy(
                    f"the LoRA adapter '{one.id}' does not fit the new weights ({error.message}); unload it first",
                    param="to",
                ) from None
            if facts.digest != one.facts.digest:
                raise BadModelFile(f"{one.path}: the file of the adapter '{one.id}' has changed", param="to")

    def twins(self, model: Model) -> Twins:
        """All of them loaded onto another model as well, for ``take_over``. Raises BadModelFile: then none is."""
        found: Twins = []
        try:
            for one in self.all():
                found.append((one, _load(model, one.path, one.facts)))
        except BaseException:
            close_twins(found)
            raise
        return found

    def take_over(self, twins: Twins) -> None:
        """Go on with the twins, whose model is in charge now; they are the old ones then. Engine thread."""
        for one, twin in twins:
            one.native.exchange(twin)

    def unload_all(self) -> None:
        """Free what lies on a model that is to go, after its context; the ids stay. Engine thread."""
        for one in self.all():
            one.native.leave()

    def load_all(self, model: Model) -> None:
        """Load all again, onto this model. Raises AdapterLost: then none is. Engine thread."""
        try:
            twins = self.twins(model)
        except BadModelFile as error:
            raise AdapterLost(error.message, param="lora") from None
        self.take_over(twins)
        close_twins(twins)

    # -- loading --------------------------------------------------------------------------------------------------

    def load(self, path: str | Path, name: str | None, scale: float) -> LoadedLora:
        """Check a file and load it. Blocks; not on the engine thread.

        Raises InvalidRequest (id, scale), ModelBusy (the weights are being changed), AdapterMismatch, BadModelFile.
        """
        path = Path(path)
        name, scale = check_id(id_of(path) if name is None else name), check_scale(scale)
        with self._one, self._weights.held():
            if name in self._loaded:
                raise InvalidRequest(f"id: an adapter '{name}' is loaded already; unload it first", param="id")
            model = self._core.model
            facts = check_adapter(path, model.path)
            one = LoadedLora(name, path, scale, facts, _load(model, path, facts))
            with self._lock:
                if not self._closed:
                    self._loaded[name] = one
                    return one
            one.native.close()
            raise ModelBusy("the model was closed meanwhile")

    def load_configured(self, specs: list[str]) -> None:
        """Load those of ``NAME=PATH`` that are of this model. Raises ConfigError, BadModelFile."""
        for spec in specs:
            name, separator, path = spec.partition("=")
            if not separator or not path or not ID.fullmatch(name):
                raise ConfigError(f"lora: '{spec}' is not NAME=PATH; NAME is {ID_RULE}")
            try:
                self.load(expand(path), name, 1.0)
            except AdapterMismatch as error:
                log.warning("the adapter '%s' is not loaded onto %s: %s", name, self._core.model.path, error.message)

    def unload(self, name: str, call: Callable[[Callable[[], None]], Future[None]]) -> None:
        """Free an adapter. Blocks; not on the engine thread. Raises AdapterNotFound, AdapterBusy, ModelBusy."""
        with self._one, self._weights.held():
            call(lambda: self._release(name)).result()

    def _release(self, name: str) -> None:
        """On the engine thread, between two steps."""
        with self._lock:
            one = self._loaded.get(name)
            if one is None:
                raise AdapterNotFound(no_adapter(name, self._loaded), param="id")
            if one.n_requests:
                raise AdapterBusy(
                    f"the adapter '{name}' is used by {counted(one.n_requests, 'request')} now",
                    param="id",
                    retry_after=1,
                )
            del self._loaded[name]
        if not self._core.is_vacant:
            self._core.drop_adapters()
        one.native.close()

    def close(self) -> None:
        """Free all, after the core was closed and sequences have let go of them."""
        with self._one, self._lock:
            self._closed = True
            loaded, self._loaded = list(self._loaded.values()), {}
        for one in loaded:
            one.native.close()


def namespace_of_chosen(salt: str, chosen: Chosen) -> bytes:
    """Where KV belongs that these adapters compute, of prompts with this ``cache_salt``."""
    return namespace_of(salt, adapters_key((one.facts.digest, scale) for one, scale in chosen))


def close_twins(twins: Twins) -> None:
    """Free the twins, whichever of the two they are."""
    for _, twin in twins:
        twin.close()


def _load(model: Model, path: Path, facts: AdapterFacts) -> Adapter:
    """The checked file on the model. Raises BadModelFile."""
    try:
        native = Adapter(model, path)
    except ModelLoadError as error:
        raise BadModelFile(error.message, param="path") from None
    if digest_of(path) != facts.digest:
        native.close()
        raise BadModelFile(f"{path}: the file was changed while it was loaded", param="path")
    return native
