"""What all tests share: the way to ``bench``, the model files."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# `bench` is imported from the checkout, mullama from where it is installed: the checkout's own mullama folder has no
# compiled modules, so the root goes to the end even where `python -m pytest` put it first.
sys.path[:] = [entry for entry in sys.path if entry not in ("", str(ROOT))] + [str(ROOT)]


LONG_SECONDS = 6 * 3600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long forms of tests take longer than what a hang is told by else."""
    if os.environ.get("MULLAMA_LONG"):
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(LONG_SECONDS))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(arch, **options)``: path of a tiny random model (see tests/tiny.py), built once a session."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    built: dict[object, Path] = {}

    def get(arch: str = "llama", **options: object) -> Path:
        key = (arch, *sorted(options.items()))
        if key not in built:
            built[key] = tiny.build(folder / f"{arch}-{len(built)}.gguf", arch, **options)  # type: ignore[arg-type]
        return built[key]

    return get


def _real_model(variable: str, reference: str) -> Path:
    if named := os.environ.get(variable):
        return Path(named)
    from mullama.models.resolve import resolve_model

    return resolve_model(reference).path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: $MULLAMA_TEST_MODEL, else from the store, pulled when it is not there."""
    return _real_model("MULLAMA_TEST_MODEL", "smollm2:135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """gemma-3-270m (sliding window): $MULLAMA_TEST_GEMMA, else from the store, pulled when it is not there."""
    return _real_model("MULLAMA_TEST_GEMMA", "gemma3:270m")


@pytest.fixture(scope="session")
def minilm_file() -> Path:
    """all-MiniLM-L6-v2: $MULLAMA_TEST_MINILM, else from the store, pulled and converted when it is not there."""
    return _real_model("MULLAMA_TEST_MINILM", "minilm")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets logging up for the process."""
    root, ours = logging.getLogger(), logging.getLogger("mullama")
    before = root.level, ours.level, list(root.handlers)
    yield
    root.setLevel(before[0])
    ours.setLevel(before[1])
    for handler in set(root.handlers) - set(before[2]):
        root.removeHandler(handler)
