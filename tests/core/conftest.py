"""Fixtures of the core's tests. Every Core and Engine made through them is audited when its test ends."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_support import Driver

from mullama._core import Core, Model
from mullama.config import ServeConfig
from mullama.engine.engine import Engine


@pytest.fixture(scope="session")
def models(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., Model]]:
    """``models(arch)``: the loaded tiny model of an architecture, shared by the session."""
    loaded: dict[Path, Model] = {}

    def get(arch: str = "llama", **options: Any) -> Model:
        path = tiny_model(arch, **options)
        if path not in loaded:
            loaded[path] = Model(path)
        return loaded[path]

    yield get
    for model in loaded.values():
        model.close()  # raises when a context still uses it


@pytest.fixture
def model(models: Callable[..., Model]) -> Model:
    return models("llama")


@pytest.fixture(scope="session")
def real_model(smollm2: Path) -> Iterator[Model]:
    """SmolLM2, for what needs sense."""
    model = Model(smollm2)
    yield model
    model.close()


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while (left := [t for t in threading.enumerate() if t not in before]) and time.monotonic() < deadline:
        left[0].join(0.01)
    assert not left, f"threads left behind: {left}"


@pytest.fixture
def make_core() -> Iterator[Callable[..., Driver]]:
    """``make_core(model, n_slots=…)``: a Core in a Driver. One thread unless told otherwise: no trials, no aborts."""
    made: list[Driver] = []

    def make(model: Model, *, n_slots: int = 4, n_ctx: int = 512, n_batch: int = 64, **options: Any) -> Driver:
        made.append(Driver(Core(model, n_slots=n_slots, n_ctx=n_ctx, n_batch=n_batch, **options)))
        return made[-1]

    yield make
    for driver in made:
        if not driver.closed:
            assert driver.core.audit() == []
            driver.close()
    made.clear()
    gc.collect()


@pytest.fixture
def core(make_core: Callable[..., Driver], model: Model) -> Driver:
    """A Core with four slots of 512 tokens on the tiny model."""
    return make_core(model)


@pytest.fixture
def make_engine(tiny_model: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """``make_engine(path=None, **options)``: an Engine with ServeConfig(**options) on the tiny model."""
    made: list[Engine] = []

    def make(path: Path | None = None, **options: Any) -> Engine:
        settings = {"ctx_size": 512, "parallel": 4, "threads": 1, "batch_size": 64, "page_dir": str(tmp_path / "pages")}
        engine = Engine.load(path or tiny_model(), config=ServeConfig(**{**settings, **options}))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        if engine.is_ready():
            assert engine.kv.audit() == []
        engine.close()
    made.clear()
    gc.collect()


@pytest.fixture
def twin(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """The tiny model's weights in another file."""
    return Path(shutil.copy(tiny_model(), tmp_path / "twin.gguf"))


@pytest.fixture
def other(tiny_model: Callable[..., Path]) -> Path:
    """Other weights of the same shape, as another quantisation would be."""
    return tiny_model("llama", seed=8)
