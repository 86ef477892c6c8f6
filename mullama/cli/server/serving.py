"""From the configuration to the manager of models and to hot-swap: what they load, and from where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mullama.cli.load_progress import weights_of
from mullama.engine.memory import sizing
from mullama.errors import MullamaError
from mullama.files import identity_of
from mullama.machine import memory
from mullama.models.parse import parse_spec
from mullama.models.store.store import Store
from mullama.serving.durations import parse_duration
from mullama.serving.hot_swap import Swaps
from mullama.serving.manager import ModelManager
from mullama.serving.served_models import Names
from mullama.serving.targets import Target, find_target

if TYPE_CHECKING:
    from mullama.config import ServeConfig
    from mullama.engine.kinds import AnyEngine
    from mullama.models.resolve import ResolvedModel

BUDGET_SHARE = 0.9  # of the memory that is free at the start


def make_manager(config: ServeConfig) -> ModelManager:
    """A manager that loads what the store has, and pulls nothing. Raises ConfigError, PluginError, InvalidRequest."""
    store = Store()
    files = Files(store)

    def find(name: str) -> str | None:
        found = store.lookup(name)
        return found.key if found is not None else None

    def others() -> list[tuple[str, str]]:
        return [(entry.key, entry.key) for entry in store.list() if entry.is_named]

    return ModelManager(
        load=lambda name, reference, progress: _load(name, reference, config, files, progress),
        max_models=config.max_models,
        memory_budget=_budget(config.memory_budget),
        max_waiting=max(config.max_queue, 1),
        keep_alive_s=parse_duration(config.keep_alive),
        sleep_after_s=parse_duration(config.sleep_after, "sleep_after"),
        sleep_level=config.sleep_level,
        policy=config.model_policy,
        find=find if config.store_models else lambda name: None,
        others=others if config.store_models else None,
        estimate=lambda reference: files.size(reference, config),
        names=Names.of(config.alias, any_is_first=config.any_model, is_required=config.require_model),
    )


def make_swaps(config: ServeConfig, models: ModelManager) -> Swaps:
    """Hot-swap for the models of a manager."""
    store = Store()

    def find(to: str, reference: str, progress: Callable[[str, int, int | None], None], may_read_files: bool) -> Target:
        return find_target(to, reference, store=store, progress=progress, may_read_files=may_read_files)

    def load(name: str, target: Target) -> Any:
        from mullama.engine.kinds import load_engine

        return load_engine(target.path, name=name, config=config, weights=target.label, background=True)

    return Swaps(models, find, load)


def _budget(text: str) -> int:
    if text != "auto":
        return int(text)
    free = memory.available_memory()
    return 0 if free is None else int(free * BUDGET_SHARE)


class Files:
    """What is known of the files behind references, as long as the files do not change.

    PERF: reading a header costs 10 ms, and a model that takes another one's place has somebody waiting for it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[tuple[int, int, int], ResolvedModel]] = {}
        self._sizes: dict[str, tuple[tuple[int, int, int], int]] = {}

    def resolve(self, reference: str, before: Callable[[Path], object] = lambda path: None) -> ResolvedModel:
        """The checked file of a reference that is here. Raises ReferenceNotFound, ModelLoadError, StoreError.

        ``before`` is called before a new file is opened in a child process, and may raise as well.
        """
        from mullama.models.child.probe import check_model
        from mullama.models.resolve import resolve_model
        from mullama.serving.targets import known_digest

        known = self._known.get(reference)
        if known is not None and identity_of(known[1].path) == known[0]:
            return known[1]
        found = resolve_model(reference, store=self._store, pull=False)
        identity = identity_of(found.path)
        before(found.path)
        digest, is_known = known_digest(found.entry)
        check_model(found.path, digest=digest, known_good=is_known)
        if identity is not None:
            self._known[reference] = (identity, found)
        return found

    def size(self, reference: str, config: ServeConfig) -> int | None:
        """Bytes that loading a reference will take; None where its file does not say."""
        known = self._known.get(reference)
        sized = self._sizes.get(reference)
        if known is not None and sized is not None and sized[0] == known[0]:
            return sized[1]
        found = _estimate(reference, config, self._store)
        if known is not None and found is not None:
            self._sizes[reference] = (known[0], found)
        return found


def _load(name: str, reference: str, config: ServeConfig, files: Files, progress: Callable[[float], bool]) -> AnyEngine:
    """An engine for a reference that is here already. Raises ReferenceNotFound, ModelLoadError, StoreError."""
    from mullama.engine.kinds import load_engine
    from mullama.engine.memory import fits

    found = files.resolve(reference, lambda path: fits.sizes_for(path, config, name))
    return load_engine(
        found.path, name=name, config=config, weights=weights_of(found), background=True, progress=progress
    )


def _estimate(reference: str, config: ServeConfig, store: Store) -> int | None:
    """Bytes that loading a reference will take; None where its file does not say."""
    from mullama.models.files.estimate import estimate

    try:
        spec = parse_spec(reference, store.lookup)
        entry = None if spec.reference.is_local else store.find(spec.reference.key)
        path = store.path_of(entry) if entry is not None else store.resolve(spec.reference)
        return estimate(
            path,
            n_ctx=config.ctx_size or sizing.DEFAULT_CTX,
            n_parallel=config.parallel or sizing.DEFAULT_PARALLEL,
            type_k=config.kv_type_k,
            type_v=config.kv_type_v,
            n_batch=config.batch_size,
        ).total
    except MullamaError:
        return None
