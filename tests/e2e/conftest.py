"""Fixtures: one server that most tests share, a factory for those that need their own, a tokeniser."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest

from .support import NAME, ServerProcess

HERE = Path(__file__).parent
ONE_THREAD = ("--threads", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts a real process or a real engine."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The shared server. Tests leave it idle; it may hold retained prefixes of others."""
    args = ["--model", f"{NAME}={smollm2}", "--ctx-size", "2048", "--parallel", "4"]
    with ServerProcess(tmp_path_factory.mktemp("server"), args) as running:
        yield running


@pytest.fixture
def start(smollm2: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """``start("--flag", "value")``: a server of this test's own, ready; ended by SIGTERM, exit code 0, at the end.

    With one thread, unless a test says otherwise: beside other work on the machine it starts sooner.
    """
    numbers = itertools.count()
    with ExitStack() as stack:

        def run(*args: str, model: bool = True, program: Sequence[str] = ()) -> ServerProcess:
            chosen = ["--model", f"{NAME}={smollm2}"] if model else []
            folder = tmp_path / f"server{next(numbers)}"
            return stack.enter_context(ServerProcess(folder, [*chosen, *ONE_THREAD, *args], program))

        yield run


@pytest.fixture
def spawn(smollm2: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """The same for tests that end their server themselves: nothing is asserted at the end."""
    started: list[ServerProcess] = []

    def run(*args: str) -> ServerProcess:
        model = ["--model", f"{NAME}={smollm2}"]
        process = ServerProcess(tmp_path / f"server{len(started)}", [*model, *ONE_THREAD, *args])
        started.append(process)
        return process.wait_ready()

    yield run
    for process in started:
        process.kill()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with server.sdk() as sdk:
        yield sdk


@pytest.fixture(scope="session")
def tokenize(smollm2: Path) -> Iterator[Callable[[str], list[int]]]:
    """The model's own tokens of a text."""
    from mullama._core import Model

    vocabulary = Model(str(smollm2), vocab_only=True)
    yield lambda text: vocabulary.tokenize(text, add_special=True, parse_special=True)
    vocabulary.close()
